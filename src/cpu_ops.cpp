// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
// The ops of the CPU backend, compiled once (target kvkeep::cpu).
#include <kvkeep/backend/cpu/ops.hpp>
