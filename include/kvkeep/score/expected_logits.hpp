// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// What logits of queries to come are of a key, and their softmax over slots.
#pragma once

#include <cfloat>
#include <cmath>

#include "rope.hpp"

namespace kvkeep::detail {
inline namespace KVKEEP_CPU_ISA {  // of the CPU backend's functors

/// Infinity, in device code too.
KVKEEP_HD inline float infinite() noexcept { return bit_copy<float>(0x7f800000); }

/// Turns moments to the positions to come and scales them, as op::quadratic_logits wants them; index: ((entry * q_heads
/// + head) * dim + feature) * columns + column.
template <class Space>
struct fill_form {
  tensor_ref<float, 4, Space> form;  ///< [entry, q_head, feature, column]
  moment_layout moments;
  batch_ref<Space> batch;
  tensor_ref<float, 3, Space> gathered;  ///< [id, kv_head, floats]
  index_t const* seen;                   ///< [id]
  rope_pairs rope;
  float const* turns;  ///< [entry, pair, 2]
  float scale;         ///< of logits

  KVKEEP_HD void operator()(index_t i) const noexcept {
    index_t const column = i % form.extent[3], d = i / form.extent[3] % moments.dim;
    index_t const at = i / form.extent[3] / moments.dim, head = at % form.extent[1];
    index_t const entry = at / form.extent[1], g = head % moments.group, id = batch.id_of(entry);
    float* const s = gathered.at(id, head / moments.group);
    float& out = form(entry, head, d, column);
    out = 0;
    if (!(seen[id] > 0 && s[0] > 0) || column > 1 + d) return;
    if (column == 0) {
      out = scale * turned(entry, d, [&](index_t b) { return moments.mean(s, g)[b]; });
      return;
    }
    float const sum = turned(entry, d, [&](index_t a) {
      return turned(entry, column - 1, [&](index_t b) {
        return a > b ? moments.spread(s, g, a)[b] : moments.spread(s, g, b)[a];
      });
    });
    // Half of it, and twice off the diagonal.
    out = (column == 1 + d ? 0.5F : 1.0F) * scale * scale / s[0] * sum;
  }

 private:
  /// Feature d of R x, R the mean rotation.
  template <class X>
  KVKEEP_HD float turned(index_t entry, index_t d, X const& x) const noexcept {
    if (d >= rope.dims) return x(d);
    offset_t const at = static_cast<offset_t>(entry) * rope.pairs() + rope.pair_of(d);
    float const c = turns[2 * at], other = turns[2 * at + 1] * x(rope.partner(d));
    return c * x(d) + (rope.first(d) ? -other : other);
  }
};

/// Softmax over slots in two steps, for rows of logits `[entry, q_head, slot]`.
template <class Space>
struct softmax_rows {
  static constexpr index_t part = 256;  ///< slots

  slot_state<Space> slots;
  batch_ref<Space> batch;
  tensor_ref<float, 3, Space> logits;
  float* parts = nullptr;   ///< [entry, q_head, part, 2] largest logit, sum of exponentials less it
  float* totals = nullptr;  ///< [entry, q_head, 2] largest logit, one over the sum

  KVKEEP_HD index_t n_parts() const noexcept { return (logits.extent[2] + part - 1) / part; }
  KVKEEP_HD index_t heads() const noexcept { return logits.extent[1]; }
  KVKEEP_HD index_t length(index_t entry, index_t head) const noexcept {
    return slots.lengths(batch.id_of(entry), head / (heads() / slots.lengths.extent[1]));
  }
};

/// Index: (entry * q_heads + head) * parts + part.
template <class Space>
struct sum_parts {
  softmax_rows<Space> s;

  KVKEEP_HD void operator()(index_t i) const noexcept {
    index_t const first = i % s.n_parts() * s.part, at = i / s.n_parts();
    index_t const entry = at / s.heads(), head = at % s.heads(), n = s.length(entry, head);
    float const* const x = s.logits.at(entry, head, 0);
    index_t const end = first + s.part < n ? first + s.part : n;
    float most = -infinite(), sum = 0;
    for (index_t j = first; j < end; ++j) most = x[j] > most ? x[j] : most;
    if (most >= -FLT_MAX)
      for (index_t j = first; j < end; ++j) sum += std::exp(x[j] - most);
    s.parts[2 * i] = most;
    s.parts[2 * i + 1] = sum;
  }
};

/// Index: entry * q_heads + head.
template <class Space>
struct sum_totals {
  softmax_rows<Space> s;

  KVKEEP_HD void operator()(index_t i) const noexcept {
    float const* const p = s.parts + static_cast<offset_t>(i) * s.n_parts() * 2;
    float most = -FLT_MAX, sum = 0;
    for (index_t k = 0; k < s.n_parts(); ++k) most = p[2 * k] > most ? p[2 * k] : most;
    for (index_t k = 0; k < s.n_parts(); ++k)
      if (p[2 * k + 1] > 0) sum += p[2 * k + 1] * std::exp(p[2 * k] - most);
    s.totals[2 * i] = most;
    s.totals[2 * i + 1] = sum > 0 ? 1 / sum : 0;
  }
};

/// Mean probability of a group, times the norm that `out` holds; index: (entry * kv_heads + head) * slots + slot.
template <class Space>
struct expected_share {
  softmax_rows<Space> s;
  score_map<Space> out;
  index_t first;
  float epsilon;
  bool by_norm;

  KVKEEP_HD void operator()(index_t i) const noexcept {
    index_t const n = s.logits.extent[2], j = i % n, kv_heads = s.slots.lengths.extent[1];
    index_t const head = i / n % kv_heads, entry = i / n / kv_heads, group = s.heads() / kv_heads;
    index_t const id = s.batch.id_of(entry);
    if (j >= s.slots.lengths(id, head)) return;
    float& score = out(entry, head, j);
    if (s.slots.positions(id, head, j) < first) {
      score = infinite();
      return;
    }
    float sum = 0;
    for (index_t g = 0; g < group; ++g) {
      index_t const q_head = head * group + g;
      float const* const t = s.totals + 2 * (static_cast<offset_t>(entry) * s.heads() + q_head);
      sum += std::exp(s.logits(entry, q_head, j) - t[0]) * t[1];
    }
    float const share = sum / static_cast<float>(group);
    score = by_norm ? (share + epsilon) * score : share;
  }
};

}  // namespace KVKEEP_CPU_ISA
}  // namespace kvkeep::detail
