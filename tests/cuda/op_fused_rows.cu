// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
#include "../op/fused_rows.cpp"
