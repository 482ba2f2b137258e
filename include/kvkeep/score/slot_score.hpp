// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// Scores that a functor computes once per slot, from its position and rows: the easy way to a policy.
#pragma once

#include <type_traits>

#include "scorer.hpp"

namespace kvkeep {

/// `Fn` is a slot functor (op/score_slots.hpp) with `static constexpr char const* name`, and if it has options
/// `key()` (config_key) and, where not all values will do, `check()`, which throws (KVKEEP_EXPECTS). A score depends
/// on nothing that changes while the token is cached, so it is computed when the token arrives (D operations) and then
/// kept: one float per slot, and a decision reads no keys. So it cannot decay by age, of which `slot_values::seen` says
/// what it was then; but position / tau in place of -age / tau orders the slots alike.
template <class Fn>
struct slot_score : scorer_base {
  Fn fn{};

  scorer_traits traits() const {
    scorer_traits t;
    t.name = Fn::name;
    t.prompt = t.decode = Fn::reads_v   ? evidence::keys_values
                          : Fn::reads_k ? evidence::keys
                                        : evidence::none;
    t.comparable = Fn::reads_k || Fn::reads_v;
    return t;
  }
  state_spec state(cache_shape const&) const { return {1, 0, 0}; }
  void check(cache_shape const&) const {
    if constexpr (requires { fn.check(); }) fn.check();
  }
  std::uint64_t key() const {
    if constexpr (requires { fn.key(); }) {
      return fn.key();
    } else {
      static_assert(std::is_empty_v<Fn>, "a functor with options needs key(): what sets it apart");
      return 0;
    }
  }

  template <class Ctx>
  status settle(Ctx& ctx, score_input<space_of<Ctx>> const& in, workspace& ws) const {
    return run(ctx, evaluate(in, {}, in_rows(in), true), ws);
  }
  template <class Ctx>
  status fold(Ctx& ctx, score_input<space_of<Ctx>> const& in, workspace& ws) const {
    return run(ctx, evaluate(in, in.fresh, in_rows(in), true), ws);
  }
  template <class Ctx>
  status score(Ctx& ctx, score_input<space_of<Ctx>> const& in, score_map<space_of<Ctx>> out,
               workspace& ws) const {
    if (in.newest_row == nullptr) return run(ctx, evaluate(in, {}, out, false), ws);
    return run(ctx, cached(in, out), ws);
  }
  template <class Space, class Run>
  status score_ops(score_input<Space> const& in, score_map<Space> out, Run const& run) const {
    return run(evaluate(in, in.fresh, in_rows(in), true), cached(in, out));
  }

 private:
  template <class Space>
  static op::reduce_rows<Space> cached(score_input<Space> const& in, score_map<Space> out) {
    op::reduce_rows<Space> copy{in.batch, in.layer.slots, in.rows, true};
    copy.out = out;
    return copy;
  }
  template <class Space>
  static score_map<Space> in_rows(score_input<Space> const& in) noexcept {
    score_map<Space> m;
    m.data = in.rows.data;
    int const axis[] = {0, 1, 3};
    for (int a = 0; a < 3; ++a) {
      m.extent[a] = in.rows.extent[axis[a]];
      m.stride[a] = in.rows.stride[axis[a]];
    }
    return m;
  }
  template <class Space>
  op::score_slots<Fn, Space> evaluate(score_input<Space> const& in,
                                      tensor_ref<index_t const, 2, Space> only,
                                      score_map<Space> out, bool by_id) const {
    op::score_slots<Fn, Space> o{in.batch, in.layer, fn, in.seen};
    o.only = only;
    o.out = out;
    o.out_by_id = by_id;
    return o;
  }
};

}  // namespace kvkeep
