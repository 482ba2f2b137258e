// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
#include "../op/query_moments.cpp"
