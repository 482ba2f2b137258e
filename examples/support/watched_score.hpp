// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// A policy's scorer with a view into it: the scores it hands out and the rows it keeps per slot.
#pragma once

#include <algorithm>
#include <functional>

#include <kvkeep/backend/cpu/context.hpp>
#include <kvkeep/engine/any_policy.hpp>

namespace kvkeep::tools {

/// Does what the scorer of an `any_policy` does and shows it. The callbacks must live as long as the session,
/// and wait for what the backend has yet to do where it only enqueues.
template <backend Ctx>
struct watched_score_on : any_scorer<Ctx> {
  using base = any_scorer<Ctx>;
  using input = typename base::input;
  using scores = score_map<space_of<Ctx>>;

  /// Scores of the slots in use, before they decide; what the callback writes decides instead.
  std::function<void(input const& in, scores out)> scored;
  /// A layer's slots after the prompt. `in.rows` stay in place for the session's life.
  std::function<void(input const& in)> settled;

  status score(Ctx& ctx, input const& in, scores out, workspace& w) const {
    status const s = base::score(ctx, in, out, w);
    if (s == status::ok && !w.measuring() && scored) scored(in, out);
    return s;
  }
  status settle(Ctx& ctx, input const& in, workspace& w) const {
    status const s = base::settle(ctx, in, w);
    if (s == status::ok && !w.measuring() && settled) settled(in);
    return s;
  }
};

using watched_score = watched_score_on<cpu::context>;

/// `p` with callbacks.
template <backend Ctx>
any_policy<Ctx> watch(any_policy<Ctx> p, watched_score_on<Ctx> callbacks) {
  static_cast<any_scorer<Ctx>&>(callbacks) = p.score;
  p.score = any_scorer<Ctx>(callbacks);
  return p;
}

/// H2O's sum of a slot as it is compared, where `rows` are its scorer's: one row per KV head, or one per
/// query head with `group = max`.
inline float heavy_hitter_sum(tensor_ref<float, 4> const& rows, index_t id, index_t kv_head,
                              index_t slot, float scale) {
  float sum = rows(id, kv_head, 0, slot);
  for (index_t r = 1; r < rows.extent[2]; ++r) sum = std::max(sum, rows(id, kv_head, r, slot));
  return sum * scale;
}

}  // namespace kvkeep::tools
