// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// Evidence: what an engine can show of its attention, and what a scorer asks for.
#pragma once

#include "../core/status.hpp"
#include "../core/tensor_ref.hpp"

namespace kvkeep {

/// What a scorer needs before it can rank the slots.
enum class evidence : std::uint8_t {
  none,            ///< positions suffice
  keys,            ///< the cached keys
  keys_values,     ///< the cached keys and values
  window_queries,  ///< the last W queries of the prompt (with or without log-sum-exp)
  all_queries,     ///< every query of the prompt, in chunks, in order
  token_queries,   ///< while decoding: the query, or the attention row, of each token
  engine_scores    ///< scores that the engine computes itself
};

constexpr char const* to_string(evidence e) noexcept {
  constexpr char const* names[] = {"none",        "keys",          "keys_values",  "window_queries",
                                   "all_queries", "token_queries", "engine_scores"};
  return names[static_cast<int>(e)];
}

/// Unit of a log-sum-exp: FlashAttention returns natural logarithms, FlashInfer base 2.
enum class log_base : std::uint8_t { natural, two };

/// Queries after RoPE (fp32, fp16 or bf16) in the view's memory space: `[entry, q_head, row, dim_k]` with any strides.
/// The rows are those of the last `n_rows` of `tokens` new tokens, oldest first.
struct queries {
  void const* data = nullptr;
  dtype type = dtype::f32;
  offset_t entry_stride = 0;  ///< elements between batch entries
  offset_t head_stride = 0;   ///< elements between query heads
  offset_t row_stride = 0;    ///< elements between rows
  index_t n_rows = 0;         ///< rows per entry and query head
  index_t tokens = 0;         ///< new tokens per entry; 0 means n_rows
  /// Optional log-sum-exp of each row, `[entry, q_head, row]`: over all its visible keys, and over its head's
  /// sink logit where the view has these (some attention kernels leave that one out).
  float const* lse = nullptr;
  offset_t lse_entry_stride = 0;
  offset_t lse_head_stride = 0;
  log_base lse_base = log_base::natural;

  index_t n_tokens() const noexcept { return tokens > 0 ? tokens : n_rows; }
};

/// Element types of queries.
constexpr bool is_query(dtype t) noexcept {
  return t == dtype::f32 || t == dtype::f16 || t == dtype::bf16;
}

namespace detail {

/// Whether these can be the queries of a prompt's chunk.
inline status check_chunk(queries const& q) noexcept {
  if (q.n_rows < 0 || q.n_rows > q.n_tokens() || (q.n_rows > 0 && q.data == nullptr))
    return status::bad_argument;
  return q.n_rows > 0 && !is_query(q.type) ? status::unsupported : status::ok;
}
/// Whether these can be the newest tokens' queries.
inline status check_token_query(queries const& q) noexcept {
  if (q.data == nullptr || q.n_rows != 1) return status::bad_argument;
  return is_query(q.type) ? status::ok : status::unsupported;
}

}  // namespace detail

/// Element `at` of numbers that are not opaque, as fp32.
KVKEEP_HD inline float number_at(void const* data, dtype type, offset_t at) noexcept {
  switch (type) {
    case dtype::f16:
      return to_float(static_cast<fp16 const*>(data)[at]);
    case dtype::bf16:
      return to_float(static_cast<bf16 const*>(data)[at]);
    case dtype::e4m3:
      return to_float(static_cast<fp8_e4m3 const*>(data)[at]);
    case dtype::e5m2:
      return to_float(static_cast<fp8_e5m2 const*>(data)[at]);
    default:
      return static_cast<float const*>(data)[at];
  }
}
/// One element of queries as fp32.
KVKEEP_HD inline float query_feature(queries const& q, offset_t at) noexcept {
  return number_at(q.data, q.type, at);
}

/// Contiguous queries `[entry, q_head, row, dim]`, with an optional contiguous log-sum-exp.
template <class T>
queries make_queries(T const* q, index_t n_q_heads, index_t n_rows, index_t dim,
                     float const* lse = nullptr, log_base base = log_base::natural) {
  queries r;
  r.data = q;
  r.type = dtype_of<T>::value;
  r.row_stride = dim;
  r.head_stride = static_cast<offset_t>(n_rows) * dim;
  r.entry_stride = r.head_stride * n_q_heads;
  r.n_rows = n_rows;
  r.lse = lse;
  r.lse_head_stride = n_rows;
  r.lse_entry_stride = static_cast<offset_t>(n_rows) * n_q_heads;
  r.lse_base = base;
  return r;
}

/// Tokens without queries, for scorers that need none.
inline queries tokens_only(index_t n) {
  queries r;
  r.tokens = n;
  return r;
}

/// A row per entry and KV head, features side by side (of opaque rows: their bytes).
struct head_vectors {
  void const* data = nullptr;
  dtype type = dtype::f32;
  offset_t entry_stride = 0;  ///< elements (opaque: bytes) between batch entries
  offset_t head_stride = 0;   ///< ... between KV heads
  float scale = 1;  ///< of numbers before they are rounded: one over the scale of an FP8 plane
};

/// Keys and values of one new token per entry, `[entry, kv_head, dim]` each.
struct token_kv {
  head_vectors k{};
  head_vectors v{};
};

/// Contiguous ones.
template <class T>
token_kv make_token_kv(T const* k, T const* v, cache_shape const& s) {
  auto const rows = [&](T const* data, index_t dim) {
    return head_vectors{data, dtype_of<T>::value, static_cast<offset_t>(s.n_kv_heads) * dim, dim};
  };
  return {rows(k, s.dim_k), rows(v, s.dim_v)};
}

/// What a token of every entry brings in one layer, and where its attention goes; all in the backend's memory.
struct token_io {
  token_kv kv{};
  queries q{};           ///< one row per entry and query head
  float* out = nullptr;  ///< [entry, q_head, dim_v] fp32
  float* lse = nullptr;  ///< [entry, q_head], or null
};

/// Attention probabilities of the newest token, `[entry, q_head, slot]`: one float per slot in use. A stride of 0 says
/// that all of them share a row.
struct attention_rows {
  float const* data = nullptr;
  offset_t entry_stride = 0;
  offset_t head_stride = 0;
};

/// Contiguous ones. @param slots  floats from one query head's row to the next, not fewer than slots in use
inline attention_rows make_attention_rows(float const* data, index_t n_q_heads, index_t slots) {
  return {data, static_cast<offset_t>(n_q_heads) * slots, slots};
}

/// Scores of the engine's own for the slots in use, `[entry, kv_head, slot]`, higher is kept.
struct own_scores {
  float const* data = nullptr;
  offset_t entry_stride = 0;
  offset_t head_stride = 0;
};

}  // namespace kvkeep
