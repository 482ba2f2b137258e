// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// A model of the Llama architecture in memory: fp32 weights and, where the file has one, a tokenizer.
#pragma once

#include <filesystem>
#include <memory>
#include <string>
#include <vector>

#include "generate/matrix.hpp"
#include "generate/tokenizer.hpp"

namespace kvkeep::generate {

struct model_config {
  index_t dim = 0;     ///< width of the residual stream
  index_t hidden = 0;  ///< width of the feed-forward layer
  index_t n_layers = 0;
  index_t n_q_heads = 0;
  index_t n_kv_heads = 0;
  index_t head_dim = 0;  ///< even
  index_t vocabulary = 0;
  index_t context = 0;  ///< tokens that the model was made for
  float norm_epsilon = 1e-5F;
  double rope_base = 10000;

  index_t q_width() const { return n_q_heads * head_dim; }
  index_t kv_width() const { return n_kv_heads * head_dim; }
};

struct layer_weights {
  std::vector<float> attention_norm, ffn_norm;  ///< [dim]
  matrix q, k, v;                               ///< [heads * head_dim, dim]
  matrix output;                                ///< [dim, heads * head_dim]
  matrix gate, up;                              ///< [hidden, dim]
  matrix down;                                  ///< [dim, hidden]
};

struct model {
  model_config config;
  matrix embedding;  ///< [vocabulary, dim]
  std::vector<layer_weights> layers;
  std::vector<float> final_norm;
  matrix own_classifier;                  ///< [vocabulary, dim]; empty: the embedding serves
  std::shared_ptr<tokenizer const> text;  ///< null: ids only
  index_t first_token = -1;               ///< put in front of a prompt's text; -1: none
  std::vector<index_t> end_tokens;        ///< generation stops before them

  matrix const& classifier() const { return own_classifier.empty() ? embedding : own_classifier; }
};

/// Reads a GGUF file (v2, v3; F32, F16, Q8_0) or a llama2.c checkpoint (version 0), told apart by their
/// first bytes. `tokenizer_file` may name a llama2.c tokenizer for either.
/// @throws bad_input naming file and field
model load_model(std::filesystem::path const& file,
                 std::filesystem::path const& tokenizer_file = {});

namespace detail {

/// Reads of one format, called by load_model.
class file_reader;
model read_gguf(file_reader& in);
model read_llama2c(file_reader& in);

/// Refuses sizes that cannot be a model, before anything is allocated.
void check_config(std::string const& file, model_config const& c);

}  // namespace detail
}  // namespace kvkeep::generate
