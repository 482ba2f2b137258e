// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// Scoring by query rows in fp32 on any rows: a block owns some slots of a head and streams the queries
/// in order, so that every slot's sum has one order and nothing is shared between blocks.
#pragma once

#include "window.cuh"

namespace kvkeep::cuda {

inline constexpr index_t plain_slots = 64, plain_queries = 32, plain_dims = 32;
inline constexpr int plain_threads = 128;

/// 64 slots by 32 packed queries of a head.
struct plain_tile {
  static constexpr index_t slot_stride = plain_slots + 4, query_stride = plain_queries + 4;
  float* k;            ///< [plain_dims][slot_stride]
  float* q;            ///< [plain_dims][query_stride]
  float* z;            ///< [plain_queries][slot_stride]
  index_t* positions;  ///< [plain_slots] of the slots
  index_t* limits;     ///< [plain_queries]
  row_norm* norms;     ///< [plain_queries]
  int* box;            ///< [warps]

  __device__ explicit plain_tile(shared_pieces& s)
      : k(s.take<float>(plain_dims * slot_stride)),
        q(s.take<float>(plain_dims * query_stride)),
        z(s.take<float>(plain_queries * slot_stride)),
        positions(s.take<index_t>(plain_slots)),
        limits(s.take<index_t>(plain_queries)),
        norms(s.take<row_norm>(plain_queries)),
        box(s.take<int>(warp_size)) {}
  static constexpr std::size_t bytes() {
    return shared_pieces::bytes<float>(plain_dims * slot_stride) +
           shared_pieces::bytes<float>(plain_dims * query_stride) +
           shared_pieces::bytes<float>(plain_queries * slot_stride) +
           shared_pieces::bytes<index_t>(plain_slots) +
           shared_pieces::bytes<index_t>(plain_queries) +
           shared_pieces::bytes<row_norm>(plain_queries) + shared_pieces::bytes<int>(warp_size);
  }

  /// Positions of slots from `first` on. @return the lowest, in every thread
  __device__ index_t take_slots(window_head const& h, index_t first) const {
    index_t lowest = above_positions;
    for (index_t j = thread_of_block(); j < plain_slots; j += threads_of_block()) {
      positions[j] = first + j < h.n ? h.positions[first + j] : above_positions;
      lowest = min(lowest, positions[j]);
    }
    return block_reduce(lowest, box, smaller{});
  }
  /// Limits (and normalisers) of the `count` queries from `first` on; the rest sees nothing.
  __device__ void take_queries(window_head const& h, index_t first, index_t count,
                               bool normed) const {
    for (index_t i = thread_of_block(); i < plain_queries; i += threads_of_block()) {
      index_t const row = (first + i) / h.group;
      limits[i] = i < count ? h.limit(row) : no_position;
      if (normed && i < count) norms[i] = h.norm(row, (first + i) % h.group);
    }
  }
  /// Fills z with f(i, j, logit) of query i and slot j. Features are summed in ascending order.
  template <class F>
  __device__ void fill(window_head const& h, index_t first_slot, index_t first_query,
                       F const& f) const {
    plane_ref<device_space> const& plane = h.job.layer.kv.k;
    head_rows const rows(plane, h.seq, h.at.head);
    logit2_form const form(h.job.layer.kv);
    int const column = thread_of_block() % 16 * 4, row = thread_of_block() / 16 * 4;
    float sum[4][4] = {};
    for (index_t d0 = 0; d0 < plane.dim; d0 += plain_dims) {
      __syncthreads();
      take_dims(h, rows, first_slot, first_query, d0);
      __syncthreads();
      index_t const dims = min(plain_dims, plane.dim - d0);
      for (index_t d = 0; d < dims; ++d) {
        float const* const a = q + d * query_stride + row;
        float const* const b = k + d * slot_stride + column;
        for (int i = 0; i < 4; ++i)
          for (int j = 0; j < 4; ++j) sum[i][j] = __fmaf_rn(a[i], b[j], sum[i][j]);
      }
    }
    for (int i = 0; i < 4; ++i)
      for (int j = 0; j < 4; ++j)
        z[(row + i) * slot_stride + column + j] =
            f(row + i, column + j, form(__fmul_rn(sum[i][j], form.factor)));
  }

 private:
  /// Features from d0 on of the tile's keys and queries; zeros where there is none.
  __device__ void take_dims(window_head const& h, head_rows const& rows, index_t first_slot,
                            index_t first_query, index_t d0) const {
    plane_ref<device_space> const& plane = h.job.layer.kv.k;
    index_t const d = thread_of_block() % plain_dims, step = threads_of_block() / plain_dims;
    bool const inside = d0 + d < plane.dim;
    for (index_t j = thread_of_block() / plain_dims; j < plain_slots; j += step)
      k[d * slot_stride + j] = inside && first_slot + j < h.n
                                   ? feature(plane, rows.bytes(first_slot + j), d0 + d)
                                   : 0.0f;
    for (index_t i = thread_of_block() / plain_dims; i < plain_queries; i += step) {
      index_t const packed = first_query + i;
      q[d * query_stride + i] = inside && limits[i] != no_position
                                    ? h.query(packed / h.group, packed % h.group)[d0 + d]
                                    : 0.0f;
    }
  }
};

struct plain_kernel {
  static constexpr int most_threads = plain_threads, blocks_per_sm = 4;
};

/// A slice's share of the normalisers of 32 queries. Grid: heads, slices by tiles of queries.
struct plain_slices_kernel : plain_kernel {
  window_job job;

  __device__ void operator()() const {
    shared_pieces shared;
    plain_tile const tile(shared);
    window_head const h(job);
    index_t const tiles = static_cast<index_t>(ceil_div(job.n_queries(), plain_queries));
    index_t const slice = static_cast<index_t>(blockIdx.y) / tiles;
    index_t const first = static_cast<index_t>(blockIdx.y) % tiles * plain_queries;
    index_t const count = min(plain_queries, job.n_queries() - first);
    index_t const begin = slice * job.slice_slots, end = min(h.n, begin + job.slice_slots);
    if (begin >= h.n) return;
    int const query = thread_of_block() / 4, part = thread_of_block() % 4;
    float const* const z = tile.z + query * plain_tile::slot_stride + part;
    tile.take_queries(h, first, count, false);
    row_sum own;
    for (index_t j = begin; j < end; j += plain_slots) {
      tile.take_slots(h, j);
      tile.fill(h, j, first, [&](index_t i, index_t s, float x) {
        return tile.positions[s] <= tile.limits[i] ? x : __uint_as_float(0xff800000u);
      });
      __syncthreads();
      float top = own.top;
      for (int s = 0; s < plain_slots; s += 4) top = max(top, z[s]);
      own.sum = __fmul_rn(own.sum, exp2f(own.top - top));
      own.top = top;
      for (int s = 0; s < plain_slots; s += 4) own.sum = __fadd_rn(own.sum, exp2f(z[s] - top));
    }
    for (int step = 1; step < 4; step *= 2)
      own = join(own, {__shfl_xor_sync(all_lanes, own.top, step),
                       __shfl_xor_sync(all_lanes, own.sum, step)});
    if (part == 0 && query < count) h.slice(slice)[first + query] = own;
  }
};

/// Calls f(chain, slot of the tile) by the thread whose pair it is, the same one each time.
template <class F>
__device__ void each_chain(index_t chains, index_t n_slots, F const& f) {
  for (index_t x = thread_of_block(); x < chains * plain_slots; x += threads_of_block())
    if (x % plain_slots < n_slots) f(x / plain_slots, x % plain_slots);
}

/// Calls f(first, count) when z has the weights of queries [first, first + count) for the tile's slots, wherever one of
/// them sees one of these.
template <class F>
__device__ void each_weights(plain_tile const& tile, window_head const& h, index_t first_slot,
                             F const& f) {
  index_t const lowest = tile.take_slots(h, first_slot), n_queries = h.job.n_queries();
  for (index_t first = 0; first < n_queries; first += plain_queries) {
    index_t const count = min(plain_queries, n_queries - first);
    __syncthreads();
    tile.take_queries(h, first, count, true);
    __syncthreads();
    bool const sees = tile.limits[thread_of_block() % plain_queries] >= lowest;
    if (__syncthreads_or(sees ? 1 : 0) == 0) continue;
    tile.fill(h, first_slot, first, [&](index_t i, index_t s, float z) {
      if (tile.positions[s] > tile.limits[i]) return 0.0f;
      return __fmul_rn(exp2f(z - tile.norms[i].shift), tile.norms[i].inverse);
    });
    __syncthreads();
    f(first, count);
  }
}

/// Adds to 64 slots what they receive from all rows. Grid: heads, strips of slots.
struct plain_sums_kernel : plain_kernel {
  window_job job;
  tensor_ref<float, 4, device_space> out;
  bool out_by_id, per_query_head, clear;

  __device__ void operator()() const {
    shared_pieces shared;
    plain_tile const tile(shared);
    window_head const h(job);
    index_t const first_slot = static_cast<index_t>(blockIdx.y) * plain_slots;
    if (first_slot >= h.n) return;
    float* const own = out.at(out_by_id ? h.id : h.at.entry, h.at.head, 0, first_slot);
    index_t const chains = per_query_head ? h.group : 1, n_slots = h.n - first_slot;
    if (clear)
      each_chain(chains, n_slots, [&](index_t c, index_t s) { own[c * out.stride[2] + s] = 0; });
    each_weights(tile, h, first_slot, [&](index_t first, index_t count) {
      each_chain(chains, n_slots, [&](index_t c, index_t s) {
        float sum = own[c * out.stride[2] + s];
        for (index_t i = (c - first % chains + chains) % chains; i < count; i += chains)
          sum = __fadd_rn(sum, tile.z[i * plain_tile::slot_stride + s]);
        own[c * out.stride[2] + s] = sum;
      });
    });
  }
};

/// Moments of what 64 slots receive from all rows. Grid: heads, strips of slots.
struct plain_moments_kernel : plain_kernel {
  window_job job;
  tensor_ref<float, 4, device_space> out;
  float least_weight;  ///< under the logarithm
  bool clear;

  __device__ void operator()() const {
    shared_pieces shared;
    plain_tile const tile(shared);
    window_head const h(job);
    index_t const first_slot = static_cast<index_t>(blockIdx.y) * plain_slots;
    if (first_slot >= h.n) return;
    float* const own = out.at(h.at.entry, h.at.head, 0, first_slot);
    index_t const n_slots = h.n - first_slot, absent = absent_rows(h, tile.box);
    if (clear)
      each_chain(op::column_moments<device_space>::moments * h.group, n_slots,
                 [&](index_t row, index_t s) { own[row * out.stride[2] + s] = 0; });
    each_weights(tile, h, first_slot, [&](index_t first, index_t count) {
      each_chain(h.group, n_slots, [&](index_t g, index_t s) {
        float* const to = own + g * out.stride[2] + s;
        offset_t const next = h.group * out.stride[2];
        float mean = to[0], spread = to[next], entropy = to[2 * next];
        for (index_t i = (g - first % h.group + h.group) % h.group; i < count; i += h.group) {
          if (tile.limits[i] == no_position) continue;
          float const p = tile.z[i * plain_tile::slot_stride + s], off = __fadd_rn(p, -mean);
          index_t const number = job.first_row + (first + i) / h.group - absent + 1;
          mean = __fadd_rn(mean, __fdiv_rn(off, static_cast<float>(number)));
          spread = __fmaf_rn(off, __fadd_rn(p, -mean), spread);
          entropy = __fmaf_rn(p, -logf(max(p, least_weight)), entropy);
        }
        to[0] = mean;
        to[next] = spread;
        to[2 * next] = entropy;
      });
    });
  }

 private:
  /// Rows of the op before the first one that is present, in every thread.
  __device__ index_t absent_rows(window_head const& h, int* box) const {
    index_t const n = job.first_row + job.n_rows;
    index_t first = n;
    for (index_t r = thread_of_block(); r < n; r += threads_of_block())
      if (h.position(r - job.first_row) >= 0) first = min(first, r);
    return block_reduce(first, box, smaller{});
  }
};

/// MorphKV's direct scores of 64 slots. Grid: heads, strips of slots.
struct plain_fuse_kernel : plain_kernel {
  window_job job;
  row_fusion fold;
  tensor_ref<float, 3, device_space> out, out_heads;

  __device__ void operator()() const {
    shared_pieces shared;
    plain_tile const tile(shared);
    window_head const h(job);
    index_t const first_slot = static_cast<index_t>(blockIdx.y) * plain_slots;
    if (first_slot >= h.n) return;
    index_t const last_old = job.limit[blockIdx.x], n_slots = h.n - first_slot;
    index_t const chains = out_heads.data != nullptr ? h.group : 0, slot = thread_of_block();
    float* const heads = out_heads.at(h.at.entry, h.at.head * h.group, first_slot);
    each_chain(chains, n_slots,
               [&](index_t c, index_t s) { heads[c * out_heads.stride[1] + s] = 0; });
    bool const any_old = tile.take_slots(h, first_slot) <= last_old;
    bool const any_row = row_fusion::any_row(h);
    float score = 0, top = 0;
    for (index_t first = 0; any_row && any_old && first < job.n_queries(); first += plain_queries) {
      index_t const count = min(plain_queries, job.n_queries() - first);
      __syncthreads();
      tile.take_queries(h, first, count, true);
      __syncthreads();
      tile.fill(h, first_slot, first, [&](index_t i, index_t s, float z) {
        if (tile.positions[s] > tile.limits[i]) return 0.0f;
        return __fmul_rn(exp2f(z - tile.norms[i].shift), tile.norms[i].inverse);
      });
      __syncthreads();
      for (index_t i = 0; slot < plain_slots && i < count; ++i) {
        top = max(top, tile.z[i * plain_tile::slot_stride + slot]);
        if ((first + i) % h.group != h.group - 1) continue;
        score = fold(score, top);
        top = 0;
      }
      each_chain(chains, n_slots, [&](index_t c, index_t s) {
        float& own = heads[c * out_heads.stride[1] + s];
        for (index_t i = (c - first % chains + chains) % chains; i < count; i += chains)
          own = fold(own, tile.z[i * plain_tile::slot_stride + s]);
      });
    }
    if (slot < min(plain_slots, n_slots))
      out(h.at.entry, h.at.head, first_slot + slot) =
          row_fusion::ranked(tile.positions[slot], last_old, any_row, score);
    each_chain(chains, n_slots, [&](index_t c, index_t s) {
      float& own = heads[c * out_heads.stride[1] + s];
      own = row_fusion::ranked(tile.positions[s], last_old, any_row, own);
    });
  }
};

}  // namespace kvkeep::cuda
