// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// AdaKV: the heads of a layer share one total, split by how many of the layer's best scores they hold.
#pragma once

#include <cmath>
#include <string>

#include "../op/layer_counts.hpp"
#include "apportion.hpp"
#include "budget.hpp"

namespace kvkeep {

enum class ada_form : std::uint8_t {
  exact,      ///< canonical: a floor per head, the rest apportioned; exact total
  published,  ///< KVCache-Factory and FFY0: mixing weight and fp32 rounding; totals off by a few
  safeguard   ///< kvpress: each head's best int(C * alpha) are safe, then the layer's best
};

/// Spec 5.3; arXiv 2407.11550, KVCache-Factory AdaKVCluster, FFY0/AdaKV, kvpress AdaKVPress.
/// Deviations: totals are exact (`published` reproduces the reference's rounding); dropped keys are freed
/// instead of masked. Lengths differ among the heads of a layer.
struct ada_heads {
  index_t tokens = 1024;   ///< C, the mean over heads, protected tokens included
  double alpha = 0.2;      ///< share of the budget that every head is sure of
  bool normalize = false;  ///< scale a head by its share of mass in its best C - W scores first
  ada_form form = ada_form::exact;

  budget_traits traits() const {
    budget_traits t{"ada_heads"};
    t.varies_over_heads = t.needs_scores = true;
    return t;
  }
  std::uint64_t key() const { return config_key(tokens, alpha, normalize, form); }
  index_t capacity() const { return tokens; }
  index_t most(index_t, cache_shape const& s, index_t protect, index_t prompt) const {
    // The published rounding may exceed its share by one half.
    offset_t const all = static_cast<offset_t>(tokens - protect) * s.n_kv_heads + 1 + protect;
    offset_t const bound = prompt > tokens ? prompt : tokens;
    return static_cast<index_t>(all < bound ? all : bound);
  }
  layer_range due(index_t layer, index_t) const { return {layer, layer + 1}; }
  void check(index_t, cache_shape const&, index_t protect) const {
    KVKEEP_EXPECTS(tokens > protect, "capacity", tokens,
                   "> sinks + window = " + std::to_string(protect));
    KVKEEP_EXPECTS(alpha >= 0 && alpha <= 1, "alpha", alpha, "0..1");
  }

  template <class Ctx>
  status allocate(Ctx& ctx, budget_input<space_of<Ctx>> const& in, workspace& ws) const {
    using space = space_of<Ctx>;
    index_t const base = tokens - in.protect();
    auto const heads = static_cast<std::size_t>(in.n_kv_heads);
    index_t* counts = ws.take<index_t>(heads);
    index_t* room = ws.take<index_t>(heads);
    offset_t* remainder = ws.take<offset_t>(heads);
    if (!ws.measuring()) {
      if (!ws.ok()) return status::workspace_too_small;
      if (base > in.candidates())
        return detail::fill_layer(ctx, in, in.layer, in.candidates() + in.protect(), ws);
      KVKEEP_TRY(
          run(ctx, op::for_each<fill, space>{in.n_kv_heads, fill{room, in.sinks + in.candidates()}},
              ws));
    }
    op::layer_counts<space> count;
    count.batch.n = 1;
    count.n_maps = 1;
    count.scores = in.scores;
    count.scores.data += in.layer * in.scores.stride[0];
    count.candidates = row_major<space>(static_cast<index_t const*>(room), 1, in.n_kv_heads);
    count.skip = in.sinks;
    count.best_per_head = base;
    count.normalize = normalize;
    if (form == ada_form::safeguard) {
      index_t const safe = static_cast<index_t>(tokens * alpha) - in.protect();
      count.safe = safe > 0 ? safe : 0;
    }
    count.out = row_major<space>(counts, 1, 1, in.n_kv_heads);
    KVKEEP_TRY(run(ctx, count, ws));
    if (ws.measuring()) return status::ok;
    using split = split_heads<ada_heads, space>;
    return run(ctx, op::for_each<split, space>{1, split{*this, in, counts, room, remainder}}, ws);
  }

  // Steps that a backend runs; public, because nvcc makes no kernel of a private type.
  struct fill {
    index_t* out;
    index_t value;
    KVKEEP_HD void operator()(index_t i) const noexcept { out[i] = value; }
  };
  template <class Rule, class Space>
  struct split_heads {
    Rule rule;
    budget_input<Space> in;
    index_t* counts;
    index_t* room;
    offset_t* remainder;

    KVKEEP_HD void operator()(index_t) const noexcept {
      index_t const n = in.n_kv_heads;
      index_t const base = rule.tokens - in.protect();
      index_t const sure = static_cast<index_t>(base * rule.alpha);
      auto const set = [&](index_t h, index_t b) {
        index_t const top = in.candidates();
        in.k(in.layer, h) = (b < top ? b : top) + in.protect();
      };
      if (rule.form == ada_form::safeguard) {
        for (index_t h = 0; h < n; ++h) set(h, counts[h]);
        return;
      }
      if (rule.form == ada_form::published) {
        for (index_t h = 0; h < n; ++h) {
          float const mixed = static_cast<float>(counts[h]) * static_cast<float>(1 - rule.alpha) +
                              static_cast<float>(sure);
          set(h, static_cast<index_t>(nearbyintf(mixed)));
        }
        return;
      }
      for (index_t h = 0; h < n; ++h) room[h] = in.candidates() - sure;
      auto* part = &in.k(in.layer, 0);  // [kv_head] is contiguous
      apportion(static_cast<offset_t>(base - sure) * n, counts, room, n, part, remainder);
      for (index_t h = 0; h < n; ++h) set(h, part[h] + sure);
    }
  };
};

}  // namespace kvkeep
