// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// CPU: decode attention, and attention weights of query rows.
#pragma once

#include <cmath>
#include <limits>

#include "../../op/attend.hpp"
#include "../../op/window_score.hpp"
#include "fold.hpp"
#include "rows.hpp"

namespace kvkeep::cpu {
inline namespace KVKEEP_CPU_ISA {

/// Scratch of one worker for the attention of one head.
struct attend_scratch {
  worker_scratch<void const*> pointers;  ///< [max_slots]
  worker_scratch<float> gathered;        ///< rows that kernels cannot read where they lie
  worker_scratch<float> logits;          ///< [group][max_slots]
  worker_scratch<float> shown;           ///< [group][max_slots] weights under a visibility mask
  worker_scratch<float> small;           ///< [2 * group + dim_v] factors of output and fold, values

  static attend_scratch take(workspace& ws, int workers, kv_ref<host_space> const& kv,
                             bool masked) {
    std::size_t const group = size_of(kv.shape.group()), slots = size_of(kv.shape.max_slots);
    attend_scratch s;
    s.pointers = take_each<void const*>(ws, workers, slots);
    s.gathered = take_each<float>(ws, workers, std::max(gather_floats(kv.k), gather_floats(kv.v)));
    s.logits = take_each<float>(ws, workers, group * slots);
    s.shown = take_each<float>(ws, workers, masked ? group * slots : 0);
    s.small = take_each<float>(ws, workers, 2 * group + size_of(kv.shape.dim_v));
    return s;
  }
};

/// Logits of the group's queries for all slots of a head.
/// @param z [group] rows of n floats, `stride` apart
inline void head_logits(head_rows const& k, query_rows const& q, index_t n, void const** pointers,
                        float* gathered, float* z, offset_t stride) noexcept {
  if (!direct(*k.p)) {
    for_row_chunks(k, {nullptr, 0, n}, gathered, [&](index_t at, index_t count, auto const* rows) {
      qk_rows(q, row_list<row_element<decltype(rows)>>{rows, count}, z + at, stride);
    });
    return;
  }
  visit_type(k.p->type, [&](auto const* type) {
    using T = std::remove_cv_t<std::remove_pointer_t<decltype(type)>>;
    if constexpr (in_place<T>) {
      T const** const rows = reinterpret_cast<T const**>(pointers);
      row_pointers(k, 0, n, rows);
      qk_rows(q, row_list<T>{rows, n}, z, stride);
    }
  });
}

/// out[g] = scale[g] * sum over slots of e[g][slot] * V[slot]; the same bits for every layout.
/// @param part [dim_v] scratch
inline void head_output(head_rows const& v, value_weights const& w, index_t n,
                        void const** pointers, float* gathered, float* part, float* out,
                        offset_t stride) noexcept {
  index_t const dim = v.p->dim;
  if (direct(*v.p)) {
    visit_type(v.p->type, [&](auto const* type) {
      using T = std::remove_cv_t<std::remove_pointer_t<decltype(type)>>;
      if constexpr (in_place<T>) {
        T const** const rows = reinterpret_cast<T const**>(pointers);
        row_pointers(v, 0, n, rows);
        av_rows(w, row_list<T>{rows, n}, dim, out, stride);
      }
    });
    return;
  }
  for_row_chunks(v, {nullptr, 0, n}, gathered, [&](index_t at, index_t count, auto const* rows) {
    for (index_t g = 0; g < w.n_rows; ++g) {
      value_weights const one{w.e + g * w.stride + at, w.stride, nullptr, 1};
      av_rows(one, row_list<row_element<decltype(rows)>>{rows, count}, dim, part, dim);
      float* const o = out + g * stride;
      float const last = at + count == n && w.scale != nullptr ? w.scale[g] : 1.0F;
      for (index_t d = 0; d < dim; ++d) o[d] = (at == 0 ? part[d] : o[d] + part[d]) * last;
    }
  });
}

/// The normaliser of a row with its sink logit, and the row's log-sum-exp.
struct row_normaliser {
  float sum = 0;  ///< sum of exp(z - max), the sink's term included
  float lse = 0;
};

inline row_normaliser normaliser(softmax_sum const& s, float const* sink) noexcept {
  double const top = static_cast<double>(s.max);
  double sum = static_cast<double>(s.sum);
  if (sink != nullptr) {
    double const z = static_cast<double>(first_lane(sanitise(splat(*sink))));
    double const lse = top + std::log(sum), above = std::max(lse, z);
    sum += std::exp(std::min(z - top, 80.0));  // more than that leaves no probability to the slots
    return {static_cast<float>(sum),
            static_cast<float>(above + std::log1p(std::exp(std::min(lse, z) - above)))};
  }
  return {static_cast<float>(sum), static_cast<float>(top + std::log(sum))};
}

/// Softmax of one query row over the slots that it sees. Hidden slots get weight 0; nothing seen:
/// sum 0.
inline softmax_sum softmax_shown(float const* z, std::uint8_t const* visible, index_t n,
                                 float* e) noexcept {
  bool any = false;
  for (index_t j = 0; j < n; ++j) {
    bool const see = visible[j] != 0;
    e[j] = see ? z[j] : -FLT_MAX;
    any |= see;
  }
  softmax_sum s = softmax_row(e, n, e);
  if (s.max > -FLT_MAX) return s;
  s.sum = 0;  // hidden slots look like the lowest logit here
  for (index_t j = 0; j < n; ++j) s.sum += e[j] = any && visible[j] != 0 ? 1.0F : 0.0F;
  return s;
}

/// Attention of one entry and KV head.
inline void attend_head(op::attend<host_space> const& o, attend_scratch const& scratch, index_t b,
                        index_t h, int worker) noexcept {
  kv_ref<host_space> const& kv = o.layer.kv;
  index_t const group = kv.shape.group(), id = o.batch.id_of(b), seq = o.batch.row_of(b);
  index_t const n = o.layer.slots.lengths(id, h), ring = o.weight_row ? o.weight_row[b] : 0;
  bool const keep = o.weights.data != nullptr;
  float* const z = keep ? o.weights.at(id, h, 0, 0) + ring * o.ring_stride : scratch.logits(worker);
  offset_t const stride = keep ? o.weights.stride[2] : kv.shape.max_slots;
  float* const small = scratch.small(worker);
  float* const inverse = small + group;
  void const** const pointers = scratch.pointers(worker);
  float* const gathered = scratch.gathered(worker);

  query_rows const q{o.q.at(b, h * group, 0), o.q.stride[1], group, kv.shape.dim_k, form_of(kv)};
  head_logits({&kv.k, seq, h}, q, n, pointers, gathered, z, stride);
  value_weights w{z, stride, small, group};
  if (o.visible.data != nullptr) w.e = scratch.shown(worker), w.stride = kv.shape.max_slots;
  for (index_t g = 0; g < group; ++g) {
    float const* const sink = kv.sink_logits ? kv.sink_logits + h * group + g : nullptr;
    float* const row = z + g * stride;
    softmax_sum shown;
    if (o.visible.data != nullptr) {
      float* const e = scratch.shown(worker) + static_cast<offset_t>(g) * kv.shape.max_slots;
      shown = softmax_shown(row, o.visible.at(b, h * group + g, 0), n, e);
    }
    softmax_sum const all = n > 0 ? softmax_row(row, n, row) : softmax_sum{};
    if (o.visible.data == nullptr) shown = all;
    float const sum = n > 0 ? normaliser(all, sink).sum : 0.0F;
    if (o.weight_sum.data != nullptr) o.weight_sum(id, h, g, ring) = sum;
    if (o.weight_max.data != nullptr) o.weight_max(id, h, g, ring) = all.max;
    inverse[g] = inverse_of(sum);
    row_normaliser const r = normaliser(shown, sink);
    bool const empty = !(shown.sum > 0);
    small[g] = empty ? 0.0F : 1.0F / r.sum;
    if (o.lse.data != nullptr)
      o.lse(b, h * group + g) = empty ? -std::numeric_limits<float>::infinity() : r.lse;
  }
  if (o.fold.out.data != nullptr)
    fold_head(o.fold, {z, stride, inverse, group}, o.fold.out_by_id ? id : b, id, h, n);
  if (o.out.data != nullptr)
    head_output({&kv.v, seq, h}, w, n, pointers, gathered, inverse + group,
                o.out.at(b, h * group, 0), o.out.stride[1]);
  // gathered planes write nothing for a head without slots
  for (index_t g = 0; n == 0 && o.out.data != nullptr && g < group; ++g)
    for (index_t d = 0; d < kv.shape.dim_v; ++d) o.out(b, h * group + g, d) = 0;
}

/// Floats that raw queries need.
inline std::size_t raw_floats(op::attend<host_space> const& o) noexcept {
  cache_shape const& s = o.layer.kv.shape;
  return o.raw.n_rows > 0 ? product(o.batch.n, s.n_q_heads, s.dim_k) : 0;
}
/// The same op with its raw queries as floats. @param dense [entry][q_head][dim_k]
inline op::attend<host_space> with_floats(op::attend<host_space> const& o, float* dense) noexcept {
  cache_shape const& s = o.layer.kv.shape;
  for (index_t b = 0; b < o.batch.n; ++b)
    for (index_t h = 0; h < s.n_q_heads; ++h) {
      float* const to = dense + (static_cast<offset_t>(b) * s.n_q_heads + h) * s.dim_k;
      for (index_t d = 0; d < s.dim_k; ++d)
        to[d] = query_feature(o.raw, b * o.raw.entry_stride + h * o.raw.head_stride + d);
    }
  op::attend<host_space> r = o;
  r.q = row_major<host_space>(static_cast<float const*>(dense), o.batch.n, s.n_q_heads, s.dim_k);
  return r;
}

/// Attention of every entry and KV head. Cost as the op says.
KVKEEP_CPU_OP status enqueue(context& c, op::attend<host_space> const& o, workspace& ws) noexcept {
  kv_ref<host_space> const& kv = o.layer.kv;
  if (!readable(kv.k) || (o.out.data != nullptr && !readable(kv.v)) || !is_query(o.raw.type))
    return status::unsupported;
  if (!slots_contiguous(o.q) || !slots_contiguous(o.out) || !slots_contiguous(o.weights) ||
      !slots_contiguous(o.visible) || !slots_contiguous(o.fold.out))
    return status::bad_argument;
  workspace::frame const frame(ws);
  int const workers = c.workers(o.batch.n * kv.shape.n_kv_heads);
  bool const masked = o.visible.data != nullptr;
  attend_scratch const scratch = attend_scratch::take(ws, workers, kv, masked);
  float* const dense = ws.take<float>(raw_floats(o));
  if (!placed(ws)) return not_placed(ws);
  if (!o.asks()) return status::ok;
  auto const run = [&](op::attend<host_space> const& each) {
    for_heads(c, o.batch.n, kv.shape.n_kv_heads,
              [&](index_t b, index_t h, int worker) { attend_head(each, scratch, b, h, worker); });
  };
  if (o.raw.n_rows > 0)
    run(with_floats(o, dense));
  else
    run(o);
  return status::ok;
}

/// Weights of all present rows of one entry and KV head; chunks of keys pass over all rows.
inline void row_weights_head(op::row_weights<host_space> const& o, float* gathered, index_t b,
                             index_t h) noexcept {
  kv_ref<host_space> const& kv = o.layer.kv;
  index_t const group = kv.shape.group(), id = o.batch.id_of(b), src = o.rows.by_id ? id : b;
  index_t const n = o.layer.slots.lengths(id, h), n_rows = o.rows.q.extent[2];
  offset_t const stride = o.weights.stride[2];
  auto const ring_of = [&](index_t r) { return o.rows.position(src, r) % o.ring; };
  for_row_chunks({&kv.k, o.batch.row_of(b), h}, {nullptr, 0, n}, gathered,
                 [&](index_t at, index_t count, auto const* rows) {
                   for (index_t r = 0; r < n_rows; ++r) {
                     if (o.rows.position(src, r) < 0) continue;
                     query_rows const q{o.rows.q.at(src, h * group, r, 0), o.rows.q.stride[1],
                                        group, kv.shape.dim_k, form_of(kv)};
                     float* const z = o.weights.at(id, h, 0, at) + ring_of(r) * o.ring_stride;
                     qk_rows(q, row_list<row_element<decltype(rows)>>{rows, count}, z, stride);
                   }
                 });
  for (index_t r = 0; r < n_rows; ++r) {
    if (o.rows.position(src, r) < 0) continue;
    for (index_t g = 0; g < group; ++g) {
      float const* const sink = kv.sink_logits ? kv.sink_logits + h * group + g : nullptr;
      float* const z = o.weights.at(id, h, g, 0) + ring_of(r) * o.ring_stride;
      softmax_sum const s = n > 0 ? softmax_row(z, n, z) : softmax_sum{};
      if (o.weight_sum.data != nullptr)
        o.weight_sum(id, h, g, ring_of(r)) = n > 0 ? normaliser(s, sink).sum : 0.0F;
    }
  }
}

/// Weights of query rows. Cost: K once, 2 * dim_k flops and one exponential per row, head and slot.
KVKEEP_CPU_OP status enqueue(context& c, op::row_weights<host_space> const& o,
                             workspace& ws) noexcept {
  kv_ref<host_space> const& kv = o.layer.kv;
  if (!readable(kv.k)) return status::unsupported;
  if (!slots_contiguous(o.rows.q) || !slots_contiguous(o.weights) || o.ring < 1)
    return status::bad_argument;
  workspace::frame const frame(ws);
  int const workers = c.workers(o.batch.n * kv.shape.n_kv_heads);
  auto const gathered = take_each<float>(ws, workers, gather_floats(kv.k));
  if (!placed(ws)) return not_placed(ws);
  for_heads(c, o.batch.n, kv.shape.n_kv_heads,
            [&](index_t b, index_t h, int worker) { row_weights_head(o, gathered(worker), b, h); });
  return status::ok;
}

}  // namespace KVKEEP_CPU_ISA
}  // namespace kvkeep::cpu
