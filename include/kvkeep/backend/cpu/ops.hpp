// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// CPU: the definitions of all ops that are no templates.
#pragma once

#include "accumulate.hpp"
#include "attend.hpp"
#include "column_moments.hpp"
#include "column_sums.hpp"
#include "compact.hpp"
#include "fused_rows.hpp"
#include "key_geometry.hpp"
#include "layer_counts.hpp"
#include "lazy_victim.hpp"
#include "pool.hpp"
#include "query_moments.hpp"
#include "reduce.hpp"
#include "select_k.hpp"
