// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
#include "../op/head_chain.cpp"
