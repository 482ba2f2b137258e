// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// CPU: the victim of MorphKV's lazy evaluation.
#pragma once

#include "lazy_rows.hpp"

namespace kvkeep::cpu {
inline namespace KVKEEP_CPU_ISA {

inline constexpr index_t most_in_doubt = 64;  ///< exact scores before the direct form takes over
inline constexpr index_t direct_steps = 32;   ///< which then decides for so many steps
inline constexpr index_t scored_at_once = 4;  ///< slots that share a reading of the queries

/// Scratch of one worker for lazy_victim.
struct victim_scratch {
  query_block_scratch direct;
  worker_scratch<index_t> old;           ///< [max_slots] marks; scratch of the guard
  worker_scratch<float> bounds;          ///< [max_slots] lower bounds, or direct scores
  worker_scratch<float> factors;         ///< [padded], then [all_rows + padded]
  worker_scratch<float> rows;            ///< [7][group * n_rows], then [4][dim_k]
  worker_scratch<float const*> queries;  ///< [group * n_rows]

  static victim_scratch take(workspace& ws, int workers, kv_ref<host_space> const& kv,
                             lazy_shape const& s) {
    std::size_t const slots = size_of(kv.shape.max_slots + lanes);
    std::size_t const all = size_of(s.group * s.n_rows);
    victim_scratch r;
    r.direct = query_block_scratch::take(ws, workers, kv.shape, kv.k, s.n_rows, true);
    r.old = take_each<index_t>(ws, workers, slots);
    r.bounds = take_each<float>(ws, workers, slots);
    r.factors = take_each<float>(ws, workers, size_of(2 * s.padded_rows() + s.all_rows()));
    r.rows = take_each<float>(
        ws, workers, (3 + scored_at_once) * all + scored_at_once * size_of(kv.shape.dim_k));
    r.queries = take_each<float const*>(ws, workers, all);
    return r;
  }
};

/// Exact scores of some slots: the rows there are, ascending, head after head.
struct exact_score {
  lazy_job const& job;
  reduction fuse = reduction::max;
  index_t count = 0;                ///< rows
  index_t all = 0;                  ///< group * count
  float const** queries = nullptr;  ///< [group][count]
  float* maximum = nullptr;         ///< [group][count]
  float* inverse = nullptr;         ///< [group][count] 1 / Z
  float* e = nullptr;               ///< [slot][group][count] of the slots scored last
  float* best = nullptr;            ///< [group][count] of the best slot
  float* keys = nullptr;            ///< [slot][dim_k]
  bool in_range = true;             ///< all sums are such that dividing by them means something

  exact_score(lazy_job const& j, reduction how, victim_scratch const& scratch, int worker) noexcept
      : job(j), fuse(how), count(j.newest - j.first + 1), queries(scratch.queries(worker)) {
    lazy_shape const& s = job.head.shape();
    all = s.group * count;
    maximum = scratch.rows(worker);
    inverse = maximum + all;
    best = inverse + all;
    e = best + all;
    keys = e + scored_at_once * static_cast<offset_t>(all);
    index_t at = 0;
    job.each_row(job.newest, [&](index_t i, index_t g, index_t ring_row) {
      double const sum = job.head.sum(i);
      in_range = in_range && lazy_shape::divides(sum);
      queries[at] = job.ring_q.at(job.id, job.h * s.group + g, ring_row, 0);
      maximum[at] = job.head.maximum(i);
      inverse[at] = 1.0F / static_cast<float>(sum);
      ++at;
    });
  }

  /// Canonical scores f[i] of up to `scored_at_once` slots; their weights are in `e` then.
  void operator()(index_t const* slots, index_t n, float* f) const noexcept {
    index_t const dim = job.k.p->dim;
    for (index_t i = 0; i < n; ++i) read_key(slots[i], keys + i * dim);
    qk_rows(cpu::query_rows{keys, dim, n, dim, job.form}, row_list<float>{queries, all}, e, all);
    for (index_t i = 0; i < n; ++i) f[i] = score(e + static_cast<offset_t>(i) * all);
  }
  /// Remembers the weights of the i-th slot scored last.
  void keep(index_t i) const noexcept {
    std::copy_n(e + static_cast<offset_t>(i) * all, all, best);
  }

 private:
  /// Logits to weights in place, and their score.
  float score(float* z) const noexcept {
    for (index_t i = 0; i < all; i += lanes)
      store_some(z + i, exp(load_some(z + i, all - i) - load_some(maximum + i, all - i)), all - i);
    float sum = 0;
    for (index_t r = 0; r < count; ++r) {
      float top = z[r] * inverse[r];
      for (index_t i = r + count; i < all; i += count) top = std::max(top, z[i] * inverse[i]);
      sum = fuse == reduction::sum ? sum + top : std::max(sum, top);
    }
    return sum;
  }
  /// The slot's key in fp32.
  void read_key(index_t slot, float* to) const noexcept {
    plane const& p = *job.k.p;
    offset_t const at = visit_layout(
        p.layout, [&](auto const& l) { return l.offset(job.k.seq, job.k.head, slot); });
    visit_type(p.type, [&](auto const* type) {
      using T = std::remove_cv_t<std::remove_pointer_t<decltype(type)>>;
      read_row(p, reinterpret_cast<T const*>(p.data) + at, to);
    });
  }
};

/// A slot in doubt and its lower bound.
struct doubt {
  float bound;
  index_t slot;
};

/// Slots whose bound is at most `limit`, or more than `most` (then the list is cut off).
inline index_t list_doubts(float const* bounds, index_t n, float limit, index_t most,
                           doubt* out) noexcept {
  index_t count = 0;
  vf const top = splat(limit);
  for (index_t j = 0; j < n && count <= most; j += lanes) {
    unsigned bits = lane_bits(at_least(top, load_some(bounds + j, n - j)));
    if (n - j < lanes) bits &= (1u << (n - j)) - 1u;
    for (; bits != 0 && count <= most; bits &= bits - 1) {
      index_t const slot = j + std::countr_zero(bits);
      out[count++] = {bounds[slot], slot};
    }
  }
  return count;
}

/// The victim by bounds and exact scores, with its weights in `score.best`; -1: the bounds do not separate
/// the slots, or the scores have left the range of fp32. @param least the slot with the lowest bound
inline index_t victim_by_bounds(exact_score const& score, float const* bounds,
                                index_t least) noexcept {
  lazy_job const& job = score.job;
  auto const limit_of = [](float f) { return f * (1.0F + bound_slack); };
  index_t victim = least;
  float lowest = 0;
  score(&least, 1, &lowest);
  score.keep(0);
  doubt list[most_in_doubt + 1];
  index_t const count = list_doubts(bounds, job.n, limit_of(lowest), most_in_doubt, list);
  if (count > most_in_doubt) return -1;
  std::sort(list, list + count, [](doubt const& a, doubt const& b) {
    return a.bound != b.bound ? a.bound < b.bound : a.slot < b.slot;
  });
  for (index_t i = 0; i < count && list[i].bound <= limit_of(lowest);) {
    index_t slots[scored_at_once], n = 0;
    float f[scored_at_once];
    for (; i < count && n < scored_at_once && list[i].bound <= limit_of(lowest); ++i)
      if (list[i].slot != least) slots[n++] = list[i].slot;
    if (n > 0) score(slots, n, f);
    for (index_t k = 0; k < n; ++k)
      if (f[k] < lowest || (f[k] == lowest && job.positions[slots[k]] > job.positions[victim])) {
        victim = slots[k];
        lowest = f[k];
        score.keep(k);
      }
  }
  return lowest >= 1e-30F ? victim : -1;
}

/// Sums lose the victim's weights. Where little is left of a sum, cancellation may have spoilt it.
/// @return false if a sum has to be made anew
inline bool let_column_go(exact_score const& score) noexcept {
  lazy_job const& job = score.job;
  bool sound = true;
  index_t at = 0;
  job.each_row(job.newest, [&](index_t i, index_t, index_t) {
    double const sum = job.head.sum(i) - static_cast<double>(score.best[at++]);
    job.head.set_sum(i, sum);
    sound = sound && sum >= 0.25 * static_cast<double>(job.head.peak(i));
  });
  return sound;
}

/// Lower bounds of the slots that may leave, +infinity for the others. @return the lowest one's slot, or -1
inline index_t write_bounds(lazy_job const& job, bound_source const& source, index_t frozen,
                            float* bounds) noexcept {
  vf const none = splat(std::numeric_limits<float>::infinity());
  open_range const open{frozen, std::max(0, job.oldest_recent())};
  for (index_t j = 0; j < job.n; j += lanes) {
    unsigned const bits = open_bits(open, job.positions + j, job.n - j);
    vf const x = bits == 0 ? none : lower_bounds(source, phase_of(job, j), j);
    store_some(bounds + j, select(lane_mask(bits), x, none), job.n - j);
  }
  return evict_index({bounds, job.positions, nullptr, job.n, open.from, open.to});
}

/// The victim by the direct form. @param scores [max_slots] scratch
inline index_t victim_by_scores(op::lazy_victim<host_space> const& o, lazy_job const& job,
                                victim_scratch const& scratch, int worker) noexcept {
  float* const scores = scratch.bounds(worker);
  index_t* const list = scratch.old(worker);
  index_t const frozen = o.frozen != nullptr ? o.frozen[job.id] : 0;
  fused_job direct{{job.k, job.positions, job.n}};
  direct.old = find_open(job.positions, job.n, 0, job.head.shape().window, 0, list);
  direct.fuse = o.fuse;
  direct.out = scores;
  query_block block(scratch.direct, worker);
  block.form = job.form;
  fused_direct(block, scratch.direct.capacity, direct, job.newest - job.first + 1,
               [&](index_t i, index_t g) { return job.query(g, job.first + i); });
  open_range const open = find_open(job.positions, job.n, 0, job.head.shape().window, frozen, list);
  return evict_index({scores, job.positions, nullptr, job.n, open.from, open.to});
}

inline index_t lazy_victim_head(op::lazy_victim<host_space> const& o, victim_scratch const& scratch,
                                index_t b, index_t h, int worker) noexcept {
  lazy_job job = make_job(o, b, h);
  lazy_head const& head = job.head;
  if (job.n == 0 || (o.keep.data != nullptr && job.n <= o.keep(job.id, h))) return -1;
  bool const known = head.newest() == job.newest && head.old() >= 0;
  index_t victim = -1;
  exact_score const score(job, o.fuse, scratch, worker);
  if (known && score.in_range && head.rest() == 0 && score.count > 0) {
    float* const factors = scratch.factors(worker);
    bound_factors(job, 1, factors, factors + head.shape().padded_rows());
    index_t const frozen = o.frozen != nullptr ? o.frozen[job.id] : 0;
    float* const bounds = scratch.bounds(worker);
    bound_source const source = bounds_of(job, o.state.rows, factors, o.fuse);
    index_t const least = write_bounds(job, source, frozen, bounds);
    if (least < 0) return -1;  // everything is protected
    victim = victim_by_bounds(score, bounds, least);
    if (victim < 0) head.set_rest(direct_steps);
  }
  if (victim < 0) {
    victim = victim_by_scores(o, job, scratch, worker);
    if (head.rest() > 0) head.set_rest(head.rest() - 1);
    if (victim >= 0 && known) {
      float f = 0;
      score(&victim, 1, &f);  // for its weights
      score.keep(0);
    }
  }
  if (victim < 0 || !known) return victim;
  head.set_old(let_column_go(score) ? head.old() - 1 : -2);
  return victim;
}

/// Fetches what the next head is going to read: prepared bounds, newer codes, queries.
inline void prefetch_victim(op::lazy_victim<host_space> const& o, index_t b, index_t h) noexcept {
  lazy_job const job = make_job(o, b, h);
  lazy_shape const& s = job.head.shape();
  auto const fetch = [&](index_t row, index_t first) {
    prefetch_row(o.state.rows.at(job.id, h, row, first), lazy_shape::tile);
  };
  for (index_t first = 0; first < job.n; first += lazy_shape::tile) {
    index_t const phase = phase_of(job, first);
    fetch(s.code_words() + phase / 2, first);
    for (index_t back = 0; back < std::min({phase, s.n_rows, job.newest + 1}); ++back)
      fetch((job.newest - back) % s.n_rows / 2, first);
  }
  job.each_row(job.newest, [&](index_t, index_t g, index_t ring_row) {
    prefetch_row(job.ring_q.at(job.id, job.h * s.group + g, ring_row, 0), o.layer.kv.shape.dim_k);
  });
}

/// Victims. Cost as the op says.
KVKEEP_CPU_OP status enqueue(context& c, op::lazy_victim<host_space> const& o,
                             workspace& ws) noexcept {
  kv_ref<host_space> const& kv = o.layer.kv;
  if (!readable(kv.k)) return status::unsupported;
  if (!lazy_readable(o)) return status::bad_argument;
  workspace::frame const frame(ws);
  int const workers = c.workers(o.batch.n * kv.shape.n_kv_heads);
  auto const scratch = victim_scratch::take(ws, workers, kv, o.state.shape);
  if (!placed(ws)) return not_placed(ws);
  index_t const heads = kv.shape.n_kv_heads;
  for_heads(c, o.batch.n, heads, [&](index_t b, index_t h, int worker) {
    with_next_head(o.batch.n, heads, b, h,
                   [&](index_t b2, index_t h2) { prefetch_victim(o, b2, h2); });
    o.victim(o.batch.id_of(b), h) = lazy_victim_head(o, scratch, b, h, worker);
  });
  return status::ok;
}

}  // namespace KVKEEP_CPU_ISA
}  // namespace kvkeep::cpu
