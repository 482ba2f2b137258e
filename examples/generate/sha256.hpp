// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// SHA-256 (FIPS 180-4), to tell whether episodes were made for a model's words.
#pragma once

#include <string>
#include <string_view>

namespace kvkeep::generate {

/// @return 64 hexadecimal digits
std::string sha256(std::string_view bytes);

}  // namespace kvkeep::generate
