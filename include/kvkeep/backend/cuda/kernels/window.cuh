// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// What the kernels that score slots by query rows share: the rows, their logits and normalisers.
/// Logits are in base 2, so that a weight is one power of two.
#pragma once

#include "../../../op/window_score.hpp"
#include "../window_plan.hpp"
#include "guard.cuh"
#include "rows.cuh"

namespace kvkeep::cuda {

inline constexpr float log2_e = 1.4426950408889634f;
inline constexpr index_t above_positions = 0x7fffffff;

/// Query rows: as an op has them, or in a ring, where row r lies in row `position % ring`.
struct row_source {
  tensor_ref<float const, 4, device_space> q{};
  tensor_ref<index_t const, 2, device_space> position{};
  tensor_ref<float const, 3, device_space> lse{};
  bool q_by_id = false;
  bool position_by_id = false;
  index_t ring = 0;

  static row_source of(query_rows<device_space> const& r) noexcept {
    return {r.q, r.position, r.lse, r.by_id, r.by_id, 0};
  }
};

/// A logit times log2(e): the dot product times `factor`, then this. NaN becomes the lowest number.
struct logit2_form {
  float factor = 1;
  float softcap = 0;

  __device__ explicit logit2_form(kv_ref<device_space> const& kv) {
    softcap = kv.softcap;
    factor = softcap > 0 ? kv.scale : __fmul_rn(kv.scale, log2_e);
  }
  __device__ float operator()(float z) const {
    float const finite = min(max(z, -largest_float), largest_float);  // of NaN: the lowest
    if (!(softcap > 0) || (__float_as_uint(z) & 0x7fffffffu) > 0x7f800000u) return finite;
    return __fmul_rn(softcap * log2_e, tanhf(__fdiv_rn(finite, softcap)));
  }
};

/// Part of a row's normaliser: the largest logit and the sum of powers relative to it.
struct row_sum {
  float top = -largest_float;
  float sum = 0;
};
__device__ inline row_sum join(row_sum const& a, row_sum const& b) {
  float const top = max(a.top, b.top);
  return {top,
          __fadd_rn(__fmul_rn(a.sum, exp2f(a.top - top)), __fmul_rn(b.sum, exp2f(b.top - top)))};
}

/// p = inverse * 2^(z - shift). A row that saw nothing has no say.
struct row_norm {
  float shift = largest_float;
  float inverse = 0;
};
__device__ inline row_norm norm_of(row_sum const& s) {
  return s.sum > 0 ? row_norm{s.top, __fdiv_rn(1.0f, s.sum)} : row_norm{};
}
/// @param lse natural log; that of a row that saw nothing may be -infinity, one of the largest logits is clamped as these
/// are, so that such a logit's weight is 1
__device__ inline row_norm norm_of(float lse) {
  if (!(lse > -largest_float)) return {};
  return {min(max(__fmul_rn(lse, log2_e), -largest_float), largest_float), 1.0f};
}

/// What is known of a query before its row has been normalised.
struct split_query {
  float factor;   ///< of the dot product
  index_t limit;  ///< last position that the query sees
  int uneven;     ///< whether the second number has a say
};

/// Queries as sums of two 16-bit numbers, in rows of whole blocks of 32 features. The second one is 0 if
/// queries were 16-bit numbers at first.
struct split_queries {
  uint4* high = nullptr;         ///< [head][query][pieces]
  uint4* rest = nullptr;         ///< the same
  split_query* query = nullptr;  ///< [head][query]
};

/// What the kernels of one op work on.
struct window_job {
  batch_ref<device_space> batch{};
  layer_ref<device_space> layer{};
  row_source rows{};
  index_t first_row = 0;
  index_t n_rows = 0;
  index_t const* limit = nullptr;    ///< [head] rows see positions up to it; null: up to their own
  index_t const* skipped = nullptr;  ///< [head] not 0: there is nothing to do; null: nowhere
  row_sum* slices = nullptr;         ///< [head][slice][query]
  row_norm* norms = nullptr;         ///< [head][query]
  index_t n_slices = 0;
  index_t slice_slots = cuda::slice_slots;
  split_queries split{};  ///< where keys are 16-bit numbers

  KVKEEP_HD index_t group() const noexcept { return layer.kv.shape.group(); }
  KVKEEP_HD index_t n_queries() const noexcept { return n_rows * group(); }
};

/// One entry and KV head of a job; `blockIdx.x` numbers them. Query i is head i % group of row i / group.
struct window_head {
  window_job const& job;
  block_head at;
  index_t id, seq, group, n;
  index_t const* positions;

  __device__ explicit window_head(window_job const& j)
      : job(j),
        at(j.layer.kv.shape.n_kv_heads),
        id(j.batch.id_of(at.entry)),
        seq(j.batch.row_of(at.entry)),
        group(j.group()),
        n(j.layer.slots.lengths(id, at.head)),
        positions(j.layer.slots.positions.at(id, at.head, 0)) {
    if (j.skipped != nullptr && j.skipped[blockIdx.x] != 0) n = 0;
  }
  __device__ index_t position(index_t row) const {
    return job.rows.position(job.rows.position_by_id ? id : at.entry, job.first_row + row);
  }
  /// The last position that a row sees; an absent row sees none.
  __device__ index_t limit(index_t row) const {
    index_t const p = position(row);
    return p < 0 ? no_position : job.limit != nullptr ? job.limit[blockIdx.x] : p;
  }
  __device__ float const* query(index_t row, index_t g) const {
    row_source const& r = job.rows;
    index_t const from = r.ring > 0 ? position(row) % r.ring : job.first_row + row;
    return r.q.at(r.q_by_id ? id : at.entry, at.head * group + g, from, 0);
  }
  __device__ row_norm norm(index_t row, index_t g) const {
    row_source const& r = job.rows;
    if (r.lse.data == nullptr)
      return job.norms[static_cast<offset_t>(blockIdx.x) * job.n_queries() + row * group + g];
    return norm_of(r.lse(r.q_by_id ? id : at.entry, at.head * group + g, job.first_row + row));
  }
  __device__ row_sum* slice(index_t s) const {
    return job.slices + (static_cast<offset_t>(blockIdx.x) * job.n_slices + s) * job.n_queries();
  }
};

/// Normalisers from the slices' shares, slices ascending. A thread per query (grid: heads, strides).
struct join_slices_kernel {
  static constexpr int most_threads = 128, blocks_per_sm = 1;
  window_job job;
  float const* sinks;  ///< [n_q_heads] or null

  __device__ void operator()() const {
    window_head const h(job);
    index_t const i = static_cast<index_t>(blockIdx.y) * threads_of_block() + thread_of_block();
    if (i >= job.n_queries()) return;
    row_sum s;
    for (index_t j = 0; j * job.slice_slots < h.n; ++j) s = join(s, h.slice(j)[i]);
    if (sinks != nullptr && s.sum > 0) {
      float const z = __fmul_rn(sanitise(sinks[h.at.head * h.group + i % h.group]), log2_e);
      s = join(s, {max(z, -largest_float), 1.0f});
    }
    job.norms[static_cast<offset_t>(blockIdx.x) * job.n_queries() + i] = norm_of(s);
  }
};

/// The last old position of each head: those above it are the `recent` largest. A block per head.
struct old_limits {
  batch_ref<device_space> batch;
  slot_state<device_space> slots;
  index_t recent;
  index_t* limit;  ///< [head]

  static constexpr std::size_t shared_bytes() { return shared_pieces::bytes<int>(guard_box_size); }
  /// The first thread writes it.
  __device__ void find() const {
    shared_pieces shared;
    block_head const at(slots.lengths.extent[1]);
    index_t const id = batch.id_of(at.entry);
    open_range const open =
        find_open(slots.positions.at(id, at.head, 0), slots.lengths(id, at.head), {0, recent, 0},
                  shared.take<int>(guard_box_size));
    if (thread_of_block() == 0) limit[blockIdx.x] = open.to == no_position ? open.to : open.to - 1;
  }
};
struct old_limit_kernel {
  static constexpr int most_threads = 1024, blocks_per_sm = 1;
  old_limits of;

  __device__ void operator()() const { of.find(); }
};

/// How MorphKV makes a score of a slot's weights.
struct row_fusion {
  reduction fuse;

  __device__ float operator()(float x, float y) const {
    return fuse == reduction::max ? max(x, y) : __fadd_rn(x, y);
  }
  /// `score`, or what a slot gets that the rows do not rank.
  __device__ static float ranked(index_t position, index_t last_old, bool any_row, float score) {
    if (position > last_old) return __uint_as_float(0x7f800000u);
    return any_row ? score : static_cast<float>(position);
  }
  /// Whether some row of a head is there, in every thread of the block.
  __device__ static bool any_row(window_head const& h) {
    bool present = false;
    for (index_t r = thread_of_block(); r < h.job.n_rows; r += threads_of_block())
      present = present || h.position(r) >= 0;
    return __syncthreads_or(present ? 1 : 0) != 0;
  }
};

}  // namespace kvkeep::cuda
