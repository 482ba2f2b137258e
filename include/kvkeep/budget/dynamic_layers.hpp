// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// DynamicKV: layers share one total, split by how many of the globally best scores they hold.
#pragma once

#include <cmath>
#include <string>

#include "../op/layer_counts.hpp"
#include "apportion.hpp"
#include "budget.hpp"

namespace kvkeep {

/// The published integer and float arithmetic of DreamMr/DynamicKV dynamic_v11.py (spec 5.2 steps 2 to 4),
/// window excluded, after layers [0, n) of `n_layers`.
/// @param[in,out] budget [n] in: entries of each layer in the global top; out: its budget
KVKEEP_HD inline void published_dynamic_budgets(offset_t* budget, index_t n, index_t n_layers,
                                                index_t n_heads, index_t base, index_t cap,
                                                offset_t scores_per_layer) noexcept {
  offset_t sum = 0;
  for (index_t i = 0; i < n; ++i) sum += budget[i] /= n;
  if (n == n_layers && sum != scores_per_layer) {
    offset_t const rest = static_cast<offset_t>(base) * n_heads * n / n_layers - sum;
    budget[n - 1] += rest;
    sum += rest;
  }
  if (sum == 0) return;  // the published code divides by zero here
  offset_t total = 0;
  for (index_t i = 0; i < n; ++i) {
    float const share = static_cast<float>(budget[i]) / static_cast<float>(sum);
    total += budget[i] = static_cast<offset_t>(static_cast<float>(cap) * share);
  }
  if (total == 0) return;  // and here: every share of `cap` is below one
  offset_t const need = static_cast<offset_t>(base) * n_layers;
  double const ratio = static_cast<double>(total) / static_cast<double>(need);
  offset_t given = 0;
  for (index_t i = 0; i < n; ++i) {
    // Python's float floor division: exact remainder first, then a quotient rounded to an integer.
    double const x = static_cast<double>(budget[i]);
    double const quotient = (x - std::fmod(x, ratio)) / ratio;
    double const floor = std::floor(quotient);
    budget[i] = static_cast<offset_t>(quotient - floor > 0.5 ? floor + 1 : floor);
    given += budget[i];
  }
  budget[n - 1] += need - given;
}

/// Spec 5.2; arXiv 2412.14838, DreamMr/DynamicKV dynamic_v11.py.
/// Deviations (canonical): KV-head granularity; integers only; exact total; a budget never grows again;
/// every layer keeps at least r_min; checkpoints after every `every` layers and after the last.
/// `published = true` takes the reference's arithmetic at its checkpoints instead (never above what a
/// layer still holds; the duplicated window is not imitated).
/// State: the prompt's scores of all layers, 4 * n_kv_heads * n_layers * T bytes. Until a checkpoint a
/// layer holds up to r_max * (C - W) tokens besides the protected ones.
struct dynamic_layers {
  index_t tokens = 1024;  ///< C, the mean over layers, protected tokens included
  double r_max = 10;      ///< a layer holds at most r_max * (C - W)
  double r_min = 0.1;     ///< and at least r_min * (C - W)
  index_t every = 4;      ///< layers between checkpoints
  bool published = false;

  budget_traits traits() const {
    budget_traits t{"dynamic_layers"};
    t.varies_over_layers = t.needs_scores = t.couples_layers = true;
    return t;
  }
  std::uint64_t key() const { return config_key(tokens, r_max, r_min, every, published); }
  index_t capacity() const { return tokens; }
  index_t most(index_t, cache_shape const&, index_t protect, index_t prompt) const {
    return prompt < tokens ? tokens : cap(tokens - protect, prompt - protect) + protect;
  }
  layer_range due(index_t layer, index_t n_layers) const {
    return {checkpoint(layer, n_layers) ? 0 : layer, layer + 1};
  }
  void check(index_t, cache_shape const&, index_t protect) const {
    KVKEEP_EXPECTS(tokens > protect, "capacity", tokens,
                   "> sinks + window = " + std::to_string(protect));
    KVKEEP_EXPECTS(r_max >= 1 && r_max <= 1e6, "r_max", r_max, "1..1e6");
    KVKEEP_EXPECTS(r_min >= 0 && r_min <= 1, "r_min", r_min, "0..1");
    KVKEEP_EXPECTS(every >= 1, "every", every, ">= 1");
  }

  template <class Ctx>
  status allocate(Ctx& ctx, budget_input<space_of<Ctx>> const& in, workspace& ws) const {
    using space = space_of<Ctx>;
    index_t const base = tokens - in.protect();
    KVKEEP_TRY(
        detail::fill_layer(ctx, in, in.layer, cap(base, in.candidates()) + in.protect(), ws));
    index_t const n = in.layer + 1;
    index_t* counts = ws.take<index_t>(product(n, in.n_kv_heads));
    index_t* candidates = ws.take<index_t>(static_cast<std::size_t>(in.n_kv_heads));
    auto* scratch = ws.take<offset_t>(product(n, 3));
    if (!ws.measuring()) {
      if (!ws.ok()) return status::workspace_too_small;
      if (!checkpoint(in.layer, in.n_layers)) return status::ok;
      KVKEEP_TRY(run(
          ctx,
          op::for_each<fill, space>{in.n_kv_heads, fill{candidates, in.sinks + in.candidates()}},
          ws));
    }
    op::layer_counts<space> count;
    count.batch.n = 1;
    count.n_maps = n;
    count.scores = in.scores;
    count.candidates = row_major<space>(static_cast<index_t const*>(candidates), 1, in.n_kv_heads);
    count.skip = in.sinks;
    count.best_per_head = base;
    count.out = row_major<space>(counts, n, 1, in.n_kv_heads);
    KVKEEP_TRY(run(ctx, count, ws));
    if (ws.measuring()) return status::ok;
    using split = split_layers<dynamic_layers, space>;
    return run(ctx, op::for_each<split, space>{1, split{*this, in, counts, scratch}}, ws);
  }

 private:
  bool checkpoint(index_t layer, index_t n_layers) const {
    return (layer + 1) % every == 0 || (layer + 1 == n_layers && !published);
  }
  KVKEEP_HD index_t cap(index_t base, index_t candidates) const noexcept {
    double const most = r_max * base;
    return most < candidates ? static_cast<index_t>(most) : candidates;
  }

 public:
  // Steps that a backend runs; public, because nvcc makes no kernel of a private type.
  struct fill {
    index_t* out;
    index_t value;
    KVKEEP_HD void operator()(index_t i) const noexcept { out[i] = value; }
  };
  template <class Rule, class Space>
  struct split_layers {
    Rule rule;
    budget_input<Space> in;
    index_t const* counts;
    offset_t* scratch;

    KVKEEP_HD void operator()(index_t) const noexcept {
      index_t const n = in.layer + 1;
      index_t const base = rule.tokens - in.protect();
      if (rule.published) return published_split(n, base);
      offset_t* const remainder = scratch;
      auto* const weight = reinterpret_cast<index_t*>(scratch + n);
      index_t* const room = weight + n;
      index_t* const part = room + n;
      index_t* const low = part + n;
      offset_t held_sum = 0, low_sum = 0;
      for (index_t i = 0; i < n; ++i) {
        index_t const held = in.k(i, 0) - in.protect();
        index_t const floor = static_cast<index_t>(rule.r_min * base);
        low[i] = floor < held ? floor : held;
        room[i] = held - low[i];
        weight[i] = 0;
        for (index_t h = 0; h < in.n_kv_heads; ++h) weight[i] += counts[i * in.n_kv_heads + h];
        held_sum += held;
        low_sum += low[i];
      }
      offset_t const all = static_cast<offset_t>(base) * in.n_layers;
      apportion((all < held_sum ? all : held_sum) - low_sum, weight, room, n, part, remainder);
      for (index_t i = 0; i < n; ++i) set(i, low[i] + part[i]);
    }
    KVKEEP_HD void published_split(index_t n, index_t base) const noexcept {
      for (index_t i = 0; i < n; ++i) {
        scratch[i] = 0;
        for (index_t h = 0; h < in.n_kv_heads; ++h) scratch[i] += counts[i * in.n_kv_heads + h];
      }
      published_dynamic_budgets(scratch, n, in.n_layers, in.n_kv_heads, base,
                                rule.cap(base, in.candidates()),
                                static_cast<offset_t>(in.n_kv_heads) * in.candidates());
      for (index_t i = 0; i < n; ++i) {
        offset_t const held = in.k(i, 0) - in.protect();
        offset_t const b = scratch[i] < 0 ? 0 : scratch[i] < held ? scratch[i] : held;
        set(i, static_cast<index_t>(b));
      }
    }
    KVKEEP_HD void set(index_t layer, index_t b) const noexcept {
      for (index_t h = 0; h < in.n_kv_heads; ++h) in.k(layer, h) = b + in.protect();
    }
  };
};

}  // namespace kvkeep
