// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// CPU: one KV head of MorphKV's lazy evaluation: what its state means, and how rows and columns enter.
#pragma once

#include <bit>
#include <cmath>

#include "../../op/lazy_rows.hpp"
#include "guard.hpp"
#include "kernels/fused_rows.hpp"
#include "kernels/lazy_codes.hpp"
#include "rows.hpp"

namespace kvkeep::cpu {
inline namespace KVKEEP_CPU_ISA {

/// The state of one sequence and KV head. Rows are numbered i = g * padded + position % n_rows.
class lazy_head {
 public:
  lazy_head(lazy_shape const& shape, float* base) noexcept : shape_(shape), base_(base) {}

  lazy_shape const& shape() const noexcept { return shape_; }
  index_t row(index_t g, index_t position) const noexcept {
    return g * shape_.padded_rows() + position % shape_.n_rows;
  }
  /// Sum over the old slots of exp(z - maximum(i)).
  double sum(index_t i) const noexcept {
    double x;
    std::memcpy(&x, base_ + 2 * static_cast<offset_t>(i), sizeof x);
    return x;
  }
  void set_sum(index_t i, double x) const noexcept {
    std::memcpy(base_ + 2 * static_cast<offset_t>(i), &x, sizeof x);
  }
  float& peak(index_t i) const noexcept { return at(2, i); }     ///< largest sum so far
  float& maximum(index_t i) const noexcept { return at(3, i); }  ///< of the row's logits, when new
  float& inverse(index_t i) const noexcept { return at(4, i); }  ///< 1 / Zref
  /// Weights of all rows at the column of this position, one of the W newest.
  float* column(index_t position) const noexcept { return &at(5 + position % shape_.window, 0); }

  /// The newest token that has entered, the old slots counted then (less a victim), and for how many
  /// steps the direct form decides.
  index_t newest() const noexcept { return number(0) - 1; }
  index_t old() const noexcept { return number(1); }
  index_t rest() const noexcept { return number(2); }
  void set_newest(index_t position) const noexcept { set_number(0, position + 1); }
  void set_old(index_t n) const noexcept { set_number(1, n); }
  void set_rest(index_t n) const noexcept { set_number(2, n); }

 private:
  float& at(index_t list, index_t i) const noexcept {
    return base_[static_cast<offset_t>(list) * shape_.all_rows() + i];
  }
  float* numbers() const noexcept { return &at(5 + shape_.window, 0); }
  index_t number(int i) const noexcept { return bit_copy<index_t>(numbers()[i]); }
  void set_number(int i, index_t n) const noexcept { numbers()[i] = bit_copy<float>(n); }

  lazy_shape shape_;
  float* base_;
};

/// One head's slots and rows at one step.
struct lazy_job {
  lazy_head head;
  head_rows k;
  index_t const* positions = nullptr;  ///< [n]
  index_t n = 0;                       ///< slots in use
  index_t newest = 0;                  ///< position of the newest token
  index_t first = 0;                   ///< position of the oldest row there is
  std::int32_t* old = nullptr;         ///< [n] -1 for old slots, else 0
  index_t n_old = 0;                   ///< how many
  logit_form form{};
  tensor_ref<float const, 4> ring_q{};
  index_t id = 0;
  index_t h = 0;

  index_t oldest_recent() const noexcept { return newest - head.shape().window + 1; }
  open_range recent() const noexcept { return {std::max(0, oldest_recent()), newest + 1}; }
  /// Calls f(i, g, ring row) for all rows up to position `last`, head after head, positions ascending.
  template <class F>
  void each_row(index_t last, F const& f) const noexcept {
    lazy_shape const& s = head.shape();
    index_t const ring = ring_q.extent[2];
    for (index_t g = 0; g < s.group; ++g) {
      index_t r = first % s.n_rows, at = first % ring;  // counted on: dividing for each is slow
      for (index_t p = first; p <= last; ++p) {
        f(g * s.padded_rows() + r, g, at);
        if (++r == s.n_rows) r = 0;
        if (++at == ring) at = 0;
      }
    }
  }
  float const* query(index_t g, index_t position) const noexcept {
    return ring_q.at(id, h * head.shape().group + g, position % ring_q.extent[2], 0);
  }
};

/// The parts of a layer's op that a head needs.
template <class Op>
lazy_job make_job(Op const& o, index_t b, index_t h) noexcept {
  index_t const id = o.batch.id_of(b);
  lazy_job job{lazy_head(o.state.shape, o.state.head.at(id, h, 0)),
               {&o.layer.kv.k, o.batch.row_of(b), h}};
  job.positions = o.layer.slots.positions.at(id, h, 0);
  job.n = o.layer.slots.lengths(id, h);
  job.newest = o.state.seen[id] - 1;
  job.first = std::max({0, o.state.from[id], job.newest - o.state.shape.n_rows + 1});
  job.form = form_of(o.layer.kv);
  job.ring_q = o.state.ring_q;
  job.id = id;
  job.h = h;
  return job;
}

/// Marks old slots. @return how many, or -1 where the newest tokens are not all there: then positions do
/// not tell which slots are old, and the lazy evaluation does not apply
inline index_t mark_old(lazy_job const& job) noexcept {
  open_range const old{0, std::max(0, job.oldest_recent())};
  write_open(old, job.positions, job.n, job.old);
  index_t const n_recent = count_open(job.recent(), job.positions, job.n);
  return n_recent == std::min(job.head.shape().window, job.newest + 1)
             ? count_open(old, job.positions, job.n)
             : -1;
}

/// Sum of weights over the old slots: fp32 by 64 slots, then double.
inline double old_sum(lazy_job const& job, float const* e) noexcept {
  double sum = 0;
  for (index_t j = 0; j < job.n; j += 64)
    sum += static_cast<double>(slot_block_sum(e + j, job.old + j, std::min(64, job.n - j)));
  return sum;
}

/// Weights of one token's row.
struct lazy_row {
  index_t position = 0;
  float const* e = nullptr;  ///< [group] rows of n slots
  offset_t stride = 0;
  float const* maximum = nullptr;  ///< [group]
  offset_t maximum_stride = 0;
};

/// A row enters. @param inverse [group] scratch
inline void enter_row(lazy_job const& job, lazy_row const& row, code_rows const& codes,
                      float* inverse) noexcept {
  lazy_head const& head = job.head;
  lazy_shape const& s = head.shape();
  std::fill_n(inverse, s.group, 0.0F);
  // The window's columns, wherever they lie. Those that will be old before the row is gone count for its
  // reference sum: the sum at the end of its life, evictions aside.
  open_range const recent = job.recent();
  for (index_t j = 0; j < job.n; j += lanes)
    for (unsigned bits = open_bits(recent, job.positions + j, job.n - j); bits != 0;
         bits &= bits - 1) {
      index_t const slot = j + std::countr_zero(bits), position = job.positions[slot];
      float* const column = head.column(position);
      bool const ages = position + s.window < row.position + s.n_rows;
      for (index_t g = 0; g < s.group; ++g) {
        float const x = row.e[g * row.stride + slot];
        column[head.row(g, row.position)] = x;
        if (ages) inverse[g] += x;
      }
    }
  for (index_t g = 0; g < s.group; ++g) {
    index_t const i = head.row(g, row.position);
    double const sum = old_sum(job, row.e + g * row.stride);
    double const reference = sum + static_cast<double>(inverse[g]);
    head.set_sum(i, sum);
    head.peak(i) = static_cast<float>(sum);
    head.maximum(i) = row.maximum[g * row.maximum_stride];
    head.inverse(i) = inverse[g] =
        reference > 1e-30 && reference < 1e30 ? static_cast<float>(1 / reference) : 1.0F;
  }
  put_row_codes(row.e, row.stride, inverse, s.group, job.n, row.position % s.n_rows, codes);
}

/// The column that has just become old joins the sums of the rows before the newest.
inline void enter_column(lazy_job const& job) noexcept {
  lazy_head const& head = job.head;
  if (job.oldest_recent() < 1) return;
  float const* const column = head.column(job.oldest_recent() - 1);
  job.each_row(job.newest - 1, [&](index_t i, index_t, index_t) {
    double const sum = head.sum(i) + static_cast<double>(column[i]);
    head.set_sum(i, sum);
    head.peak(i) = std::max(head.peak(i), static_cast<float>(sum));
  });
}

/// factors[k][row] = min over g of Zref / (an upper bound of Z in k < `steps` steps): columns that enter
/// until then are known, evictions only lower Z. 0 for rows that are absent or will be gone.
/// @param factors [steps][padded]  @param ratio [all_rows + padded] scratch
inline void bound_factors(lazy_job const& job, index_t steps, float* factors,
                          float* ratio) noexcept {
  lazy_head const& head = job.head;
  lazy_shape const& s = head.shape();
  index_t const padded = s.padded_rows();
  float* const age = ratio + s.all_rows();
  std::fill_n(age, padded, static_cast<float>(s.n_rows));  // never alive
  index_t row = job.newest % s.n_rows;
  for (index_t p = job.newest; p >= job.first; --p, row = row > 0 ? row - 1 : s.n_rows - 1)
    age[row] = static_cast<float>(job.newest - p);
  for (index_t i = 0; i < s.all_rows(); ++i)
    ratio[i] = static_cast<float>(head.sum(i)) * head.inverse(i);
  for (index_t k = 0; k < steps; ++k) {
    index_t const entering = job.newest + k - s.window;
    float const* const column = k > 0 && entering >= 0 ? head.column(entering) : nullptr;
    vf const last = splat(static_cast<float>(s.n_rows - 1 - k));
    for (index_t r = 0; r < padded; r += lanes) {
      vf most = splat(1e-30F);
      for (index_t i = r; i < s.all_rows(); i += padded) {
        vf x = load(ratio + i);
        if (column != nullptr) x = fma(load(column + i), load(&head.inverse(i)), x);
        store(ratio + i, x);
        most = max(most, x);
      }
      vf const factor = splat(1.0F - bound_slack / 2) / most;
      store(factors + k * padded + r, select(at_least(last, load(age + r)), factor, splat(0.0F)));
    }
  }
}

}  // namespace KVKEEP_CPU_ISA
}  // namespace kvkeep::cpu
