// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// How rows and columns enter the state of MorphKV's lazy evaluation.
#pragma once

#include "lazy_head.cuh"
#include "stages.cuh"
#include "sums.cuh"

namespace kvkeep::cuda {

/// Cost: as the op says; the state is made anew at 2 * dim_k operations per slot and row on one multiprocessor.
struct lazy_enter_stage {
  static constexpr int most_threads = lazy_threads, threads_per_sm = lazy_threads;
  op::lazy_enter<device_space> o;
  float* weights;   ///< [head][group][n_slots], to make the state anew
  index_t n_slots;  ///< most slots of a head

  std::size_t shared_bytes() const {
    lazy_shape const& s = o.state.shape;
    return sum_box::bytes(row_sums::size(s.group)) +
           row_weights_box::bytes(o.layer.kv.k.dim, s.group) +
           shared_pieces::bytes<float>(s.group) +
           shared_pieces::bytes<float>(lazy_shape::ahead * s.padded_rows()) +
           shared_pieces::bytes<int>(2 * warp_size);
  }

  __device__ void operator()(block_head const& at) const {
    shared_pieces shared;
    lazy_shape const& s = o.state.shape;
    boxes const b{{sum_box(shared, row_sums::size(s.group))},
                  row_weights_box(shared, o.layer.kv.k.dim, s.group, weights, n_slots, at.place),
                  shared.take<float>(s.group)};
    float* const factors = shared.take<float>(lazy_shape::ahead * s.padded_rows());
    int* const box = shared.take<int>(2 * warp_size);
    lazy_job const job(o, at);
    lazy_head const& head = job.head;
    if (o.keep.data != nullptr && job.n <= o.keep(job.id, job.h)) {
      if (thread_of_block() == 0) head.set_newest(-1);
      return;
    }
    index_t const before = head.newest(), old_before = head.old();
    bool const next = !o.anew && before >= 0 && before == job.newest - 1;
    token_row const row = next ? newest_row(at, job) : token_row{};
    age_counts ages;
    if (next)  // most likely it follows: its sums come along
      b.sums.add_up(job, job.newest, row, ages);
    else
      for (index_t j = thread_of_block(); j < job.n; j += threads_of_block())
        ages.look(job, job.positions[j]);
    index_t const n_old = ages.n_old(job, box);
    if (!o.anew && n_old >= 0 && before == job.newest && old_before == n_old) return;
    bool const follows = next && old_before + (job.oldest_recent() >= 1 ? 1 : 0) == n_old;
    if (thread_of_block() == 0) {  // there have been barriers: all have read
      head.set_newest(n_old < 0 ? -1 : job.newest);
      head.set_old(n_old);
    }
    if (n_old < 0 || job.newest < 0) return;
    bound_source const bounds = bounds_of(job, o.state.rows, factors);
    if (follows && (n_old == 0 || b.sums.sound(s.group)))
      enter_row(job, job.newest, row, b, bounds.codes);
    else
      enter_anew(job, follows ? job.newest : job.first, b, bounds.codes);
    __syncthreads();
    bound_factors<lazy_shape::ahead>(job, follows, factors);
    __syncthreads();
    with_fold(o.fuse, [&](auto const& fold) { prepare(job, bounds, follows, fold); });
  }

 private:
  /// Weights of one token's row.
  struct token_row {
    float const* e = nullptr;  ///< [group] rows of n slots
    offset_t stride = 0;
    float const* maximum = nullptr;  ///< [group]
    offset_t maximum_stride = 0;
  };
  /// As attention has left them.
  __device__ token_row newest_row(block_head const& at, lazy_job const& job) const {
    index_t const ring_row = o.ring_row != nullptr ? o.ring_row[at.entry] : 0;
    return {o.weights.at(job.id, job.h, 0, 0) + ring_row * o.ring_stride, o.weights.stride[2],
            o.weight_max.at(job.id, job.h, 0, ring_row), o.weight_max.stride[2]};
  }

  /// Sums of a row over the old slots, and over the window's columns that will be old before the row is gone:
  /// those count for its reference sum, the sum at the end of its life, evictions aside. Four query heads at a
  /// time: their sums over old slots, then those over columns.
  struct row_sums {
    static constexpr index_t heads = sum_box::at_once / 2;
    sum_box box;

    KVKEEP_HD static constexpr index_t size(index_t group) {
      return (group + heads - 1) / heads * sum_box::at_once;
    }
    __device__ double old(index_t g) const {
      return box.sums[g / heads * sum_box::at_once + g % heads];
    }
    __device__ double aging(index_t g) const {
      return box.sums[g / heads * sum_box::at_once + heads + g % heads];
    }
    /// Whether no row is dominated by the window.
    __device__ bool sound(index_t group) const {
      constexpr double least_sum = 1e-13;
      bool sound = true;
      for (index_t g = 0; g < group; ++g) sound = sound && old(g) >= least_sum;
      return sound;
    }
    /// @param ages  also receives the ages of the slots
    __device__ void add_up(lazy_job const& job, index_t position, token_row const& row,
                           age_counts& ages) const {
      lazy_shape const& s = job.head.shape();
      open_range const old = job.old(), recent = job.recent();
      for (index_t first = 0; first < s.group; first += heads)
        sum_slots<sum_box::at_once>(
            job.n, box, size(first), [&](index_t j, double(&x)[sum_box::at_once]) {
              float e[heads];
              unrolled<heads>(
                  [&](int i) { e[i] = row.e[min(first + i, s.group - 1) * row.stride + j]; });
              index_t const p = job.positions[j];
              if (first == 0) ages.look(job, p);
              bool const counts = old.has(p);
              bool const later = recent.has(p) && p + s.window < position + s.n_rows;
              unrolled<heads>([&](int i) {
                x[i] += static_cast<double>(counts ? e[i] : 0.0f);
                x[heads + i] += static_cast<double>(later ? e[i] : 0.0f);
              });
            });
    }
  };
  struct boxes {
    row_sums sums;
    row_weights_box made;
    float* inverse;  ///< [group]
  };

  /// Rows from position `first` on enter, made of queries and keys.
  __device__ static void enter_anew(lazy_job const& job, index_t first, boxes const& b,
                                    code_rows const& codes) {
    for (index_t p = first; p <= job.newest; ++p) {
      weigh_row(job, p, job.old(), b.made);
      token_row const made{b.made.e, b.made.stride, b.made.maximum, 1};
      age_counts ages;
      b.sums.add_up(job, p, made, ages);
      enter_row(job, p, made, b, codes);
    }
  }

  /// A row enters, its sums at hand.
  __device__ static void enter_row(lazy_job const& job, index_t position, token_row const& row,
                                   boxes const& b, code_rows const& codes) {
    lazy_head const& head = job.head;
    lazy_shape const& s = head.shape();
    for (index_t g = thread_of_block(); g < s.group; g += threads_of_block()) {
      index_t const i = head.row(g, position);
      double const sum = b.sums.old(g), reference = sum + b.sums.aging(g);
      head.set_sum(i, sum);
      head.peak(i) = static_cast<float>(sum);
      head.maximum(i) = row.maximum[g * row.maximum_stride];
      head.inverse(i) = b.inverse[g] =
          reference > 1e-30 && reference < 1e30 ? static_cast<float>(1 / reference) : 1.0f;
    }
    __syncthreads();
    open_range const recent = job.recent();
    index_t const code = position % s.n_rows;
    for (index_t j = thread_of_block(); j < job.n; j += threads_of_block()) {
      unsigned const word = codes.word(code / 2, j);
      index_t const p = job.positions[j];
      float* const column = recent.has(p) ? head.column(p) + head.row(0, position) : nullptr;
      float top = 0;
      each_query_head(
          s.group, [&](index_t g) { return row.e[g * row.stride + j]; },
          [&](index_t g, float x) {
            if (column != nullptr) column[g * s.padded_rows()] = x;
            top = max(top, __fmul_rn(x, b.inverse[g]));
          });
      codes.set_word(code / 2, j, code_rows::with(word, code, min(top, largest_code)));
    }
  }

  /// Bounds of the tiles that are due, or of all. A thread per slot.
  template <class Fold>
  __device__ static void prepare(lazy_job const& job, bound_source const& bounds, bool follows,
                                 Fold const& fold) {
    constexpr index_t tile = lazy_shape::tile, ahead = lazy_shape::ahead;
    index_t const step = follows ? ahead : 1;
    index_t const first = follows ? (ahead - job.newest % ahead) % ahead : 0;
    for (index_t i = thread_of_block();; i += threads_of_block()) {
      index_t const t = first + i / tile * step, j = t * tile + i % tile;
      if (t * tile >= job.n) break;
      if (j < job.n) prepare_bounds(bounds, job.phase_of(j), j, fold);
    }
  }
};

}  // namespace kvkeep::cuda
