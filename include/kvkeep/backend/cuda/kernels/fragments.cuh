// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// Queries and 16-bit keys as operands of matrix products. Eight rows and 32 features are 32 pieces of 16
/// bytes: lane 4 r + q holds features 8 q .. 8 q + 7 of row r, and takes them as places 2 q, 2 q + 1 and 8
/// more of two products. (Both sides agree on that order of features, so a product does not see it.)
#pragma once

#include <kvkeep/backend/cuda/kernels/ptx.cuh>

#include "window.cuh"

namespace kvkeep::cuda {

inline constexpr index_t block_dims = 32;  ///< features of a block of pieces
inline constexpr index_t batch_queries = 32;
inline constexpr index_t turn_queries = 16;  ///< that a warp adds up at a time

/// Tiles that fit registers and shared memory, by blocks of 32 features.
template <int Blocks>
struct mma_tiles {
  static constexpr int batches = Blocks > 4 ? 2 : 4;    ///< of queries in shared memory
  static constexpr int key_tiles = Blocks > 4 ? 1 : 2;  ///< of 16 keys in a warp's registers
  static constexpr int warps = 8;
  static constexpr index_t keys = warps * key_tiles * 16;  ///< of a block
};

/// Keys of one head by pieces of 8 features, whatever the layout: so a result does not depend on it.
template <class T>
class key_pieces {
 public:
  __device__ explicit key_pieces(window_head const& h)
      : plane_(h.job.layer.kv.k),
        rows_(plane_, h.seq, h.at.head),
        whole_(plane_.features.contiguous(plane_.dim) && rows_.alignment(plane_.dim * 2) == 16) {}

  /// Pieces are 16 aligned bytes.
  __device__ bool whole() const { return whole_; }
  __device__ bool has(index_t piece) const { return piece * 8 < plane_.dim; }
  __device__ void const* address(index_t slot, index_t piece) const {
    return rows_.bytes(slot) + piece * 16;
  }
  /// Zeros behind the last feature.
  __device__ uint4 load(index_t slot, index_t piece) const {
    if (!has(piece)) return make_uint4(0, 0, 0, 0);
    if (whole_) return *static_cast<uint4 const*>(address(slot, piece));
    auto const* const row = rows_.template row<T>(slot);
    auto const word = [&](index_t d) {
      unsigned const low = d < plane_.dim ? row[plane_.features(d)].bits : 0u;
      unsigned const high = d + 1 < plane_.dim ? row[plane_.features(d + 1)].bits : 0u;
      return low | high << 16;
    };
    index_t const d = piece * 8;
    return make_uint4(word(d), word(d + 2), word(d + 4), word(d + 6));
  }

 private:
  plane_ref<device_space> const& plane_;
  head_rows rows_;
  bool whole_;
};

/// What a product with a query becomes: a logit and then a probability.
struct query_info {
  float factor;  ///< of the dot product
  float shift;
  float inverse;
  index_t limit;  ///< last position that the query sees
};

/// Up to `Batches` times 32 queries of a head in shared memory, each as the sum of two 16-bit numbers. The
/// second one is 0 if queries were 16-bit numbers at first.
template <class T, int Blocks, int Batches>
struct query_tile {
  uint4* high;       ///< [Batches][4 groups of 8 rows][Blocks][lane]
  uint4* rest;       ///< the same
  query_info* info;  ///< [Batches * 32]
  int* uneven;       ///< [Batches * 32] whether the second number has a say

  static constexpr index_t pieces = Batches * 4 * Blocks * 32;
  __device__ explicit query_tile(shared_pieces& s)
      : high(s.take<uint4>(pieces)),
        rest(s.take<uint4>(pieces)),
        info(s.take<query_info>(Batches * batch_queries)),
        uneven(s.take<int>(Batches * batch_queries)) {}
  static constexpr std::size_t bytes() {
    return 2 * shared_pieces::bytes<uint4>(pieces) +
           shared_pieces::bytes<query_info>(Batches * batch_queries) +
           shared_pieces::bytes<int>(Batches * batch_queries);
  }

  /// Where a group of eight rows begins; a lane adds its number.
  __device__ static index_t place(index_t batch, index_t eight, index_t block) {
    return ((batch * 4 + eight) * Blocks + block) * 32;
  }
  /// Query of a batch that is row r of group `eight`. As columns of products with the two groups of a
  /// turn, lane 4 r + q finds the turn's queries 4 q .. 4 q + 3 in its own registers.
  __device__ static index_t query_of(index_t eight, index_t r) {
    return eight / 2 * turn_queries + r / 2 * 4 + eight % 2 * 2 + r % 2;
  }

  /// Takes Batches * 32 queries, a warp each. @param row_of(i), head_of(i) of query i; row -1: none
  template <class R, class G>
  __device__ void take(window_head const& h, bool normed, R const& row_of, G const& head_of) const {
    logit2_form const form(h.job.layer.kv);
    for (index_t i = warp_of_block(); i < Batches * batch_queries; i += warps_of_block()) {
      index_t const row = row_of(i), g = head_of(i), dim = h.job.layer.kv.k.dim;
      index_t const limit = row < 0 ? no_position : h.limit(row);
      float const* const q = limit == no_position ? nullptr : h.query(row, g);
      float x[8];
      for (int e = 0; e < 8; ++e) {
        index_t const d = lane_of_warp() * 8 + e;
        x[e] = q != nullptr && d < dim ? q[d] : 0.0f;
      }
      float const up = scale_of(T{}, x);
      bool const more = split(x, up, i);
      int const some = __any_sync(all_lanes, more ? 1 : 0);
      if (lane_of_warp() != 0) continue;
      row_norm const norm = normed && q != nullptr ? h.norm(row, g) : row_norm{};
      info[i] = {__fmul_rn(form.factor, down_of(up)), norm.shift, norm.inverse, limit};
      uneven[i] = some;
    }
  }

 private:
  /// One over a power of two.
  __device__ static float down_of(float up) {
    return __uint_as_float((254u << 23) - __float_as_uint(up));
  }
  /// bf16 has the range of float.
  __device__ static float scale_of(bf16, float const (&)[8]) { return 1; }
  /// The power of two that takes the row's largest number to [2^14, 2^15), for what fp16 can hold.
  __device__ static float scale_of(fp16, float const (&x)[8]) {
    unsigned most = 0;
    for (float const v : x) {
      unsigned const magnitude = __float_as_uint(v) & 0x7fffffffu;
      if (magnitude < 0x7f800000u && magnitude > most) most = magnitude;
    }
    most = warp_reduce(most, larger{});
    int const exponent = static_cast<int>(most >> 23);
    if (exponent == 0) return 1;
    return __uint_as_float(static_cast<unsigned>(127 + min(141 - exponent, 120)) << 23);
  }
  __device__ static bf16 rounded(bf16, float x) { return to_bf16(x); }
  __device__ static fp16 rounded(fp16, float x) { return to_fp16(x); }

  /// Writes this lane's piece of query i. @return whether the second number is not 0 throughout
  __device__ bool split(float const (&x)[8], float up, index_t i) const {
    unsigned first[4] = {}, second[4] = {};
    bool more = false;
    for (int e = 0; e < 8; ++e) {
      float const y = __fmul_rn(x[e], up);
      T const a = rounded(T{}, y);
      float const left = __fadd_rn(y, -to_float(a));
      bool const finite = (__float_as_uint(left) & 0x7fffffffu) < 0x7f800000u;
      T const b = rounded(T{}, finite ? left : 0.0f);
      more = more || (b.bits & 0x7fffu) != 0;
      first[e / 2] |= static_cast<unsigned>(a.bits) << 16 * (e % 2);
      second[e / 2] |= static_cast<unsigned>(b.bits) << 16 * (e % 2);
    }
    index_t const lane = lane_of_warp(), turn = i % batch_queries / turn_queries;
    index_t const eight = turn * 2 + i % 4 / 2, r = i % turn_queries / 4 * 2 + i % 2;
    if (lane < Blocks * 4) {
      index_t const at = place(i / batch_queries, eight, lane / 4) + r * 4 + lane % 4;
      high[at] = make_uint4(first[0], first[1], first[2], first[3]);
      rest[at] = make_uint4(second[0], second[1], second[2], second[3]);
    }
    return more;
  }
};

/// tanh to some 2^-22 of its value, from instructions that every path has.
__device__ inline float fast_tanh(float x) {
  float const a = min(x < 0 ? -x : x, 16.0f), square = __fmul_rn(a, a);
  float const e = fast_exp2(__fmul_rn(a, -2 * log2_e));
  float const far = __fmul_rn(__fadd_rn(1.0f, -e), fast_inverse(__fadd_rn(1.0f, e)));
  float series = __fmaf_rn(square, 62.0f / 2835, -17.0f / 315);
  series = __fmaf_rn(square, series, 2.0f / 15);
  series = __fmaf_rn(square, series, -1.0f / 3);
  float const near = __fmaf_rn(__fmul_rn(a, square), series, a);
  float const r = a < 0.25f ? near : far;
  return x < 0 ? -r : r;
}

/// As logit2_form, without a call.
struct fast_logit2 {
  float factor, softcap;

  __device__ explicit fast_logit2(kv_ref<device_space> const& kv)
      : factor(logit2_form(kv).factor), softcap(kv.softcap) {}
  __device__ float operator()(float z) const {
    float const finite = min(max(z, -largest_float), largest_float);  // of NaN: the lowest
    if (!(softcap > 0)) return finite;
    float const capped =
        __fmul_rn(softcap * log2_e, fast_tanh(__fmul_rn(finite, fast_inverse(softcap))));
    return (__float_as_uint(z) & 0x7fffffffu) > 0x7f800000u ? finite : capped;
  }
};

/// Two products: c += rows (upper of a: r, lower: r + 8) times columns, over 32 features.
template <class T>
__device__ inline void multiply(T type, float (&c)[4], uint4 const& upper, uint4 const& lower,
                                uint4 const& columns) {
  mma(type, c, upper.x, lower.x, upper.y, lower.y, columns.x, columns.y);
  mma(type, c, upper.z, lower.z, upper.w, lower.w, columns.z, columns.w);
}

}  // namespace kvkeep::cuda
