// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// Work per slot: means, folds, reductions, pooling, user functors. One thread per slot.
#pragma once

#include "../../../op/accumulate.hpp"
#include "../../../op/reduce.hpp"
#include "../../../op/score_slots.hpp"
#include "../../../op/window_score.hpp"
#include "guard.cuh"
#include "rows.cuh"
#include "stages.cuh"

namespace kvkeep::cuda {

/// Of all heads of an entry.
struct mean_heads_slots {
  op::mean_heads<device_space> o;

  __device__ index_t count(block_head const& at) const {
    return o.slots.lengths(o.batch.id_of(at.entry), 0);
  }
  __device__ void operator()(block_head const& at, index_t j) const {
    index_t const b = at.entry, heads = o.slots.lengths.extent[1];
    float sum = o.scores(b, 0, j);
    for (index_t h = 1; h < heads; ++h) sum = __fadd_rn(sum, o.scores(b, h, j));
    float const mean = __fdiv_rn(sum, static_cast<float>(heads));
    for (index_t h = 0; h < heads; ++h) o.scores(b, h, j) = mean;
  }
};

struct mean_layers_slots {
  op::mean_layers<device_space> o;

  __device__ index_t count(block_head const& at) const {
    return o.slots.lengths(o.batch.id_of(at.entry), at.head);
  }
  __device__ void operator()(block_head const& at, index_t j) const {
    float sum = o.scores(at.entry, at.head, j);
    if (!o.first) sum = __fadd_rn(o.sum(at.entry, at.head, j), sum);
    o.sum(at.entry, at.head, j) = o.last ? __fdiv_rn(sum, static_cast<float>(o.n_layers)) : sum;
  }
};

/// Factor that turns weights into probabilities.
__device__ inline float inverse_of(float sum) { return sum > 0 ? __fdiv_rn(1.0f, sum) : 0.0f; }

/// Some slots of a thread, `step` apart. Those from `end` on are none: the first one stands for them where they are
/// read.
template <int N>
struct some_slots {
  index_t first, step, end;

  __device__ bool has(int i) const { return first + i * step < end; }
  __device__ index_t operator[](int i) const { return has(i) ? first + i * step : first; }
};

/// Folds the weights of some slots, as in attention: of every query head of a group, in order. What was there is read
/// for all of them at once.
template <int N>
class slot_fold {
 public:
  /// @param at row of `fold.out`: entry or id
  __device__ slot_fold(weight_fold<device_space> const& fold, index_t at, index_t id, index_t h,
                       some_slots<N> const& slots, index_t group)
      : fold_(fold), slots_(slots), out_(fold.out.at(at, h, 0, 0)), last_(group - 1) {
    if (!fold.clear && fold.fresh_slot.data != nullptr) fresh_ = fold.fresh_slot(id, h);
    if (!fold.per_query_head) read(out_);
  }
  /// @param inverse of the row's sum
  __device__ void add(index_t g, float const (&weight)[N], float inverse) {
    bool const alone = fold_.per_query_head;
    unrolled<N>([&](int i) {
      sum_[i] =
          alone || g == 0 ? __fmul_rn(weight[i], inverse) : __fmaf_rn(weight[i], inverse, sum_[i]);
    });
    if (!alone && g < last_) return;
    float* const out = out_ + (alone ? g * fold_.out.stride[2] : 0);
    if (alone) read(out);
    unrolled<N>([&](int i) {
      float const term = __fmul_rn(sum_[i], fold_.scale);
      if (slots_.has(i)) out[slots_[i]] = fold_.clear ? term : __fadd_rn(was_[i], term);
    });
  }

 private:
  __device__ void read(float const* out) {
    if (fold_.clear) return;
    unrolled<N>([&](int i) { was_[i] = slots_[i] == fresh_ ? 0.0f : out[slots_[i]]; });
  }

  weight_fold<device_space> const& fold_;
  some_slots<N> slots_;
  float* out_;
  index_t last_;
  index_t fresh_ = -1;
  float was_[N], sum_[N];
};

struct accumulate_slots {
  op::accumulate<device_space> o;
  struct loaded {
    float weight, sum;
  };

  __device__ index_t count(block_head const& at) const {
    return o.slots.lengths(o.batch.id_of(at.entry), at.head);
  }
  __device__ void operator()(block_head const& at, index_t j) const {
    index_t const id = o.batch.id_of(at.entry), group = o.weights.extent[2];
    index_t const ring = o.ring_row != nullptr ? o.ring_row[at.entry] : 0;
    slot_fold<1> fold(o.fold, o.fold.out_by_id ? id : at.entry, id, at.head, {j, 1, j + 1}, group);
    each_query_head(
        group,
        [&](index_t g) {
          return loaded{o.weights.at(id, at.head, g, 0)[ring * o.ring_stride + j],
                        o.weight_sum(id, at.head, g, ring)};
        },
        [&](index_t g, loaded const& x) { fold.add(g, {x.weight}, inverse_of(x.sum)); });
  }
};

struct reduce_rows_slots {
  op::reduce_rows<device_space> o;

  __device__ index_t count(block_head const& at) const {
    return o.slots.lengths(o.batch.id_of(at.entry), at.head);
  }
  __device__ void operator()(block_head const& at, index_t j) const {
    index_t const id = o.batch.id_of(at.entry), n_rows = o.in.extent[2];
    float const least = __uint_as_float(0xff800000u);  // -infinity; a maximum ignores NaN
    float const* const in = o.in.at(o.in_by_id ? id : at.entry, at.head, 0, j);
    float x = o.how == reduction::max ? max(in[0], least) : in[0];
    for (index_t r = 1; r < n_rows; ++r) {
      float const y = in[r * o.in.stride[2]];
      x = o.how == reduction::max ? (y > x ? y : x) : __fadd_rn(x, y);
    }
    if (o.how == reduction::mean) x = __fdiv_rn(x, static_cast<float>(n_rows));
    x = __fmul_rn(x, o.scale);
    if (o.by_age)
      x = __fdiv_rn(x, static_cast<float>(o.seen[id] - o.slots.positions(id, at.head, j)));
    o.out(at.entry, at.head, j) = x;
  }
};

/// A thread's slot through the user's functor. @param copies [heads][slots][floats()] scratch for rows that do not lie
/// as floats, or null
template <class Fn>
struct functor_slots {
  op::score_slots<Fn, device_space> o;
  float* copies;
  bool copy_k, copy_v;

  /// Of a slot's rows that are copied.
  KVKEEP_HD index_t floats() const {
    cache_shape const& s = o.layer.kv.shape;
    return (copy_k ? s.dim_k : 0) + (copy_v ? s.dim_v : 0);
  }
  __device__ index_t count(block_head const& at) const {
    return o.layer.slots.lengths(o.batch.id_of(at.entry), at.head);
  }
  __device__ void operator()(block_head const& at, index_t j) const {
    kv_ref<device_space> const& kv = o.layer.kv;
    index_t const id = o.batch.id_of(at.entry), seq = o.batch.row_of(at.entry);
    if (o.only.data != nullptr ? o.only(id, at.head) != j : j < o.first_slot) return;
    float* copy = copies;
    if (copies != nullptr)
      copy += (static_cast<offset_t>(at.place) * kv.shape.max_slots + j) * floats();
    slot_values v;
    v.position = o.layer.slots.positions(id, at.head, j);
    v.seen = o.seen != nullptr ? o.seen[id] : 0;
    v.dim_k = kv.shape.dim_k;
    v.dim_v = kv.shape.dim_v;
    v.entry = at.entry;
    v.head = at.head;
    v.slot = j;
    if constexpr (Fn::reads_k) v.k = row_of(kv.k, seq, at.head, j, copy_k, copy);
    if constexpr (Fn::reads_v)
      v.v = row_of(kv.v, seq, at.head, j, copy_v, copy + (copy_k ? kv.shape.dim_k : 0));
    o.out(o.out_by_id ? id : at.entry, at.head, j) = o.fn(static_cast<slot_values const&>(v));
  }

 private:
  __device__ static float const* row_of(plane_ref<device_space> const& p, index_t seq, index_t head,
                                        index_t slot, bool copies, float* copy) {
    head_rows const rows(p, seq, head);
    if (!copies) return rows.template row<float>(slot);
    std::byte const* const row = rows.bytes(slot);
    for (index_t d = 0; d < p.dim; ++d) copy[d] = feature(p, row, d);
    return copy;
  }
};

template <class Fn>
struct for_each_kernel {
  static constexpr int most_threads = 256, blocks_per_sm = 1;
  op::for_each<Fn, device_space> o;

  __device__ void operator()() const {
    index_t const i = static_cast<index_t>(blockIdx.x) * threads_of_block() + thread_of_block();
    Fn fn = o.fn;
    if (i < o.n) fn(i);
  }
};

/// The indices of a place, by the last threads: the first ones have other work in most stages.
template <class Fn>
struct for_each_stage {
  static constexpr int most_threads = 1024;
  op::for_each<Fn, device_space> o;

  static constexpr std::size_t shared_bytes() { return 0; }
  __device__ void operator()(block_head const& at) const {
    index_t const each = o.n / at.n_places, first = at.place * each;
    Fn fn = o.fn;
    int const thread = threads_of_block() - 1 - thread_of_block();
    for (index_t i = thread; i < each; i += threads_of_block()) fn(first + i);
  }
};

}  // namespace kvkeep::cuda
