// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// The parameters that SnapKV, PyramidKV, DynamicKV and AdaKV share.
#pragma once

#include <kvkeep/engine/policy_table.hpp>

#include "parameters.hpp"

namespace kvkeep::replay {

/// kvpress' form of SnapKV's score: pooled before the group is reduced, mean over the window.
enum class window_form : std::uint8_t { original, mean_rows, kvpress };

/// W below C, as `params.window` and `params.capacity`. @return W
inline index_t read_window(parameters& p, policy_options& o, std::optional<index_t> fallback = {}) {
  o.capacity = p.integer("capacity", {2, most_tokens});
  index_t const window = p.integer("window", {1, most_window}, fallback);
  if (window >= o.capacity)
    p.fail("window", std::to_string(window) +
                         ", allowed: below params.capacity = " + std::to_string(o.capacity));
  o.window = window;
  return window;
}

inline void read_window_options(parameters& p, policy_options& o, index_t group,
                                window_form form = window_form::original) {
  static constexpr std::array<named<op::pooling>, 2> poolings{
      {{"avgpool", op::pooling::average}, {"maxpool", op::pooling::maximum}}};
  static constexpr std::array<named<reduction>, 2> rows{
      {{"sum", reduction::sum}, {"mean", reduction::mean}}};
  o.kernel = p.integer("kernel", {1, (1 << 16) - 1}, 5);
  if (o.kernel % 2 == 0) p.fail("kernel", std::to_string(o.kernel) + ", allowed: odd numbers");
  o.pooling = p.word("pooling", poolings, "avgpool");
  o.group = read_group(p, group);
  o.group_before_pool = p.flag("gqa_before_pool", form != window_form::kvpress);
  o.rows = p.word("window_reduce", rows, form == window_form::original ? "sum" : "mean");
}

}  // namespace kvkeep::replay
