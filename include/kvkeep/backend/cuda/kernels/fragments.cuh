// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// Queries and 16-bit keys as operands of matrix products. Eight rows and 32 features are 32 pieces of 16
/// bytes: lane 4 r + q holds features 8 q .. 8 q + 7 of row r, and takes them as places 2 q, 2 q + 1 and 8
/// more of two products. (Both sides agree on that order of features, so a product does not see it.)
#pragma once

#include <kvkeep/backend/cuda/kernels/ptx.cuh>

#include "window.cuh"

namespace kvkeep::cuda {

/// Starts copying a slot's position, or stores one that nobody sees. By a copy that nothing waits for: a load in a loop
/// of copies would keep each from starting before the last one's position had come.
__device__ inline void copy_position(index_t* to, index_t const* from, bool live) {
  if (live)
    copy_4(to, from);
  else
    *to = above_positions;
}

inline constexpr index_t batch_queries = 32;

/// Tiles that fit registers and shared memory, by blocks of 32 features.
template <int Blocks>
struct mma_tiles {
  static constexpr int batches = Blocks > 4 ? 2 : 4;    ///< of queries in shared memory
  static constexpr int key_tiles = Blocks > 4 ? 1 : 2;  ///< of 16 keys in a warp's registers
  static constexpr int warps = 8;
  static constexpr index_t keys = warps * key_tiles * 16;  ///< of a block
};

/// Keys of one head by pieces of 8 features, whatever the layout: so a result does not depend on it. Pieces of FP8 keys
/// are fp16 numbers.
template <class T>
class key_pieces {
 public:
  __device__ explicit key_pieces(window_head const& h)
      : plane_(h.job.layer.kv.k),
        rows_(plane_, h.seq, h.at.head),
        aligned_(plane_.features.contiguous(plane_.dim) &&
                 rows_.alignment(plane_.dim * (narrow() ? 1 : 2)) == 16) {}

  /// What a number of the pieces is worth: e4m3 numbers, the subnormal ones too, have the bits of fp16 ones 2^8
  /// smaller.
  __device__ static float unit(dtype t) { return t == dtype::e4m3 ? 256.0f : 1.0f; }
  /// Pieces are 16 aligned bytes.
  __device__ bool whole() const { return aligned_ && !narrow(); }
  __device__ bool has(index_t piece) const { return piece * 8 < plane_.dim; }
  __device__ std::byte const* row(index_t slot) const { return rows_.bytes(slot); }
  __device__ void const* address(index_t slot, index_t piece) const {
    return row(slot) + piece * 16;
  }
  /// A row's piece of whole pieces; zeros behind the last feature.
  __device__ uint4 load(std::byte const* row, index_t piece) const {
    return has(piece) ? reinterpret_cast<uint4 const*>(row)[piece] : make_uint4(0, 0, 0, 0);
  }
  /// A row's piece that is none of those.
  __device__ uint4 gather(std::byte const* at, index_t piece) const {
    if (narrow()) return widen(at, piece);
    auto const* const row = reinterpret_cast<T const*>(at);
    unsigned long long low = 0, high = 0;
    for (index_t d = piece * 8; d < min(piece * 8 + 8, plane_.dim); ++d) {
      unsigned long long const bits = row[plane_.features(d)].bits;
      (d % 8 < 4 ? low : high) |= bits << d % 4 * 16;
    }
    return make_uint4(static_cast<unsigned>(low), static_cast<unsigned>(low >> 32),
                      static_cast<unsigned>(high), static_cast<unsigned>(high >> 32));
  }

 private:
  /// Whether keys are FP8: these go with fp16 alone.
  __device__ bool narrow() const {
    if constexpr (std::is_same_v<T, fp16>)
      return dtype_bytes(plane_.type) == 1;
    else
      return false;
  }
  /// A piece of FP8 keys.
  __device__ uint4 widen(std::byte const* at, index_t piece) const {
    uint2 bytes = make_uint2(0, 0);
    if (aligned_) {
      if (has(piece)) bytes = read_8(at + piece * 8);
    } else {
      for (index_t d = piece * 8; d < min(piece * 8 + 8, plane_.dim); ++d)
        (d % 8 < 4 ? bytes.x : bytes.y) |= static_cast<unsigned>(at[plane_.features(d)])
                                           << d % 4 * 8;
    }
    bool const e4m3 = plane_.type == dtype::e4m3;
    return make_uint4(low_halves(bytes.x, e4m3), high_halves(bytes.x, e4m3),
                      low_halves(bytes.y, e4m3), high_halves(bytes.y, e4m3));
  }

  plane_ref<device_space> const& plane_;
  head_rows rows_;
  bool aligned_;
};

/// How a product with a query becomes a logit, and that a probability: 2^(logit - shift).
struct alignas(8) query_scale {
  float factor;  ///< of the dot product
  float shift;   ///< log2 of the row's sum of powers; infinite if the row has no say
};

/// Batches times 32 queries of a head in shared memory.
template <int Blocks, int Batches>
struct query_tile {
  uint4* high;         ///< [Batches][4 groups of 8 rows][Blocks][lane]
  uint4* rest;         ///< the same; unset where no query of the tile has a second number
  query_scale* scale;  ///< [Batches * 32]
  index_t* limit;      ///< [Batches * 32] last position that a query sees
  int* uneven;         ///< [Batches * 32]

  static constexpr index_t queries = Batches * batch_queries, pieces = queries * Blocks * 4;
  __device__ explicit query_tile(shared_pieces& s)
      : high(s.take<uint4>(pieces)),
        rest(s.take<uint4>(pieces)),
        scale(s.take<query_scale>(queries)),
        limit(s.take<index_t>(queries)),
        uneven(s.take<int>(queries)) {}
  static constexpr std::size_t bytes() {
    return 2 * shared_pieces::bytes<uint4>(pieces) + shared_pieces::bytes<query_scale>(queries) +
           shared_pieces::bytes<index_t>(queries) + shared_pieces::bytes<int>(queries);
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

  /// Takes what is known of the tile's queries. @return whether one of this thread's has a second number
  /// @param number(i) of the head's query i, -1: none
  template <class N>
  __device__ bool take_info(window_head const& h, bool normed, N const& number) const {
    offset_t const first = static_cast<offset_t>(blockIdx.x) * h.job.n_queries();
    bool any = false;
    for (index_t i = thread_of_block(); i < queries; i += threads_of_block()) {
      index_t const q = number(i);
      split_query const query =
          q < 0 ? split_query{0, no_position, 0} : h.job.split.query[first + q];
      row_norm const norm = normed && q >= 0 ? h.job.norms[first + q] : row_norm{};
      float const sum = norm.inverse > 0 ? -log2f(norm.inverse) : __uint_as_float(0x7f800000u);
      scale[i] = {query.factor, __fadd_rn(norm.shift, sum)};
      limit[i] = query.limit;
      uneven[i] = query.uneven;
      any = any || query.uneven != 0;
    }
    return any;
  }
  /// Takes the tile's queries; a barrier has to follow. @param number as above
  template <class N>
  __device__ void take(window_head const& h, bool normed, N const& number) const {
    split_queries const& from = h.job.split;
    offset_t const first = static_cast<offset_t>(blockIdx.x) * h.job.n_queries();
    bool const any = take_info(h, normed, number);
    copy(from.high + first * (Blocks * 4), high, number);
    if (__syncthreads_or(any ? 1 : 0) != 0) copy(from.rest + first * (Blocks * 4), rest, number);
    copies_end();
    copies_wait<0>();
  }

 private:
  template <class N>
  __device__ static void copy(uint4 const* from, uint4* to, N const& number) {
    // In the order of places: eight threads in a row write to all banks.
    for (index_t x = thread_of_block(); x < pieces; x += threads_of_block()) {
      index_t const eight = x / (Blocks * 32), piece = x / 32 % Blocks * 4 + x % 4;
      index_t const q = number(eight / 4 * batch_queries + query_of(eight % 4, x % 32 / 4));
      copy_16(to + x, from + static_cast<offset_t>(max(q, 0)) * (Blocks * 4) + piece, q >= 0);
    }
  }
};

/// tanh to some 2^-21 of its value, from instructions that every path has.
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

/// As logit2_form, without a call, of a dot product times its factor.
struct finite_logit2 {
  __device__ float operator()(float z) const {
    return min(max(z, -largest_float), largest_float);  // of NaN: the lowest
  }
};
struct capped_logit2 {
  float softcap;

  __device__ float operator()(float z) const {
    float const finite = finite_logit2{}(z);
    float const capped =
        __fmul_rn(softcap * log2_e, fast_tanh(__fmul_rn(finite, fast_inverse(softcap))));
    return (__float_as_uint(z) & 0x7fffffffu) > 0x7f800000u ? finite : capped;
  }
};
/// f(form): code of its own for each, so that the plain form has no part in the registers of the other.
template <class F>
__device__ void with_logit(kv_ref<device_space> const& kv, F const& f) {
  if (kv.softcap > 0)
    f(capped_logit2{kv.softcap});
  else
    f(finite_logit2{});
}

/// What is added to a query's product with its second numbers: nothing if the query is one 16-bit number,
/// so that it has the bits that it has among such, nor where a key is not finite.
__device__ inline float rest_of(float product, bool even) {
  bool const finite = (__float_as_uint(product) & 0x7fffffffu) < 0x7f800000u;
  return even || !finite ? 0.0f : product;
}

/// Two products: c += rows (upper of a: r, lower: r + 8) times columns, over 32 features.
template <class T>
__device__ inline void multiply(T type, float (&c)[4], uint4 const& upper, uint4 const& lower,
                                uint4 const& columns) {
  mma(type, c, upper.x, lower.x, upper.y, lower.y, columns.x, columns.y);
  mma(type, c, upper.z, lower.z, upper.w, lower.w, columns.z, columns.w);
}

}  // namespace kvkeep::cuda
