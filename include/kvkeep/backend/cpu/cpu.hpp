// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// The CPU backend: `kvkeep::cpu::context` runs every op on memory of the host.
#pragma once

#include "accumulate.hpp"
#include "attend.hpp"
#include "compact.hpp"
#include "context.hpp"
#include "key_geometry.hpp"
#include "layer_counts.hpp"
#include "pool.hpp"
#include "reduce.hpp"
#include "score_slots.hpp"
#include "select_k.hpp"
#include "window_score.hpp"
