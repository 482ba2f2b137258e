// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// Recorded attention: queries, keys and values of one sequence, and what full attention makes of
/// them.
#pragma once

#include <kvkeep/kvkeep.hpp>

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

namespace kvkeep::demo {

/// One layer after RoPE: queries `[q_head, token, dim]`, keys and values `[kv_head, token, dim]`.
struct layer_trace {
  std::vector<float> q, k, v;
};

/// One sequence of one model.
struct trace {
  std::string name;
  index_t tokens = 0;
  index_t n_q_heads = 0, n_kv_heads = 0, dim_k = 0, dim_v = 0;
  std::vector<layer_trace> layers;
  std::vector<std::uint8_t> asks;  ///< [token] 1: its query has to find the answer that follows

  index_t n_layers() const { return static_cast<index_t>(layers.size()); }
  /// The first half is the prompt, the second half is decoded one token at a time.
  index_t prompt() const { return tokens / 2; }
  index_t group() const { return n_q_heads / n_kv_heads; }
  cache_shape shape(index_t slots) const { return {1, n_q_heads, n_kv_heads, dim_k, dim_v, slots}; }
  std::size_t row(index_t head, index_t token, index_t dim) const {
    return (static_cast<std::size_t>(head) * static_cast<std::size_t>(tokens) +
            static_cast<std::size_t>(token)) *
           static_cast<std::size_t>(dim);
  }
  float const* q(index_t layer, index_t head, index_t token) const {
    return layers[static_cast<std::size_t>(layer)].q.data() + row(head, token, dim_k);
  }
  float const* k(index_t layer, index_t head, index_t token) const {
    return layers[static_cast<std::size_t>(layer)].k.data() + row(head, token, dim_k);
  }
  float const* v(index_t layer, index_t head, index_t token) const {
    return layers[static_cast<std::size_t>(layer)].v.data() + row(head, token, dim_v);
  }
};

/// All traces below `dir`, one per folder, by name.
/// @throws std::runtime_error("FILE: FIELD: reason") for missing, broken or unequal files
std::vector<trace> load_traces(std::filesystem::path const& dir);

/// Attention over all tokens, in double, of the decoded half of a trace.
class full_attention {
 public:
  explicit full_attention(trace const& t);

  /// Probabilities `[token]` of tokens 0 .. token, seen by the query of `token`.
  double const* probability(index_t layer, index_t head, index_t token) const {
    return probability_.data() + at(layer, head, token) * static_cast<std::size_t>(tokens_);
  }
  /// `[dim_v]`
  double const* out(index_t layer, index_t head, index_t token) const {
    return out_.data() + at(layer, head, token) * static_cast<std::size_t>(dim_v_);
  }

 private:
  std::size_t at(index_t layer, index_t head, index_t token) const {
    return (static_cast<std::size_t>(layer) * static_cast<std::size_t>(n_q_heads_) +
            static_cast<std::size_t>(head)) *
               static_cast<std::size_t>(tokens_ - prompt_) +
           static_cast<std::size_t>(token - prompt_);
  }

  index_t tokens_, prompt_, n_q_heads_, dim_v_;
  std::vector<double> probability_, out_;
};

}  // namespace kvkeep::demo
