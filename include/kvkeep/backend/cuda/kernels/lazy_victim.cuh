// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// The victim of MorphKV's lazy evaluation: bounds, then exact scores of the few slots in doubt, or the
/// direct form.
#pragma once

#include <kvkeep/backend/cuda/kernels/ptx.cuh>

#include "evict.cuh"
#include "lazy_exact.cuh"
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
  int* box;                  ///< [guard_box_size]
  unsigned long long* wide;  ///< [warps]

  __device__ victim_boxes(shared_pieces& p, lazy_shape const& s, index_t dim, float* weights,
                          offset_t n_slots, index_t place)
      : exact(p, s.group * s.n_rows, dim),
        doubts(p),
        sums(p, sums_size(s.group)),
        made(p, dim, s.group, weights, n_slots, place),
        inverse(p.take<float>(s.group)),
        factors(p.take<float>(s.padded_rows())),
        box(p.take<int>(guard_box_size)),
        wide(p.take<unsigned long long>(warp_size)) {}
  static std::size_t bytes(lazy_shape const& s, index_t dim) {
    return exact_score::bytes(s.group * s.n_rows, dim) + doubt_list::bytes() +
           sum_box::bytes(sums_size(s.group)) + row_weights_box::bytes(dim, s.group) +
           shared_pieces::bytes<float>(s.group) + shared_pieces::bytes<float>(s.padded_rows()) +
           shared_pieces::bytes<int>(guard_box_size) +
           shared_pieces::bytes<unsigned long long>(warp_size);
  }
  /// Query heads of a group, four at a time.
  KVKEEP_HD static constexpr index_t sums_size(index_t group) { return (group + 3) / 4 * 4; }
};

struct lazy_victim_stage {
  static constexpr int most_threads = lazy_threads, threads_per_sm = lazy_threads;
  op::lazy_victim<device_space> o;
  float* weights;   ///< [head][group][n_slots], for the direct form
  float* scores;    ///< [head][n_slots] bounds, or direct scores
  index_t n_slots;  ///< most slots of a head

  std::size_t shared_bytes() const { return victim_boxes::bytes(o.state.shape, o.layer.kv.k.dim); }
  __device__ void operator()(block_head const& at) const {
    index_t victim = by_bounds(at);
    if (victim == undecided) victim = by_scores(at);
    if (thread_of_block() == 0) o.victim(o.batch.id_of(at.entry), at.head) = victim;
  }

 private:
  static constexpr index_t undecided = -2;

  __device__ victim_boxes boxes(lazy_job const& job) const {
    shared_pieces shared;
    return victim_boxes(shared, o.state.shape, o.layer.kv.k.dim, weights, n_slots, job.place);
  }
  __device__ float* own_scores(lazy_job const& job) const {
    return scores + static_cast<offset_t>(job.place) * n_slots;
  }
  __device__ index_t frozen(lazy_job const& job) const {
    return o.frozen != nullptr ? o.frozen[job.id] : 0;
  }
  /// Whether the state is that of these slots.
  __device__ static bool known(lazy_job const& job) {
    return job.head.newest() == job.newest && job.head.old() >= 0;
  }
  /// Rows there are, of all query heads.
  __device__ static index_t rows_of(lazy_job const& job) {
    return job.head.shape().group * (job.newest - job.first + 1);
  }

  /// The victim, whose weights leave the sums; -1: nobody leaves; undecided: the bounds do not separate the
  /// slots, or scores have left the range of fp32.
  __device__ index_t by_bounds(block_head const& at) const {
    lazy_job const job(o, at);
    if (job.n == 0 || (o.keep.data != nullptr && job.n <= o.keep(job.id, job.h))) return -1;
    if (!known(job) || job.head.rest() > 0 || rows_of(job) == 0) return undecided;
    victim_boxes const b = boxes(job);
    bound_factors<1>(job, false, b.factors);
    if (!b.exact.begin(job)) return undecided;
    slot_picks picks = pick_least(write_bounds(job, b), b);
    if (picks.n == 0) return -1;  // everything is protected
    best_slot best;
    for (index_t listed = -1, from = 0; picks.n > 0;) {
      b.exact(job, picks, o.fuse);
      best.look(job, b.exact, picks, rows_of(job));
      index_t const in_doubt = next_picks(job, b, best, picks, listed, from);
      if (in_doubt > most_in_doubt || (picks.n == 0 && best.score < 1e-30f)) {
        if (thread_of_block() == 0) job.head.set_rest(direct_steps);
        return undecided;
      }
    }
    let_go(job, b);
    return best.slot;
  }

  /// The same by the direct form, which always decides.
  __device__ index_t by_scores(block_head const& at) const {
    index_t const victim = last_by_scores(forgotten(at));
    lazy_job const job(o, forgotten(at));
    victim_boxes const b = boxes(job);
    index_t const rest = job.head.rest();
    bool const goes = victim >= 0 && known(job);
    __syncthreads();  // all have read
    if (thread_of_block() == 0 && rest > 0) job.head.set_rest(rest - 1);
    if (!goes) return victim;
    slot_picks only;
    only.add(victim);
    b.exact.begin(job);
    b.exact(job, only, o.fuse);  // for its weights
    b.exact.keep(0, rows_of(job));
    let_go(job, b);
    return victim;
  }

  /// Lower bounds of the slots that may leave, +infinity for the others. @return the thread's lowest one
  __device__ last_slot write_bounds(lazy_job const& job, victim_boxes const& b) const {
    bound_source const source = bounds_of(job, o.state.rows, b.factors);
    open_range const open{frozen(job), job.old().to};
    float* const bounds = own_scores(job);
    return with_fold(o.fuse, [&](auto const& fold) {
      last_slot least;
      for (index_t j = thread_of_block(); j < job.n; j += threads_of_block()) {
        index_t const position = job.positions[j];
        float const bound = lower_bound(source, job.phase_of(j), j, fold);
        bounds[j] = open.has(position) ? bound : __uint_as_float(0x7f800000u);
        if (open.has(position)) least.look(bound, position, j);
      }
      return least;
    });
  }

  /// The slot that ranks last, then those that do for other warps: most likely nothing else is in doubt.
  __device__ static slot_picks pick_least(last_slot const& own, victim_boxes const& b) {
    unsigned long long const of_warp = warp_reduce(own.rank, smaller{});
    if (own.rank == of_warp && own.rank != last_slot::none) b.box[warp_of_block()] = own.slot;
    if (lane_of_warp() == 0) b.wide[warp_of_block()] = of_warp;
    __syncthreads();
    unsigned long long rank = last_slot::none;
    if (lane_of_warp() < warps_of_block()) rank = b.wide[lane_of_warp()];
    slot_picks picks;
    unrolled<slot_picks::most>([&](int) {
      unsigned long long const least = warp_reduce(rank, smaller{});
      if (least == last_slot::none) return;
      int const warp = __ffs(static_cast<int>(__ballot_sync(all_lanes, rank == least))) - 1;
      picks.add(b.box[warp]);
      if (lane_of_warp() == warp) rank = last_slot::none;
    });
    return picks;
  }

  /// The slot with the lowest exact score so far, with its weights in `exact.best`.
  struct best_slot {
    index_t slot = -1;
    float score = 0;

    __device__ void look(lazy_job const& job, exact_score const& exact, slot_picks const& picks,
                         index_t all) {
      for (index_t k = 0; k < picks.n; ++k) {
        float const f = exact.f[k];
        index_t const j = picks[k];
        if (slot >= 0 && f > score) continue;
        if (slot >= 0 && f == score && job.positions[j] < job.positions[slot]) continue;
        slot = j;
        score = f;
        exact.keep(k, all);
      }
    }
    __device__ float limit() const { return __fmul_rn(score, 1.0f + bound_slack); }
  };

  /// The next slots that bounds do not exclude, into `picks`: none, and the best one is the victim.
  /// @param picks   the first ones when `listed` is -1
  /// @param listed  slots of the list, or -1: there is none yet  @param from  of the list, the next one
  /// @return how many are in doubt; more than `most_in_doubt`: bounds do not separate them
  __device__ index_t next_picks(lazy_job const& job, victim_boxes const& b, best_slot const& best,
                                slot_picks& picks, index_t& listed, index_t& from) const {
    doubt_list const& list = b.doubts;
    float const limit = best.limit();
    slot_picks const seen = picks;
    picks = {};
    if (listed < 0) {
      float const* const bounds = own_scores(job);
      index_t const count =
          count_slots(job.n, b.box, [&](index_t j) { return bounds[j] <= limit && !seen.has(j); });
      if (count == 0 || count > most_in_doubt) return count;
      listed = list.collect(bounds, job.n, limit, seen, b.box);
    }
    for (; from < listed && picks.n < slot_picks::most && list.sorted_bound[from] <= limit; ++from)
      picks.add(list.sorted_slot[from]);
    return picks.n;
  }

  /// The slot that ranks last by the direct form: softmax over the old slots, row by row, all slots.
  __device__ index_t last_by_scores(block_head const& at) const {
    lazy_job const job(o, at);
    victim_boxes const b = boxes(job);
    lazy_shape const& s = job.head.shape();
    open_range const old = find_open(job.positions, job.n, {0, s.window, 0}, b.box);
    float* const f = own_scores(job);
    for (index_t j = thread_of_block(); j < job.n; j += threads_of_block())
      f[j] = job.first > job.newest ? static_cast<float>(job.positions[j]) : 0.0f;
    for (index_t p = job.first; p <= job.newest; ++p) {
      weigh_row(job, p, old, b.made);
      for (index_t first = 0; first < s.group; first += 4)
        sum_slots<4>(job.n, b.sums, first, [&](index_t j, double(&x)[4]) {
          if (!old.has(job.positions[j])) return;
          unrolled<4>([&](int i) {
            x[i] += static_cast<double>(b.made.e[min(first + i, s.group - 1) * b.made.stride + j]);
          });
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
    open_range const open{max(old.from, frozen(job)), old.to};
    last_slot const own = last_of_thread(
        job.n, [&](index_t j) { return f[j]; }, job.positions, open);
    __syncthreads();  // the box may still be read
    slot_picks const last = pick_least(own, b);
    return last.n > 0 ? last[0] : -1;
  }

  /// Sums lose the victim's weights, `exact.best`. Where little is left of a sum, cancellation may have spoilt
  /// it: then the state has to be made anew.
  __device__ static void let_go(lazy_job const& job, victim_boxes const& b) {
    bool sound = true;
    job.each_row(job.newest, [&](index_t i, index_t, index_t, index_t at) {
      double const sum = job.head.sum(i) - static_cast<double>(b.exact.best[at]);
      job.head.set_sum(i, sum);
      sound = sound && sum >= 0.25 * static_cast<double>(job.head.peak(i));
    });
    index_t const old = job.head.old();
    bool const all_sound = __syncthreads_and(sound ? 1 : 0) != 0;
    if (thread_of_block() == 0) job.head.set_old(all_sound ? old - 1 : -2);
  }
};

}  // namespace kvkeep::cuda
