// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// CAKE's score: mean and variance of a slot's attention weights over the last W queries of the prompt, and
/// how widely a layer's attention spreads over slots and over time.
#pragma once

#include "scorer.hpp"

namespace kvkeep {
namespace detail {
inline namespace KVKEEP_CPU_ISA {  // of the CPU backend's functors

/// What the steps of `spread_score` share. Moments are those of op::column_moments.
template <class Space>
struct spread_steps {
  static constexpr index_t part = 256;  ///< slots that are summed at a time

  slot_state<Space> slots;
  batch_ref<Space> batch;
  index_t const* seen;  ///< [id]
  index_t const* from;  ///< [id] oldest query that is known
  tensor_ref<float const, 4, Space> moments;
  index_t window;
  double* parts = nullptr;  ///< [entry, kv_head, part, 2] entropy, variance

  KVKEEP_HD index_t heads() const noexcept { return moments.extent[1]; }
  KVKEEP_HD index_t group() const noexcept {
    return moments.extent[2] / op::column_moments<Space>::moments;
  }
  KVKEEP_HD index_t n_parts() const noexcept { return (moments.extent[3] + part - 1) / part; }
  /// Whether a slot is in use, and older than the window.
  KVKEEP_HD bool old(index_t entry, index_t head, index_t slot) const noexcept {
    index_t const id = batch.id_of(entry);
    return slot < slots.lengths(id, head) && slots.positions(id, head, slot) < seen[id] - window;
  }
  KVKEEP_HD float moment(index_t m, index_t entry, index_t head, index_t g,
                         index_t slot) const noexcept {
    return moments(entry, head, m * group() + g, slot);
  }
  /// Rows of the window that are known: behind a shared prefix there may be fewer.
  KVKEEP_HD index_t rows(index_t entry) const noexcept {
    index_t const id = batch.id_of(entry), oldest = from[id] > 0 ? from[id] : 0;
    return seen[id] - oldest < window ? seen[id] - oldest : window;
  }
  /// Unbiased, over the rows.
  KVKEEP_HD float variance(index_t entry, index_t head, index_t g, index_t slot) const noexcept {
    index_t const n = rows(entry);
    return n > 1 ? moment(1, entry, head, g, slot) / static_cast<float>(n - 1) : 0.0F;
  }
};

/// Mean over the group of mean + gamma * variance; index: (entry * kv_heads + head) * slots + slot.
template <class Space>
struct spread_scores {
  spread_steps<Space> s;
  score_map<Space> out;
  float gamma;

  KVKEEP_HD void operator()(index_t i) const noexcept {
    index_t const n = s.moments.extent[3], slot = i % n, head = i / n % s.heads();
    index_t const entry = i / n / s.heads();
    if (slot >= s.slots.lengths(s.batch.id_of(entry), head)) return;
    float sum = 0;
    for (index_t g = 0; g < s.group(); ++g)
      sum += s.moment(0, entry, head, g, slot) + gamma * s.variance(entry, head, g, slot);
    out(entry, head, slot) = sum / static_cast<float>(s.group());
  }
};

/// Index: (entry * kv_heads + head) * parts + part.
template <class Space>
struct sum_spread_parts {
  spread_steps<Space> s;

  KVKEEP_HD void operator()(index_t i) const noexcept {
    index_t const first = i % s.n_parts() * s.part, head = i / s.n_parts() % s.heads();
    index_t const entry = i / s.n_parts() / s.heads(), n = s.moments.extent[3];
    index_t const end = first + s.part < n ? first + s.part : n;
    double entropy = 0, variance = 0;
    for (index_t j = first; j < end; ++j) {
      if (!s.old(entry, head, j)) continue;
      for (index_t g = 0; g < s.group(); ++g) {
        entropy += static_cast<double>(s.moment(2, entry, head, g, j));
        variance += static_cast<double>(s.variance(entry, head, g, j));
      }
    }
    s.parts[2 * i] = entropy;
    s.parts[2 * i + 1] = variance;
  }
};

/// Index: entry * kv_heads + head.
template <class Space>
struct sum_spread {
  spread_steps<Space> s;
  tensor_ref<float, 3, Space> out;  ///< [entry, kv_head, 2]

  KVKEEP_HD void operator()(index_t i) const noexcept {
    double const* const p = s.parts + static_cast<offset_t>(i) * s.n_parts() * 2;
    double sum[2] = {};
    for (index_t k = 0; k < s.n_parts(); ++k)
      for (int x = 0; x < 2; ++x) sum[x] += p[2 * k + x];
    for (index_t x = 0; x < 2; ++x)
      out(i / s.heads(), i % s.heads(), x) = static_cast<float>(sum[x]);
  }
};

}  // namespace KVKEEP_CPU_ISA
}  // namespace detail

/// Spec 5.5; arXiv 2503.12491, antgroup/cakekv modify_llama.py. Softmax over all columns, as SnapKV's. A slot's score
/// is the mean over the window's rows plus `gamma` times the unbiased variance over them, per query head; the mean over
/// the group, pooled over neighbours. Where the session asks (`score_input::spread`), also the entropies and the
/// variances of columns older than the window, summed.
/// Deviations: fp32 weights, never rounded to 16 bit; logarithms of 1e-10 at least, which the published code adds; ties
/// by position.
/// Cost: op::column_moments, 12 bytes of scratch per slot and query head.
struct spread_score : scorer_base {
  index_t window = 32;  ///< W query rows, at least 2
  index_t kernel = 5;   ///< of an average over neighbours, odd
  float gamma = 200;    ///< >= 0

  scorer_traits traits() const {
    scorer_traits t;
    t.name = "spread";
    t.at_decode = false;
    t.prompt = evidence::window_queries;
    t.gives_spread = true;
    return t;
  }
  void check(cache_shape const&) const {
    KVKEEP_EXPECTS(window >= 2, "window", window, ">= 2, for a variance");
    KVKEEP_EXPECTS(kernel >= 1 && kernel % 2 == 1, "kernel", kernel, "an odd number >= 1");
    KVKEEP_EXPECTS(gamma >= 0 && gamma <= 1e9F, "gamma", gamma, "0..1e9");
  }
  state_spec state(cache_shape const&) const { return {0, window, 0}; }
  std::uint64_t key() const { return config_key(window, kernel, gamma); }

  template <class Ctx>
  status score(Ctx& ctx, score_input<space_of<Ctx>> const& in, score_map<space_of<Ctx>> out,
               workspace& ws) const {
    using space = space_of<Ctx>;
    auto const& shape = in.layer.kv.shape;
    index_t const n = in.batch.n, heads = shape.n_kv_heads, slots = shape.max_slots;
    if (product(n, heads, slots) >= std::size_t{1} << 31) return status::unsupported;
    query_rows<space> q;
    KVKEEP_TRY(last_queries(ctx, in, window, q, ws));
    op::column_moments<space> sums{in.batch, in.layer, q};
    index_t const rows = sums.moments * shape.group();
    sums.out =
        row_major<space>(ws.take<float>(product(n, heads, rows, slots)), n, heads, rows, slots);
    detail::spread_steps<space> steps{in.layer.slots, in.batch, in.seen,
                                      in.ring_from,   sums.out, window};
    steps.parts = ws.take<double>(product(n, heads, steps.n_parts(), 2));
    KVKEEP_TRY(run(ctx, sums, ws));
    if (!ws.measuring()) {
      if (!ws.ok()) return status::workspace_too_small;
      KVKEEP_TRY(detail::run_each(ctx, n * heads * slots,
                                  detail::spread_scores<space>{steps, out, gamma}, ws));
      if (in.spread.data != nullptr) {
        detail::sum_spread_parts<space> const parts{steps};
        KVKEEP_TRY(detail::run_each(ctx, n * heads * steps.n_parts(), parts, ws));
        detail::sum_spread<space> const all{steps, in.spread};
        KVKEEP_TRY(detail::run_each(ctx, n * heads, all, ws));
      }
    }
    return run(ctx,
               op::pool_rows<space>{in.batch, in.layer.slots, in.guard.recent, op::pooling::average,
                                    kernel, as_rows(out)},
               ws);
  }
};

}  // namespace kvkeep
