// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// CPU: MorphKV's lazy evaluation, per layer.
#pragma once

#include "attend.hpp"
#include "fused_rows.hpp"
#include "lazy_head.hpp"

namespace kvkeep::cpu {
inline namespace KVKEEP_CPU_ISA {

/// Scratch of one worker for lazy_enter.
struct enter_scratch {
  worker_scratch<std::int32_t> old;  ///< [max_slots]
  worker_scratch<float> factors;     ///< [ahead][padded], then [all_rows + padded], [2 * group]
  worker_scratch<float> weights;     ///< [group][max_slots], to make the state anew
  worker_scratch<void const*> pointers;
  worker_scratch<float> gathered;

  static enter_scratch take(workspace& ws, int workers, kv_ref<host_space> const& kv,
                            lazy_shape const& s) {
    std::size_t const slots = size_of(kv.shape.max_slots + lanes);
    enter_scratch r;
    r.old = take_each<std::int32_t>(ws, workers, slots);
    r.factors = take_each<float>(
        ws, workers,
        size_of((lazy_shape::ahead + 1) * s.padded_rows() + s.all_rows() + 2 * s.group));
    r.weights = take_each<float>(ws, workers, slots * size_of(s.group));
    r.pointers = take_each<void const*>(ws, workers, slots);
    r.gathered = take_each<float>(ws, workers, gather_floats(kv.k));
    return r;
  }
};

/// Codes and prepared bounds of one head.
inline bound_source bounds_of(lazy_job const& job, tensor_ref<float, 4> const& rows,
                              float const* factors, reduction fuse) noexcept {
  lazy_shape const& s = job.head.shape();
  bound_source r;
  r.codes = {rows.at(job.id, job.h, 0, 0), rows.stride[2]};
  r.bounds = {rows.at(job.id, job.h, s.code_words(), 0), rows.stride[2]};
  r.factors = factors;
  r.padded = s.padded_rows();
  r.n_rows = s.n_rows;
  r.n_present = job.newest - job.first + 1;
  r.newest_code = job.newest % s.n_rows;
  r.fuse = fuse == reduction::sum ? row_fold::sum : row_fold::max;
  return r;
}

/// Phase of a tile of slots: steps since its bounds were prepared.
inline index_t phase_of(lazy_job const& job, index_t first_slot) noexcept {
  return (job.newest + first_slot / lazy_shape::tile) % lazy_shape::ahead;
}

/// exp(z - maximum) of query row `position`, with the largest logit of the old slots as the maximum: then
/// their sum is at least 1, however far the window's logits are above. @return the maximum
inline float weigh_old(lazy_job const& job, enter_scratch const& scratch, index_t g,
                       index_t position, int worker, float* e) noexcept {
  query_rows const q{job.query(g, position), 0, 1, job.k.p->dim, job.form};
  head_logits(job.k, q, job.n, scratch.pointers(worker), scratch.gathered(worker), e, 0);
  float top = -FLT_MAX;
  for (index_t j = 0; j < job.n; ++j)
    if (job.old[j] != 0) top = std::max(top, e[j]);
  if (top == -FLT_MAX) return softmax_row(e, job.n, e).max;
  for (index_t j = 0; j < job.n; j += lanes)
    store_some(e + j, exp(load_some(e + j, job.n - j) - splat(top)), job.n - j);
  return top;
}

/// One token's row enters; `given` are the weights that attention has left, if it has.
inline void enter_token(lazy_job const& job, index_t position, lazy_row const* given,
                        enter_scratch const& scratch, code_rows const& codes, int worker) noexcept {
  constexpr double least_sum = 1e-13;  // below it, rows are dominated by the window
  lazy_shape const& s = job.head.shape();
  float* const e = scratch.weights(worker);
  offset_t const stride = static_cast<offset_t>(scratch.weights.each) / s.group / lanes * lanes;
  float* const maximum = scratch.factors(worker);
  bool sound = given != nullptr;
  for (index_t g = 0; g < s.group && sound; ++g)
    sound = job.n_old == 0 || old_sum(job, given->e + g * given->stride) >= least_sum;
  if (sound) return enter_row(job, *given, codes, maximum + s.group);
  for (index_t g = 0; g < s.group; ++g)
    maximum[g] = weigh_old(job, scratch, g, position, worker, e + g * stride);
  enter_row(job, {position, e, stride, maximum, 1}, codes, maximum + s.group);
}

inline void lazy_enter_head(op::lazy_enter<host_space> const& o, enter_scratch const& scratch,
                            index_t b, index_t h, int worker) noexcept {
  lazy_job job = make_job(o, b, h);
  if (o.keep.data != nullptr && job.n <= o.keep(job.id, h)) return job.head.set_newest(-1);
  job.old = scratch.old(worker);
  lazy_shape const& s = job.head.shape();
  index_t const n_old = job.n_old = mark_old(job);
  index_t const before = job.head.newest(), entered = job.oldest_recent() >= 1 ? 1 : 0;
  if (!o.anew && n_old >= 0 && before == job.newest && job.head.old() == n_old) return;
  bool const follows =
      !o.anew && before == job.newest - 1 && before >= 0 && job.head.old() + entered == n_old;
  job.head.set_newest(n_old < 0 ? -1 : job.newest);
  job.head.set_old(n_old);
  if (n_old < 0 || job.newest < 0) return;
  float* const factors = scratch.factors(worker);
  bound_source const bounds = bounds_of(job, o.state.rows, factors, o.fuse);
  lazy_row row{job.newest};
  if (follows) {
    index_t const ring_row = o.ring_row != nullptr ? o.ring_row[b] : 0;
    row.e = o.weights.at(job.id, h, 0, 0) + ring_row * o.ring_stride;
    row.stride = o.weights.stride[2];
    row.maximum = o.weight_max.at(job.id, h, 0, ring_row);
    row.maximum_stride = o.weight_max.stride[2];
    enter_column(job);
  }
  for (index_t p = follows ? job.newest : job.first; p <= job.newest; ++p)
    enter_token(job, p, follows ? &row : nullptr, scratch, bounds.codes, worker);
  bound_factors(job, lazy_shape::ahead, factors, factors + lazy_shape::ahead * s.padded_rows());
  for (index_t first = 0; first < job.n; first += lazy_shape::tile) {
    index_t const phase = phase_of(job, first), last = std::min(job.n, first + lazy_shape::tile);
    if (follows && phase != 0) continue;
    for (index_t j = first; j < last; j += lanes)
      prepare_bounds<lazy_shape::ahead>(bounds, phase, j);
  }
}

/// Fetches what the next head is going to read: its sums, the columns that enter soon, the tiles whose
/// bounds are due. State lies in pages of its own, which the processor does not foresee.
inline void prefetch_enter(op::lazy_enter<host_space> const& o, index_t b, index_t h) noexcept {
  lazy_job const job = make_job(o, b, h);
  lazy_shape const& s = job.head.shape();
  prefetch_row(o.state.head.at(job.id, h, 0), 5 * s.all_rows());
  index_t const oldest = job.oldest_recent();
  for (index_t k = -1; k + 1 < lazy_shape::ahead; ++k)
    if (oldest + k >= 0) prefetch_row(job.head.column(oldest + k), s.all_rows());
  prefetch_slots(job.positions, job.n);
  prefetch_slots(o.state.rows.at(job.id, h, job.newest % s.n_rows / 2, 0), job.n);
  for (index_t first = 0; first < job.n; first += lazy_shape::tile)
    for (index_t r = 0; r < s.slot_rows() && phase_of(job, first) == 0; ++r)
      prefetch_row(o.state.rows.at(job.id, h, r, first), lazy_shape::tile);
}

/// Whether the arrays of a lazy op are such that the kernels can read them.
template <class Op>
bool lazy_readable(Op const& o) noexcept {
  lazy_shape const& s = o.state.shape;
  return slots_contiguous(o.state.ring_q) && slots_contiguous(o.state.rows) &&
         slots_contiguous(o.state.head) && slots_contiguous(o.layer.slots.positions) &&
         o.fuse != reduction::mean && s.n_rows >= 1 && s.n_rows <= s.window &&
         s.n_rows <= lazy_shape::most_rows && s.window >= lazy_shape::ahead &&
         s.group == o.layer.kv.shape.group();
}

/// Takes rows into the state. Cost as the op says.
KVKEEP_CPU_OP status enqueue(context& c, op::lazy_enter<host_space> const& o,
                             workspace& ws) noexcept {
  kv_ref<host_space> const& kv = o.layer.kv;
  if (!readable(kv.k)) return status::unsupported;
  if (!lazy_readable(o) || !slots_contiguous(o.weights)) return status::bad_argument;
  workspace::frame const frame(ws);
  int const workers = c.workers(o.batch.n * kv.shape.n_kv_heads);
  auto const scratch = enter_scratch::take(ws, workers, kv, o.state.shape);
  if (!placed(ws)) return not_placed(ws);
  index_t const heads = kv.shape.n_kv_heads;
  for_heads(c, o.batch.n, heads, [&](index_t b, index_t h, int worker) {
    with_next_head(o.batch.n, heads, b, h,
                   [&](index_t b2, index_t h2) { prefetch_enter(o, b2, h2); });
    lazy_enter_head(o, scratch, b, h, worker);
  });
  return status::ok;
}

}  // namespace KVKEEP_CPU_ISA
}  // namespace kvkeep::cpu
