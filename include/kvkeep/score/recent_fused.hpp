// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// MorphKV's score: how much the most recent queries attend to each old token.
#pragma once

#include <string>

#include "../op/accumulate.hpp"
#include "../op/lazy_rows.hpp"
#include "scorer.hpp"

namespace kvkeep {

/// How MorphKV's scores are evaluated while decoding. Both give the canonical scores.
enum class morph_rows : std::uint8_t {
  cached,  ///< attention weights of the last rows are kept: 4 * group * n_rows bytes per slot
  lazy,  ///< 16-bit bounds, exact scores for the few slots in doubt: 2 n_rows + 16 bytes per slot, and
  ///< 4 * group * n_rows * (W + 5) per KV head; where one token leaves per step, else as `direct`
  direct  ///< recomputed from the query ring and K: no state per slot, K is read again
};

namespace detail {

/// Positions of the last rows, ascending; -1: absent. (No member: kernels take no private types.)
struct row_positions {
  index_t const* seen;
  index_t const* from;
  index_t const* id;
  index_t n_rows;
  index_t* out;
  KVKEEP_HD void operator()(index_t i) const noexcept {
    index_t const s = id ? id[i / n_rows] : i / n_rows;
    index_t const p = seen[s] - n_rows + i % n_rows;
    out[i] = p >= 0 && p >= from[s] ? p : -1;
  }
};

}  // namespace detail

/// Spec 4.3, 4.4; arXiv 2503.00979, ghadiaravi13/MorphKV patch_{mistral,qwen2,phi3,llama}.py.
/// Softmax per row over the old columns only (all but the last W tokens), maximum over the group, then
/// maximum or sum over the rows. The guard's `recent` is W.
/// Canonical choices and deviations: see policy/morphkv.hpp.
struct recent_fused_score : scorer_base {
  index_t window = 32;                ///< W, the protected recent tokens
  index_t n_rows = 0;                 ///< query rows; 0: W - 1, as in most of the published code
  reduction fusion = reduction::sum;  ///< sum (sum_fused) or max (max_fused)
  morph_rows evaluation = morph_rows::cached;

  index_t row_count() const { return n_rows > 0 ? n_rows : window - 1; }

  scorer_traits traits() const {
    scorer_traits t;
    t.name = "recent_fused";
    t.prompt = evidence::window_queries;
    t.decode = evidence::token_queries;
    t.direct = true;
    t.finds_victims = evaluation == morph_rows::lazy;
    t.victims_recent = window;
    return t;
  }
  void check(cache_shape const&) const {
    KVKEEP_EXPECTS(window >= 1, "window", window, ">= 1");
    KVKEEP_EXPECTS(evaluation != morph_rows::lazy || window >= lazy_shape::ahead, "window", window,
                   ">= " + std::to_string(lazy_shape::ahead) + " for the lazy evaluation");
    KVKEEP_EXPECTS(evaluation != morph_rows::lazy || row_count() <= lazy_shape::most_rows, "n_rows",
                   row_count(),
                   "<= " + std::to_string(lazy_shape::most_rows) + " for the lazy evaluation");
    KVKEEP_EXPECTS(n_rows >= 0 && row_count() >= 1, "n_rows", n_rows != 0 ? n_rows : row_count(),
                   ">= 1 (0 means window - 1, so window >= 2)");
    KVKEEP_EXPECTS(row_count() <= window, "n_rows", n_rows,
                   "<= window, so that every row is newer "
                   "than every old token");
    KVKEEP_EXPECTS(fusion != reduction::mean, "fusion", to_string(fusion), "sum or max");
  }
  state_spec state(cache_shape const& s) const {
    state_spec r{0, row_count(), 0, false, true};
    if (evaluation == morph_rows::cached) r.weight_ring = row_count();
    if (evaluation != morph_rows::lazy) return r;
    lazy_shape const lazy = lazy_of(s);
    r.weight_ring = 1;
    r.loose_rows = lazy.slot_rows();
    r.head_floats = lazy.head_floats();
    return r;
  }
  std::uint64_t key() const { return config_key(window, n_rows, fusion, evaluation); }

  /// Fills the weight ring, or the lazy state, for the slots that remain of the prompt.
  template <class Ctx>
  status settle(Ctx& ctx, score_input<space_of<Ctx>> const& in, workspace& ws) const {
    if (evaluation == morph_rows::direct) return status::ok;
    if (evaluation == morph_rows::lazy) return run(ctx, enter_op(in, {}, true), ws);
    query_rows<space_of<Ctx>> q;
    KVKEEP_TRY(last_queries(ctx, in, row_count(), q, ws));
    return run(ctx,
               op::row_weights<space_of<Ctx>>{in.batch, in.layer, q, in.weights, in.weight_sum,
                                              in.weight_stride, in.weight_ring},
               ws);
  }
  /// A token's row enters the lazy state only where something leaves, so that a cache below its capacity costs
  /// nothing.
  template <class Ctx>
  status victims(Ctx& ctx, score_input<space_of<Ctx>> const& in,
                 tensor_ref<index_t const, 2, space_of<Ctx>> keep,
                 tensor_ref<index_t, 2, space_of<Ctx>> victim, workspace& ws) const {
    KVKEEP_TRY(run(ctx, enter_op(in, keep, false), ws));
    return run(ctx, victim_op(in, keep, victim), ws);
  }
  template <class Space, class Run>
  status victim_ops(score_input<Space> const& in, tensor_ref<index_t const, 2, Space> keep,
                    tensor_ref<index_t, 2, Space> victim, Run const& run) const {
    return run(enter_op(in, keep, false), victim_op(in, keep, victim));
  }
  template <class Ctx>
  status score(Ctx& ctx, score_input<space_of<Ctx>> const& in, score_map<space_of<Ctx>> out,
               workspace& ws) const {
    // At the end of a prompt the ring of weights is not filled yet.
    if (evaluation == morph_rows::cached && in.newest_row != nullptr) {
      return score_cached(ctx, in, out, ws);
    }
    return score_direct(ctx, in, out, {}, ws);
  }
  /// The direct form; `heads` `[entry, q_head, slot]` also receives each query head's own fused rows.
  template <class Ctx>
  status score_direct(Ctx& ctx, score_input<space_of<Ctx>> const& in, score_map<space_of<Ctx>> out,
                      tensor_ref<float, 3, space_of<Ctx>> heads, workspace& ws) const {
    query_rows<space_of<Ctx>> q;
    KVKEEP_TRY(last_queries(ctx, in, row_count(), q, ws));
    return run(
        ctx,
        op::fused_rows<space_of<Ctx>>{in.batch, in.layer, q, in.guard.recent, fusion, out, heads},
        ws);
  }

 private:
  lazy_shape lazy_of(cache_shape const& s) const { return {s.group(), row_count(), window}; }
  template <class Space>
  lazy_state<Space> lazy_state_of(score_input<Space> const& in) const {
    return {lazy_of(in.layer.kv.shape), in.seen, in.ring_from, in.ring_q, in.loose, in.head};
  }
  template <class Space>
  op::lazy_victim<Space> victim_op(score_input<Space> const& in,
                                   tensor_ref<index_t const, 2, Space> keep,
                                   tensor_ref<index_t, 2, Space> victim) const {
    op::lazy_victim<Space> o{in.batch, in.layer, lazy_state_of(in)};
    o.frozen = in.guard.frozen;
    o.keep = keep;
    o.fuse = fusion;
    o.victim = victim;
    return o;
  }
  template <class Space>
  op::lazy_enter<Space> enter_op(score_input<Space> const& in,
                                 tensor_ref<index_t const, 2, Space> keep, bool anew) const {
    op::lazy_enter<Space> o{in.batch, in.layer, lazy_state_of(in)};
    o.weights = in.weights;
    o.weight_max = in.weight_max;
    o.ring_row = in.newest_row;
    o.ring_stride = in.weight_stride;
    o.keep = keep;
    o.fuse = fusion;
    o.anew = anew;
    return o;
  }

  template <class Ctx>
  status score_cached(Ctx& ctx, score_input<space_of<Ctx>> const& in, score_map<space_of<Ctx>> out,
                      workspace& ws) const {
    using space = space_of<Ctx>;
    index_t const n = in.batch.n * row_count();
    index_t* position = ws.take<index_t>(static_cast<std::size_t>(n));
    if (!ws.measuring()) {
      if (!ws.ok()) return status::workspace_too_small;
      detail::row_positions const fn{in.seen, in.ring_from, in.batch.id, row_count(), position};
      KVKEEP_TRY(run(ctx, op::for_each<detail::row_positions, space>{n, fn}, ws));
    }
    op::ring_score<space> o{in.batch, in.layer};
    o.positions = row_major<space>(static_cast<index_t const*>(position), in.batch.n, row_count());
    o.q = in.ring_q;
    o.weights = in.weights;
    o.ring_stride = in.weight_stride;
    o.ring = in.weight_ring;
    o.recent = in.guard.recent;
    o.fuse = fusion;
    o.out = out;
    return run(ctx, o, ws);
  }
};

}  // namespace kvkeep
