// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// The parts of a Llama block around its attention, on rows of any tokens. No row depends on another one.
#pragma once

#include <span>

#include "generate/model.hpp"

namespace kvkeep::generate {

/// Works on up to `max_rows` rows at a time and keeps their queries, keys, values and attention outputs.
class transformer {
 public:
  transformer(runtime& rt, model const& m, index_t max_rows);

  /// Residual rows `[n, dim]` of tokens.
  void embed(std::span<index_t const> tokens, float* x) const;
  /// Angles for the tokens of the rows that follow.
  void set_positions(std::span<index_t const> positions);
  /// Queries, keys and values of a layer, queries and keys rotated.
  void project(index_t layer, row_block x);
  /// Adds the attention output and the feed-forward layer to the residual rows.
  void finish(index_t layer, float* x, index_t n);
  /// Logits `[vocabulary]` per row.
  void logits(row_block x, float* out);

  float const* q(index_t row) const { return q_.data() + offset_t{row} * config_.q_width(); }
  float const* k(index_t row) const { return k_.data() + offset_t{row} * config_.kv_width(); }
  float const* v(index_t row) const { return v_.data() + offset_t{row} * config_.kv_width(); }
  float* attention() { return attention_.data(); }  ///< [row, q_head, head_dim]

 private:
  void normalise(row_block x, std::vector<float> const& weight);

  runtime& rt_;
  model const& model_;
  model_config const& config_;
  std::vector<double> frequency_;  ///< [head_dim / 2]
  std::vector<float> angles_;      ///< [row, head_dim] cosines and sines
  std::vector<float> normed_, q_, k_, v_, attention_, gate_, up_, added_;
};

}  // namespace kvkeep::generate
