// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
#include "../op/select_k.cpp"
