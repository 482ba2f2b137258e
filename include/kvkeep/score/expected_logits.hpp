// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// Logits that are linear and quadratic in a key, and their softmax over slots.
#pragma once

#include <cfloat>
#include <cmath>

#include "query_moments.hpp"

namespace kvkeep::detail {
inline namespace KVKEEP_CPU_ISA {  // of the CPU backend's functors

/// Infinity, in device code too.
KVKEEP_HD inline float infinite() noexcept { return bit_copy<float>(0x7f800000); }

/// Logits are linear and quadratic in a key: per query head dim rows of the quadratic form, then the linear one, each
/// padded with zeros. The quadratic form is symmetric: of two entries across its diagonal blocks of `width` features
/// one counts for both, and the other one is not read.
template <class Space>
struct logit_form {
  /// Features whose sums are under way at a time: on the host some vectors, on a device a few registers.
  static constexpr index_t width = std::is_same_v<Space, host_space> ? 32 : 8;

  moment_plan plan;
  index_t q_heads = 1;
  float* data = nullptr;  ///< [entry, q_head, rows(), padded]

  KVKEEP_HD index_t padded() const noexcept { return (plan.dim + width - 1) / width * width; }
  KVKEEP_HD index_t rows() const noexcept { return plan.spreads ? plan.dim + 1 : 1; }
  KVKEEP_HD float* row(index_t entry, index_t head, index_t d) const noexcept {
    offset_t const at = static_cast<offset_t>(entry) * q_heads + head;
    return data + (at * rows() + d) * padded();
  }
};

/// Turns moments to the positions to come and scales them; index: (head * rows + row) * padded + column, head of all
/// entries.
template <class Space>
struct fill_form {
  logit_form<Space> form;
  batch_ref<Space> batch;
  tensor_ref<float, 3, Space> gathered;  ///< [id, kv_head, floats]
  index_t const* seen;                   ///< [id]
  rope_pairs rope;
  float const* turns;  ///< [entry, pair, 2]
  float scale;         ///< of logits

  KVKEEP_HD void operator()(index_t i) const noexcept {
    moment_plan const& m = form.plan;
    index_t const e = i % form.padded(), d = i / form.padded() % form.rows();
    index_t const at = i / form.padded() / form.rows(), head = at % form.q_heads;
    index_t const entry = at / form.q_heads, g = head % m.group, id = batch.id_of(entry);
    float* const s = gathered.at(id, head / m.group);
    float sum = 0;
    if (e < m.dim && seen[id] > 0 && s[0] > 0) {
      if (d + 1 == form.rows())
        sum = scale * turned(entry, e, [&](index_t b) { return m.mean(s, g)[b]; });
      else
        sum = factor(d, e) * scale * scale / (2 * s[0]) * turned(entry, d, [&](index_t a) {
                return turned(entry, e, [&](index_t b) {
                  return a > b ? m.spread(s, g, a)[b] : m.spread(s, g, b)[a];
                });
              });
    }
    form.row(entry, head, d)[e] = sum;
  }

 private:
  KVKEEP_HD static float factor(index_t row, index_t column) noexcept {
    index_t const block = column / logit_form<Space>::width * logit_form<Space>::width;
    return row < block ? 2.0F : 1.0F;
  }
  /// Feature d of R x, R the mean rotation.
  template <class X>
  KVKEEP_HD float turned(index_t entry, index_t d, X const& x) const noexcept {
    if (d >= rope.dims) return x(d);
    offset_t const at = static_cast<offset_t>(entry) * rope.pairs() + rope.pair_of(d);
    float const c = turns[2 * at], other = turns[2 * at + 1] * x(rope.partner(d));
    return c * x(d) + (rope.first(d) ? -other : other);
  }
};

/// A key's logits for the query heads of its group, written to `[entry, q_head, slot]`; what it returns is of no
/// account.
template <class Space>
struct expected_logits {
  static constexpr bool reads_k = true;
  static constexpr bool reads_v = false;

  logit_form<Space> form;
  tensor_ref<float, 3, Space> out;
  index_t first;  ///< tokens before take no part

  KVKEEP_HD float operator()(slot_values const& s) const noexcept {
    for (index_t g = 0; g < form.plan.group; ++g) {
      index_t const head = s.head * form.plan.group + g;
      out(s.entry, head, s.slot) =
          s.position < first ? -infinite() : logit(s.k, form.row(s.entry, head, 0));
    }
    return 0;
  }

 private:
  /// @param row  of a query head's form, the first one
  KVKEEP_HD float logit(float const* key, float const* row) const noexcept {
    constexpr index_t width = logit_form<Space>::width;
    index_t const dim = form.plan.dim, padded = form.padded();
    float const* const linear = row + static_cast<offset_t>(form.rows() - 1) * padded;
    float sum = 0;
    for (index_t d = 0; d < dim; d += width) {
      float part[width];
      for (index_t k = 0; k < width; ++k) part[k] = linear[d + k];
      index_t const end = !form.plan.spreads ? 0 : d + width < dim ? d + width : dim;
      float const* at = row + d;
      for (index_t e = 0; e < end; ++e, at += padded) {
        float const x = key[e];
        for (index_t k = 0; k < width; ++k) part[k] += at[k] * x;
      }
      for (index_t k = 0; k < width; ++k)
        if (d + k < dim) sum += key[d + k] * part[k];
    }
    return sum > -FLT_MAX ? (sum < FLT_MAX ? sum : FLT_MAX) : -FLT_MAX;  // as any logit: also NaN
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
