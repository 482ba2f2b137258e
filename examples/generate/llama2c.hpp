// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// llama2.c's tokenizer file.
#pragma once

#include <filesystem>
#include <memory>

#include "generate/tokenizer.hpp"

namespace kvkeep::generate {

/// @param vocabulary  tokens of the model
/// @throws bad_input naming file and field
std::shared_ptr<tokenizer const> load_llama2c_tokenizer(std::filesystem::path const& file,
                                                        index_t vocabulary);

}  // namespace kvkeep::generate
