// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// Weights of query rows on slots in fp32, on any rows: a block owns some slots of a head and streams the queries in
/// order.
#pragma once

#include "features.cuh"
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
        auto const a = *reinterpret_cast<four_floats const*>(q + d * query_stride + row);
        auto const b = *reinterpret_cast<four_floats const*>(k + d * slot_stride + column);
        for (int i = 0; i < 4; ++i)
          for (int j = 0; j < 4; ++j) sum[i][j] = __fmaf_rn(a.x[i], b.x[j], sum[i][j]);
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
    each_staged<plain_dims>(plain_slots, [&](index_t d, index_t j) {
      k[d * slot_stride + j] = d0 + d < plane.dim && first_slot + j < h.n
                                   ? feature(plane, rows.bytes(first_slot + j), d0 + d)
                                   : 0.0f;
    });
    each_staged<plain_dims>(plain_queries, [&](index_t d, index_t i) {
      index_t const packed = first_query + i;
      q[d * query_stride + i] = d0 + d < plane.dim && limits[i] != no_position
                                    ? h.query(packed / h.group, packed % h.group)[d0 + d]
                                    : 0.0f;
    });
  }
};

struct plain_kernel {
  static constexpr int most_threads = plain_threads, blocks_per_sm = 4;
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

}  // namespace kvkeep::cuda
