// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// The CPU backend: `kvkeep::cpu::context` runs every op on memory of the host.
#pragma once

#include "context.hpp"
#include "head_chain.hpp"
#include "score_slots.hpp"

#if defined(KVKEEP_CPU_COMPILED)
#include "compiled.hpp"
#else
#include "ops.hpp"
#endif
