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
  static constexpr int most_threads = 384;
  op::lazy_enter<device_space> o;
  float* weights;   ///< [head][group][n_slots], to make the state anew
  index_t n_slots;  ///< most slots of a head

  std::size_t shared_bytes() const {
    lazy_shape const& s = o.state.shape;
    return sum_box::bytes(2 * s.group) + row_weights_box::bytes(o.layer.kv.k.dim, s.group) +
           shared_pieces::bytes<float>(s.group) +
           shared_pieces::bytes<float>(lazy_shape::ahead * s.padded_rows()) +
           shared_pieces::bytes<float>(s.all_rows()) + shared_pieces::bytes<int>(warp_size);
  }

  __device__ void operator()(block_head const& at) const {
    shared_pieces shared;
    lazy_shape const& s = o.state.shape;
    boxes const b{sum_box(shared, 2 * s.group),
                  row_weights_box(shared, o.layer.kv.k.dim, s.group, weights, n_slots),
                  shared.take<float>(s.group)};
    float* const factors = shared.take<float>(lazy_shape::ahead * s.padded_rows());
    float* const ratio = shared.take<float>(s.all_rows());
    int* const box = shared.take<int>(warp_size);
    lazy_job const job(o, at);
    lazy_head const& head = job.head;
    if (o.keep.data != nullptr && job.n <= o.keep(job.id, job.h)) {
      if (thread_of_block() == 0) head.set_newest(-1);
      return;
    }
    index_t const before = head.newest(), old_before = head.old();
    index_t const n_old = count_old(job, box);
    index_t const entered = job.oldest_recent() >= 1 ? 1 : 0;
    if (!o.anew && n_old >= 0 && before == job.newest && old_before == n_old) return;
    bool const follows =
        !o.anew && before == job.newest - 1 && before >= 0 && old_before + entered == n_old;
    if (thread_of_block() == 0) {  // count_old has barriers: all have read
      head.set_newest(n_old < 0 ? -1 : job.newest);
      head.set_old(n_old);
    }
    if (n_old < 0 || job.newest < 0) return;
    bound_source const bounds = bounds_of(job, o.state.rows, factors, o.fuse);
    token_row row{};
    if (follows) {
      index_t const ring_row = o.ring_row != nullptr ? o.ring_row[at.entry] : 0;
      row = {o.weights.at(job.id, job.h, 0, 0) + ring_row * o.ring_stride, o.weights.stride[2],
             o.weight_max.at(job.id, job.h, 0, ring_row), o.weight_max.stride[2]};
      enter_column(job);
    }
    for (index_t p = follows ? job.newest : job.first; p <= job.newest; ++p)
      enter_token(job, p, n_old, row, b, bounds.codes);
    __syncthreads();
    bound_factors(job, lazy_shape::ahead, factors, ratio);
    prepare(job, bounds, follows);
  }

 private:
  struct boxes {
    sum_box sums;  ///< of the old slots, then of the columns that age, per query head of the group
    row_weights_box made;
    float* inverse;  ///< [group]
  };
  /// Weights of one token's row.
  struct token_row {
    float const* e;  ///< [group] rows of n slots
    offset_t stride;
    float const* maximum;  ///< [group]
    offset_t maximum_stride;
  };

  /// The column that has just become old joins the sums of the rows before the newest.
  __device__ static void enter_column(lazy_job const& job) {
    if (job.oldest_recent() < 1) return;
    lazy_head const& head = job.head;
    float const* const column = head.column(job.oldest_recent() - 1);
    job.each_row(job.newest - 1, [&](index_t i, index_t, index_t, index_t) {
      double const sum = head.sum(i) + static_cast<double>(column[i]);
      head.set_sum(i, sum);
      head.peak(i) = max(head.peak(i), static_cast<float>(sum));
    });
  }

  /// Sums of a row over the old slots, and over the window's columns that will be old before the row is gone:
  /// those count for its reference sum, the sum at the end of its life, evictions aside.
  __device__ static void sum_row(lazy_job const& job, index_t position, token_row const& row,
                                 sum_box const& sums) {
    lazy_shape const& s = job.head.shape();
    open_range const old = job.old(), recent = job.recent();
    sum_slots(2 * s.group, job.n, sums, [&](int which, index_t j) {
      index_t const p = job.positions[j], g = which % s.group;
      bool const ages = recent.has(p) && p + s.window < position + s.n_rows;
      return (which < s.group ? old.has(p) : ages) ? row.e[g * row.stride + j] : 0.0f;
    });
  }

  /// One token's row enters; `given` are the weights that attention has left, null if it has not.
  __device__ static void enter_token(lazy_job const& job, index_t position, index_t n_old,
                                     token_row const& given, boxes const& b,
                                     code_rows const& codes) {
    constexpr double least_sum = 1e-13;  // below it, rows are dominated by the window
    index_t const group = job.head.shape().group;
    bool sound = given.e != nullptr;
    if (sound) {
      sum_row(job, position, given, b.sums);
      for (index_t g = 0; g < group && n_old > 0; ++g) sound = sound && b.sums.sums[g] >= least_sum;
    }
    if (sound) return enter_row(job, position, given, b, codes);
    weigh_row(job, position, job.old(), b.made);
    token_row const made{b.made.e, b.made.stride, b.made.maximum, 1};
    sum_row(job, position, made, b.sums);
    enter_row(job, position, made, b, codes);
  }

  /// A row enters, its sums at hand.
  __device__ static void enter_row(lazy_job const& job, index_t position, token_row const& row,
                                   boxes const& b, code_rows const& codes) {
    lazy_head const& head = job.head;
    lazy_shape const& s = head.shape();
    for (index_t g = thread_of_block(); g < s.group; g += threads_of_block()) {
      index_t const i = head.row(g, position);
      double const sum = b.sums.sums[g], reference = sum + b.sums.sums[s.group + g];
      head.set_sum(i, sum);
      head.peak(i) = static_cast<float>(sum);
      head.maximum(i) = row.maximum[g * row.maximum_stride];
      head.inverse(i) = b.inverse[g] =
          reference > 1e-30 && reference < 1e30 ? static_cast<float>(1 / reference) : 1.0f;
    }
    __syncthreads();
    open_range const recent = job.recent();
    for (index_t j = thread_of_block(); j < job.n; j += threads_of_block()) {
      index_t const p = job.positions[j];
      float* const column = recent.has(p) ? head.column(p) : nullptr;
      float top = 0;
      for (index_t g = 0; g < s.group; ++g) {
        float const x = row.e[g * row.stride + j];
        if (column != nullptr) column[head.row(g, position)] = x;
        top = max(top, __fmul_rn(x, b.inverse[g]));
      }
      codes.put(position % s.n_rows, j, min(top, largest_code));
    }
  }

  /// Bounds of the tiles that are due, or of all. A thread per slot.
  __device__ static void prepare(lazy_job const& job, bound_source const& bounds, bool follows) {
    constexpr index_t tile = lazy_shape::tile, ahead = lazy_shape::ahead;
    index_t const step = follows ? ahead : 1;
    index_t const first = follows ? (ahead - job.newest % ahead) % ahead : 0;
    for (index_t i = thread_of_block();; i += threads_of_block()) {
      index_t const t = first + i / tile * step, j = t * tile + i % tile;
      if (t * tile >= job.n) break;
      if (j < job.n) prepare_bounds(bounds, job.phase_of(j), j);
    }
  }
};

}  // namespace kvkeep::cuda
