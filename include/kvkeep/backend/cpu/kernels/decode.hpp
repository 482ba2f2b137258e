// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// Decode attention of one KV head: the query rows of a group share every load of a key or value.
/// Keys and values are read once, in their own type, through row pointers (caches differ in
/// layout). Sums run in blocks of fixed size, so their order depends on the row numbers alone.
#pragma once

#include "panel.hpp"

namespace kvkeep::cpu {
inline namespace KVKEEP_CPU_ISA {

inline constexpr index_t row_block = 32;  ///< rows that stay in the first-level cache

/// Key or value rows of one KV head.
template <class T>
struct row_list {
  T const* const* rows = nullptr;  ///< [n] pointers to contiguous features, host
  index_t n = 0;
};

template <class T>
inline void prefetch_row(T const* row, index_t dim) noexcept {
  constexpr index_t line = 64 / static_cast<index_t>(sizeof(T));
  for (index_t d = 0; d < dim; d += line) prefetch(row + d);
}

/// G query rows against 8 / G key rows: acc[g * (8 / G) + key], summed over features. G is 1, 2, 4
/// or 8.
template <int G, class T>
inline vf dot_tile(query_rows const& q, T const* const* keys) noexcept {
  constexpr int n_keys = 8 / G;
  vf acc[8];
  KVKEEP_CPU_UNROLL
  for (int i = 0; i < 8; ++i) acc[i] = splat(0.0f);
  index_t d = 0;
  for (; d + lanes <= q.dim; d += lanes) {
    vf k[n_keys];
    KVKEEP_CPU_UNROLL
    for (int j = 0; j < n_keys; ++j) k[j] = held(load(keys[j] + d));
    KVKEEP_CPU_UNROLL
    for (int g = 0; g < G; ++g) {
      vf const x = held(load(q.q + g * q.stride + d));
      KVKEEP_CPU_UNROLL
      for (int j = 0; j < n_keys; ++j) acc[g * n_keys + j] = fma(x, k[j], acc[g * n_keys + j]);
    }
  }
  if (d < q.dim) {
    KVKEEP_CPU_UNROLL
    for (int i = 0; i < 8; ++i)
      acc[i] = fma(load_part(q.q + i / n_keys * q.stride + d, q.dim - d),
                   load_part(keys[i % n_keys] + d, q.dim - d), acc[i]);
  }
  return sum_each(acc);
}

/// Dot products of G query rows with keys [begin, end); with `fetch` later keys are prefetched on
/// the way.
template <int G, class T>
inline void qk_piece(query_rows const& q, row_list<T> const& k, index_t begin, index_t end,
                     bool fetch, float* z, offset_t stride) noexcept {
  constexpr index_t n_keys = 8 / G;
  constexpr index_t ahead = 32;
  float dot[8];
  index_t j = begin;
  for (; j + n_keys <= end; j += n_keys) {
    if (fetch && j + ahead + n_keys <= k.n)
      for (index_t i = 0; i < n_keys; ++i) prefetch_row(k.rows[j + ahead + i], q.dim);
    store(dot, dot_tile<G>(q, k.rows + j));
    KVKEEP_CPU_UNROLL
    for (int g = 0; g < G; ++g)
      std::memcpy(z + g * stride + j, dot + g * n_keys, n_keys * sizeof(float));
  }
  if (j == end) return;
  T const* keys[n_keys];  // the last key stands in for those behind the end, results unused
  for (index_t i = 0; i < n_keys; ++i) keys[i] = k.rows[j + i < end ? j + i : end - 1];
  store(dot, dot_tile<G>(q, keys));
  for (int g = 0; g < G; ++g)
    for (index_t i = 0; i < end - j; ++i) z[g * stride + j + i] = dot[g * n_keys + i];
}

/// Logits of the group's query rows against all key rows.
/// @param q [G][dim] floats with their logit form, any G
/// @param k n key rows of q.dim features
/// @param z [G][n] floats with `stride` floats between rows, host
/// Cost: n * dim elements read once, 2 * G * n * dim flops.
/// Not inlined: callers with one query row would make the compiler warn of the others' code.
template <class T>
[[gnu::noinline]] void qk_rows(query_rows const& q, row_list<T> const& k, float* z,
                               offset_t stride) noexcept {
  for (index_t begin = 0; begin < k.n; begin += row_block) {
    index_t const end = k.n - begin < row_block ? k.n : begin + row_block;
    for (index_t g = 0; g < q.n_rows;) {
      query_rows piece = q;
      piece.q += g * q.stride;
      float* const out = z + g * stride;
      index_t const left = q.n_rows - g;
      if (left >= 4)
        qk_piece<4>(piece, k, begin, end, g == 0, out, stride), g += 4;
      else if (left >= 2)
        qk_piece<2>(piece, k, begin, end, g == 0, out, stride), g += 2;
      else
        qk_piece<1>(piece, k, begin, end, g == 0, out, stride), g += 1;
    }
    for (index_t g = 0; g < q.n_rows; ++g)
      finish_logits(z + g * stride + begin, end - begin, q.form);
  }
}

/// Result of softmax_row: probability j is e[j] / sum. A sink logit s adds e^(s - max) to the sum.
struct softmax_sum {
  float max = -FLT_MAX;
  float sum = 0;
};

/// Unnormalised softmax of one row of finite logits.
/// @param z [n] floats, host
/// @param e [n] floats, host, e[j] = e^(z[j] - max); may be `z`
/// Cost: n exponentials; fp32 sums over blocks of 64, added in double.
inline softmax_sum softmax_row(float const* z, index_t n, float* e) noexcept {
  vf top = splat(-FLT_MAX);
  index_t j = 0;
  for (; j + lanes <= n; j += lanes) top = max(top, load(z + j));
  softmax_sum r;
  r.max = max_lanes(top);
  for (; j < n; ++j) r.max = z[j] > r.max ? z[j] : r.max;
  vf const shift = splat(r.max);
  double sum = 0;
  for (index_t begin = 0; begin < n; begin += 64) {
    index_t const end = n - begin < 64 ? n : begin + 64;
    vf part = splat(0.0f);
    for (j = begin; j + lanes <= end; j += lanes) {
      vf const x = exp(load(z + j) - shift);
      store(e + j, x);
      part = part + x;
    }
    if (j < end) {
      index_t const count = end - j;
      vf const x = exp(load_part(z + j, count) - shift);
      store_part(e + j, x, count);
      part = part + float_of_bits(bits_of(x) & lane_mask((1u << count) - 1u));
    }
    sum += static_cast<double>(sum_lanes(part));
  }
  r.sum = static_cast<float>(sum);
  return r;
}

/// Weights of value rows, one list per query row.
struct value_weights {
  float const* e = nullptr;      ///< [n_rows][n], host
  offset_t stride = 0;           ///< floats between rows
  float const* scale = nullptr;  ///< [n_rows] factor of each result (1 / sum); null: 1
  index_t n_rows = 0;
};

/// N vectors of features from `d` on, G weight rows, value rows [begin, end): out += sum.
template <int G, int N, class T>
inline void weighted_tile(value_weights const& w, row_list<T> const& v, index_t begin, index_t d,
                          index_t width, float* out, offset_t stride) noexcept {
  index_t const end = v.n - begin < row_block ? v.n : begin + row_block;
  vf acc[G][N];
  KVKEEP_CPU_UNROLL
  for (int g = 0; g < G; ++g) {
    KVKEEP_CPU_UNROLL
    for (int i = 0; i < N; ++i) acc[g][i] = splat(0.0f);
  }
  for (index_t j = begin; j < end; ++j) {
    if (j + row_block < v.n) prefetch(v.rows[j + row_block] + d);
    vf x[N];
    KVKEEP_CPU_UNROLL
    for (int i = 0; i < N; ++i)
      x[i] = held(N == 1 ? load_some(v.rows[j] + d, width) : load(v.rows[j] + d + i * lanes));
    KVKEEP_CPU_UNROLL
    for (int g = 0; g < G; ++g) {
      vf const p = splat(w.e[g * w.stride + j]);
      KVKEEP_CPU_UNROLL
      for (int i = 0; i < N; ++i) acc[g][i] = fma(p, x[i], acc[g][i]);
    }
  }
  KVKEEP_CPU_UNROLL
  for (int g = 0; g < G; ++g) {
    KVKEEP_CPU_UNROLL
    for (int i = 0; i < N; ++i) {
      float* const o = out + g * stride + d + i * lanes;
      index_t const count = N == 1 ? width : lanes;
      store_some(o, load_some(o, count) + acc[g][i], count);
    }
  }
}

/// All features of one block of value rows for G weight rows.
template <int G, class T>
inline void weighted_block(value_weights const& w, row_list<T> const& v, index_t begin, index_t dim,
                           float* out, offset_t stride) noexcept {
  constexpr int wide = 8 / G;  // eight accumulators hide the latency of the fused multiply-add
  index_t d = 0;
  for (; d + wide * lanes <= dim; d += wide * lanes)
    weighted_tile<G, wide>(w, v, begin, d, lanes, out, stride);
  for (; d < dim; d += lanes)
    weighted_tile<G, 1>(w, v, begin, d, dim - d < lanes ? dim - d : lanes, out, stride);
}

/// Weighted sums of value rows: out[g] = scale[g] * sum over j of e[g][j] * V[j], j ascending
/// within blocks of 32 rows, blocks ascending. No rows give zeros.
/// @param out [G][dim] floats with `stride` floats between rows, host
/// Cost: n * dim elements read once, 2 * G * n * dim flops.
template <class T>
inline void av_rows(value_weights const& w, row_list<T> const& v, index_t dim, float* out,
                    offset_t stride) noexcept {
  for (index_t g = 0; g < w.n_rows; ++g)
    for (index_t d = 0; d < dim; ++d) out[g * stride + d] = 0;
  for (index_t begin = 0; begin < v.n; begin += row_block)
    for (index_t g = 0; g < w.n_rows;) {
      value_weights piece = w;
      piece.e += g * w.stride;
      float* const o = out + g * stride;
      index_t const left = w.n_rows - g;
      if (left >= 4)
        weighted_block<4>(piece, v, begin, dim, o, stride), g += 4;
      else if (left >= 2)
        weighted_block<2>(piece, v, begin, dim, o, stride), g += 2;
      else
        weighted_block<1>(piece, v, begin, dim, o, stride), g += 1;
    }
  for (index_t g = 0; w.scale != nullptr && g < w.n_rows; ++g)
    for (index_t d = 0; d < dim; ++d) out[g * stride + d] *= w.scale[g];
}

}  // namespace KVKEEP_CPU_ISA
}  // namespace kvkeep::cpu
