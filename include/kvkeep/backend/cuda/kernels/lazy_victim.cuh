// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// The victim of MorphKV's lazy evaluation: bounds, then exact scores of the few slots in doubt, or the
/// direct form.
#pragma once

#include "lazy_exact.cuh"
#include "select.cuh"
#include "sums.cuh"

namespace kvkeep::cuda {

/// Where bounds do not separate the slots, the direct form decides for so many steps.
inline constexpr index_t direct_steps = 32;

/// Shared memory of a decision.
struct victim_boxes {
  exact_score exact;
  doubt_list doubts;
  sum_box sums;
  row_weights_box made;
  float* inverse;            ///< [group]
  float* factors;            ///< [padded]
  float* ratio;              ///< [all_rows]
  int* box;                  ///< [warps]
  unsigned long long* wide;  ///< [warps]

  __device__ victim_boxes(shared_pieces& p, lazy_shape const& s, index_t dim, float* weights,
                          offset_t n_slots)
      : exact(p, s.group * s.n_rows, dim),
        doubts(p),
        sums(p, s.group),
        made(p, dim, s.group, weights, n_slots),
        inverse(p.take<float>(s.group)),
        factors(p.take<float>(s.padded_rows())),
        ratio(p.take<float>(s.all_rows())),
        box(p.take<int>(warp_size)),
        wide(p.take<unsigned long long>(warp_size)) {}
  static std::size_t bytes(lazy_shape const& s, index_t dim) {
    return exact_score::bytes(s.group * s.n_rows, dim) + doubt_list::bytes() +
           sum_box::bytes(s.group) + row_weights_box::bytes(dim, s.group) +
           shared_pieces::bytes<float>(s.group) + shared_pieces::bytes<float>(s.padded_rows()) +
           shared_pieces::bytes<float>(s.all_rows()) + shared_pieces::bytes<int>(warp_size) +
           shared_pieces::bytes<unsigned long long>(warp_size);
  }
};

struct lazy_victim_stage {
  static constexpr int most_threads = 384;
  op::lazy_victim<device_space> o;
  float* weights;   ///< [head][group][n_slots], for the direct form
  float* scores;    ///< [head][n_slots] bounds, or direct scores
  index_t n_slots;  ///< most slots of a head

  std::size_t shared_bytes() const { return victim_boxes::bytes(o.state.shape, o.layer.kv.k.dim); }
  __device__ void operator()(block_head const& at) const {
    shared_pieces shared;
    victim_boxes const b(shared, o.state.shape, o.layer.kv.k.dim, weights, n_slots);
    lazy_job const job(o, at);
    bool const keeps = job.n == 0 || (o.keep.data != nullptr && job.n <= o.keep(job.id, job.h));
    index_t const victim = keeps ? -1 : decide(job, b);
    if (thread_of_block() == 0) o.victim(job.id, job.h) = victim;
  }

 private:
  __device__ float* own_scores() const {
    return scores + static_cast<offset_t>(blockIdx.x) * n_slots;
  }
  __device__ index_t frozen(lazy_job const& job) const {
    return o.frozen != nullptr ? o.frozen[job.id] : 0;
  }

  /// The victim; its weights leave the sums.
  __device__ index_t decide(lazy_job const& job, victim_boxes const& b) const {
    lazy_head const& head = job.head;
    index_t const old = head.old(), rest_before = head.rest();
    bool const known = head.newest() == job.newest && old >= 0;
    index_t const all = head.shape().group * (job.newest - job.first + 1);
    bool const in_range = b.exact.begin(job);
    index_t victim = -1, rest = rest_before;
    if (known && in_range && rest == 0 && all > 0) {
      index_t const least = write_bounds(job, b);
      if (least < 0) return -1;  // everything is protected
      victim = victim_by_bounds(job, b, least, all);
      if (victim < 0) rest = direct_steps;
    }
    if (victim < 0) {
      victim = victim_by_scores(job, b);
      if (rest > 0) --rest;
      if (victim >= 0 && known) {
        score_one(job, b, victim);  // for its weights
        b.exact.keep(0, all);
      }
    }
    bool const goes = victim >= 0 && known;
    bool const sound = !goes || let_column_go(job, b.exact);
    if (thread_of_block() == 0) {
      if (rest != rest_before) head.set_rest(rest);
      if (goes) head.set_old(sound ? old - 1 : -2);
    }
    return victim;
  }

  __device__ index_t last_slot_of(lazy_job const& job, float const* f, open_range const& open,
                                  victim_boxes const& b) const {
    last_slot const own = last_of_thread(
        job.n, [&](index_t j) { return f[j]; }, job.positions, open);
    unsigned long long const last = block_reduce(own.rank, b.wide, smaller{});
    bool const mine = own.rank != last_slot::none && own.rank == last;
    return block_reduce(mine ? own.slot : -1, b.box, larger{});
  }

  /// Lower bounds of the slots that may leave, +infinity for the others. @return the lowest one's slot, or -1
  __device__ index_t write_bounds(lazy_job const& job, victim_boxes const& b) const {
    bound_factors(job, 1, b.factors, b.ratio);
    bound_source const source = bounds_of(job, o.state.rows, b.factors, o.fuse);
    open_range const open{frozen(job), job.old().to};
    float* const bounds = own_scores();
    for (index_t j = thread_of_block(); j < job.n; j += threads_of_block())
      bounds[j] = open.has(job.positions[j]) ? lower_bound(source, job.phase_of(j), j)
                                             : __uint_as_float(0x7f800000u);
    return last_slot_of(job, bounds, open, b);
  }

  __device__ float score_one(lazy_job const& job, victim_boxes const& b, index_t slot) const {
    __syncthreads();
    if (thread_of_block() == 0) b.exact.picked[0] = slot;
    b.exact(job, 1, o.fuse);
    return b.exact.f[0];
  }

  /// The victim by bounds and exact scores, with its weights in `exact.best`; -1: the bounds do not separate
  /// the slots, or the scores have left the range of fp32. @param least the slot with the lowest bound
  __device__ index_t victim_by_bounds(lazy_job const& job, victim_boxes const& b, index_t least,
                                      index_t all) const {
    auto const limit_of = [](float f) { return __fmul_rn(f, 1.0f + bound_slack); };
    doubt_list const& list = b.doubts;
    index_t victim = least;
    float lowest = score_one(job, b, least);
    b.exact.keep(0, all);
    index_t const count = list.collect(own_scores(), job.n, limit_of(lowest), b.box);
    if (count > most_in_doubt) return -1;
    for (index_t i = 0; i < count && list.sorted_bound[i] <= limit_of(lowest);) {
      index_t n = 0;
      __syncthreads();
      for (; i < count && n < exact_score::at_once && list.sorted_bound[i] <= limit_of(lowest); ++i)
        if (list.sorted_slot[i] != least) {
          if (thread_of_block() == 0) b.exact.picked[n] = list.sorted_slot[i];
          ++n;
        }
      if (n > 0) b.exact(job, n, o.fuse);
      for (index_t k = 0; k < n; ++k) {
        float const f = b.exact.f[k];
        index_t const slot = b.exact.picked[k];
        if (f < lowest || (f == lowest && job.positions[slot] > job.positions[victim])) {
          victim = slot;
          lowest = f;
          b.exact.keep(k, all);
        }
      }
    }
    return lowest >= 1e-30f ? victim : -1;
  }

  /// The victim by the direct form: softmax over the old slots, row by row, all slots.
  __device__ index_t victim_by_scores(lazy_job const& job, victim_boxes const& b) const {
    lazy_shape const& s = job.head.shape();
    open_range const old = find_open(job.positions, job.n, {0, s.window, 0}, b.box);
    float* const f = own_scores();
    for (index_t j = thread_of_block(); j < job.n; j += threads_of_block())
      f[j] = job.first > job.newest ? static_cast<float>(job.positions[j]) : 0.0f;
    for (index_t p = job.first; p <= job.newest; ++p) {
      weigh_row(job, p, old, b.made);
      sum_slots(s.group, job.n, b.sums, [&](int g, index_t j) {
        return old.has(job.positions[j]) ? b.made.e[g * b.made.stride + j] : 0.0f;
      });
      for (index_t g = thread_of_block(); g < s.group; g += threads_of_block()) {
        float const sum = static_cast<float>(b.sums.sums[g]);
        b.inverse[g] = sum > 0 ? __fdiv_rn(1.0f, sum) : 0.0f;
      }
      __syncthreads();
      for (index_t j = thread_of_block(); j < job.n; j += threads_of_block()) {
        float top = 0;
        for (index_t g = 0; g < s.group; ++g)
          top = max(top, __fmul_rn(b.made.e[g * b.made.stride + j], b.inverse[g]));
        f[j] = o.fuse == reduction::sum ? __fadd_rn(f[j], top) : max(f[j], top);
      }
    }
    open_range const open = find_open(job.positions, job.n, {0, s.window, frozen(job)}, b.box);
    return last_slot_of(job, f, open, b);
  }

  /// Sums lose the victim's weights. Where little is left of a sum, cancellation may have spoilt it.
  /// @return false if a sum has to be made anew
  __device__ static bool let_column_go(lazy_job const& job, exact_score const& exact) {
    bool sound = true;
    job.each_row(job.newest, [&](index_t i, index_t, index_t, index_t at) {
      double const sum = job.head.sum(i) - static_cast<double>(exact.best[at]);
      job.head.set_sum(i, sum);
      sound = sound && sum >= 0.25 * static_cast<double>(job.head.peak(i));
    });
    return __syncthreads_and(sound ? 1 : 0) != 0;
  }
};

}  // namespace kvkeep::cuda
