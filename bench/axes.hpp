// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// The axes of all benchmarks in one place. Each program varies one axis at a time around `base`.
#pragma once

#include <kvkeep/core/types.hpp>

namespace bench {

using kvkeep::dtype;
using kvkeep::index_t;

/// How a cache lies in memory: contiguous [head, slot, dim] and [slot, head, dim], shuffled pages
/// of 16 slots, one range of rows per head.
enum class layout : std::uint8_t { hnd, nhd, paged, ragged };

/// Distribution of scores: what attention leaves (heavy-tailed), what breaks sorters (ties).
enum class scores : std::uint8_t { uniform, heavy_tailed, few_values, mostly_zero, all_equal };

constexpr char const* to_string(layout l) {
  constexpr char const* names[] = {"hnd", "nhd", "paged", "ragged"};
  return names[static_cast<int>(l)];
}
constexpr char const* to_string(scores s) {
  constexpr char const* names[] = {"uniform", "heavy_tailed", "few_values", "mostly_zero",
                                   "all_equal"};
  return names[static_cast<int>(s)];
}

/// One point of the axes: a layer of Llama-3.1-8B by default.
struct point {
  index_t tokens = 8192;    ///< T, slots in use before a cut
  index_t capacity = 1024;  ///< C, slots that stay
  index_t window = 32;      ///< W, query rows
  index_t kv_heads = 8;
  index_t group = 4;
  index_t dim = 128;
  index_t batch = 1;
  dtype type = dtype::f32;
  layout where = layout::hnd;
  scores values = scores::heavy_tailed;
};

inline constexpr point base{};
inline constexpr index_t all_tokens[] = {1024, 8192, 32768};
inline constexpr index_t all_capacities[] = {512, 1024, 4096};
inline constexpr index_t all_step_capacities[] = {256, 512, 1024, 4096, 8192};
inline constexpr index_t all_windows[] = {8, 32, 64};
inline constexpr index_t all_groups[] = {1, 4, 8};
inline constexpr index_t all_dims[] = {64, 128};
inline constexpr dtype all_types[] = {dtype::f32, dtype::bf16, dtype::f16};
inline constexpr layout all_layouts[] = {layout::hnd, layout::nhd, layout::paged, layout::ragged};
inline constexpr scores all_scores[] = {scores::uniform, scores::heavy_tailed, scores::few_values,
                                        scores::mostly_zero, scores::all_equal};

}  // namespace bench
