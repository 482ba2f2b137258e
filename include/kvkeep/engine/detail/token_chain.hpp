// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// Device session: a token's attention and the decision after it, as few ops for the backend as its scorer allows.
#pragma once

#include <vector>

#include "../../op/attend.hpp"
#include "../../op/head_chain.hpp"
#include "../../op/reduce.hpp"
#include "../../op/select_k.hpp"
#include "device_steps.hpp"

namespace kvkeep::detail {

/// Where ops run, and their scratch.
template <class Ctx>
struct runner {
  Ctx& ctx;
  workspace& w;

  template <class Op>
  status operator()(Op const& op) const noexcept {
    return run(ctx, op, w);
  }
  template <class F>
  status each(index_t n, F const& f) const noexcept {
    return w.measuring() ? status::ok : (*this)(op::for_each<F, space_of<Ctx>>{n, f});
  }
};

/// Decisions beside what follows them.
template <class Ctx>
struct aside_state {
  Ctx* ctx = nullptr;  ///< null: there are none
  std::byte* scratch = nullptr;
  std::size_t bytes = 0;
  Ctx* measured = nullptr;         ///< whose scratch is being measured into `bytes`
  std::vector<std::uint8_t> open;  ///< [managed layer] 1: nobody has waited for its last decision
  bool any = false;                ///< ... of some layer
};

/// What a session knows of one token in one layer, and wants done: attention, then one victim per head over
/// its budget.
template <class Space>
struct token_steps {
  op::attend<Space> attend;
  op::for_each<push_token<Space>, Space> push;  ///< n 0: no ring of queries is kept
  resolve_keep<Space> resolve;
  settle_victims<Space> settle;           ///< with `keep` and `found`, where victims go
  tensor_ref<index_t, 2, Space> victims;  ///< [id, head] `settle.found`, to be written
  index_t* tickets = nullptr;             ///< of op::joined_chain
  bool folds = false;                     ///< the scorer's `fold` is due: attention has not done it
  bool one_set = false;                   ///< one kept set for all heads
  bool joins = false;                     ///< ... by the mean of their scores
  bool attended = false;                  ///< `attend` and `push` have nothing to do

  /// Attention has been enqueued already.
  void without_attention(score_input<Space> const& in) noexcept {
    attend = {};
    attend.batch = in.batch;
    attend.layer = in.layer;
    push.n = 0;
    attended = true;
  }
};

/// Chains over the heads of a batch, and over its entries.
template <class Space, class... Ops>
auto heads_chain(score_input<Space> const& in, Ops const&... ops) {
  cache_shape const& s = in.layer.kv.shape;
  return op::make_chain<Space>(in.batch.n, s.n_kv_heads, s.max_slots, ops...);
}
template <class Space, class... Ops>
auto entries_chain(score_input<Space> const& in, Ops const&... ops) {
  return op::make_chain<Space>(in.batch.n, 1, in.layer.kv.shape.max_slots, ops...);
}
template <class Ctx, class... Ops>
status run_heads(Ctx& ctx, score_input<space_of<Ctx>> const& in, workspace& ws, Ops const&... ops) {
  return run(ctx, heads_chain(in, ops...), ws);
}

/// As ops read it.
template <class Space>
tensor_ref<index_t const, 2, Space> read_only(tensor_ref<index_t, 2, Space> const& t) {
  return t;
}
/// A step per entry and KV head.
template <class F, class Space>
op::for_each<F, Space> each_head(score_input<Space> const& in, F const& f) {
  return {in.batch.n * in.layer.kv.shape.n_kv_heads, f};
}

/// Attention and the query ring, where nothing else shall be part of the same chain.
template <class Ctx>
status attend_alone(Ctx& ctx, score_input<space_of<Ctx>> const& in,
                    token_steps<space_of<Ctx>> const& t, workspace& ws) {
  if (t.attended) return status::ok;
  if (t.push.n == 0 && !ws.measuring()) return run(ctx, t.attend, ws);
  return run_heads(ctx, in, ws, t.attend, t.push);
}

/// Attention, scores and the victims that follow from them, of a scorer that hands out its ops or does not.
template <class Ctx, class S>
status evict_by_score(Ctx& ctx, S const& s, score_input<space_of<Ctx>> const& in,
                      token_steps<space_of<Ctx>> const& t, workspace& ws) {
  using space = space_of<Ctx>;
  cache_shape const& shape = in.layer.kv.shape;
  workspace::frame const frame(ws);
  auto const scores =
      row_major<space>(ws.take<float>(product(in.batch.n, shape.n_kv_heads, shape.max_slots)),
                       in.batch.n, shape.n_kv_heads, shape.max_slots);
  if (!ws.measuring() && !ws.ok()) return status::workspace_too_small;
  auto const resolve = each_head(in, t.resolve);
  auto const settle = each_head(in, t.settle);
  op::evict_one<space> evict{in.batch, in.layer.slots, scores, in.guard, t.victims};
  if (t.one_set) evict.slots.lengths.extent[1] = 1;
  op::mean_heads<space> const mean{in.batch, in.layer.slots, scores};
  if constexpr (hands_out_scores<S, space>) {
    token_steps<space> left = t;
    if (t.folds && s.state(shape).folds_weights) {
      KVKEEP_TRY(attend_alone(ctx, in, t, ws));
      KVKEEP_TRY(s.fold(ctx, in, ws));
      left.without_attention(in);
    }
    return s.score_ops(in, scores, [&](auto const&... ops) {
      if (!t.one_set)
        return run_heads(ctx, in, ws, resolve, left.attend, left.push, ops..., evict, settle);
      auto const heads = heads_chain(in, resolve, left.attend, left.push, ops...);
      if (!t.joins)
        return run(ctx, op::join_chains(heads, entries_chain(in, evict, settle), t.tickets), ws);
      return run(ctx, op::join_chains(heads, entries_chain(in, mean, evict, settle), t.tickets),
                 ws);
    });
  } else {
    KVKEEP_TRY(attend_alone(ctx, in, t, ws));
    if (t.folds) KVKEEP_TRY(s.fold(ctx, in, ws));
    KVKEEP_TRY(s.score(ctx, in, scores, ws));
    if (!t.one_set) return run_heads(ctx, in, ws, evict, resolve, settle);
    if (!t.joins) return run(ctx, entries_chain(in, evict, resolve, settle), ws);
    return run(ctx, entries_chain(in, mean, evict, resolve, settle), ws);
  }
}

/// Attention and the decision after it. Precondition: the scorer decides while decoding.
template <class Ctx, class S>
status decide_token(Ctx& ctx, S const& s, score_input<space_of<Ctx>> const& in,
                    token_steps<space_of<Ctx>> const& t, workspace& ws) {
  if constexpr (requires { s.decide_token(ctx, in, t, ws); }) {
    return s.decide_token(ctx, in, t, ws);
  } else {
    if constexpr (hands_out_victims<S, space_of<Ctx>>)
      if (s.traits().finds_victims && !t.one_set)
        return s.victim_ops(in, read_only(t.settle.keep), t.victims, [&](auto const&... ops) {
          return run_heads(ctx, in, ws, each_head(in, t.resolve), t.attend, t.push, ops...,
                           each_head(in, t.settle));
        });
    return evict_by_score(ctx, s, in, t, ws);
  }
}

}  // namespace kvkeep::detail
