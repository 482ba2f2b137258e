// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// Golden cases for tests: the tools' loader under the tests' names.
#pragma once

#include "../../examples/support/case.hpp"

namespace kvkeep::test {

using golden_case = tools::recorded_case;
using tools::case_dirs;
using tools::load_case;

}  // namespace kvkeep::test
