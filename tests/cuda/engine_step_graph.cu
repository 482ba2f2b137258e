// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
#include "../emulation/step_graph.cpp"
