// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
// The rates that floors are made of, as rows.
#include "suite.hpp"

namespace bench {
namespace {
parts_of_unit const rates({{"rates", add_calibration_rows}});
}  // namespace
}  // namespace bench
