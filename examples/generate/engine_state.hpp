// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// What the parts of the engine share. Only the engine's own files include this.
#pragma once

#include <chrono>
#include <stdexcept>
#include <string>

#include "generate/engine.hpp"
#include "generate/file.hpp"

namespace kvkeep::generate {

namespace detail {

using clock = std::chrono::steady_clock;

inline void expect(status s, char const* call) {
  if (s != status::ok) throw std::runtime_error(std::string(call) + ": " + to_string(s));
}

/// Adds the time of its life to a sum.
class stopwatch {
 public:
  explicit stopwatch(double& sum) : sum_(sum), start_(clock::now()) {}
  stopwatch(stopwatch const&) = delete;
  stopwatch& operator=(stopwatch const&) = delete;
  ~stopwatch() { sum_ += std::chrono::duration<double>(clock::now() - start_).count(); }

 private:
  double& sum_;
  clock::time_point start_;
};

}  // namespace detail

struct engine::state {
  state(runtime& r, model const& weights, policy_pair const& policies, engine_options const& o);

  // engine_prefill.cpp: set-up and prompts
  any_cpu_session bind(policy_pair const& policies);
  void prefill(index_t id, std::span<index_t const> prompt);
  void prefill_by_layers(index_t id, std::span<index_t const> prompt);
  void prefill_by_chunks(index_t id, std::span<index_t const> prompt);
  struct chunk {
    index_t id;
    index_t layer;
    index_t first;  ///< position of the first row
    index_t n;
  };
  void prefill_chunk(chunk const& c, float* x);
  void write_chunk(chunk const& c);
  void attend_chunk(chunk const& c);
  void note_prompt(chunk const& c);

  // engine_decode.cpp
  void step(std::span<feed const> tokens);
  void decode_layer(index_t layer);
  void write_tokens(index_t layer);
  void trim();
  double plain_attention(index_t layer);
  queries step_queries() const;
  void note_peak();

  bool alive(index_t id) const {
    return id >= 0 && id < options.max_sequences && live[static_cast<std::size_t>(id)];
  }
  void check_token(index_t token) const;
  void check_alive(index_t id) const {
    if (!alive(id)) throw std::invalid_argument("sequence " + std::to_string(id) + " is not alive");
  }
  float* logits_of(index_t id) { return logits.data() + offset_t{id} * config.vocabulary; }
  index_t longest(index_t layer, index_t id) const;
  index_t slots_to_append(index_t layer, index_t id) const;

  runtime& rt;
  model_config config;
  engine_options options;
  bool evicts;  ///< while decoding
  bool in_place;
  /// A 32-bit log-sum-exp is off by 4e-6 where logits are near 100, and every probability of its row with it:
  /// scorers that sum all rows do without (a second pass) and tell sums apart that differ by 1e-5.
  bool offers_lse;
  transformer blocks;
  kv_cache cache;
  std::unique_ptr<kv_cache> prompt_cache;  ///< one layer of one prompt
  any_cpu_session kv;
  std::vector<bool> live;     ///< [id]
  std::vector<float> logits;  ///< [id, vocabulary]
  std::vector<float> x;       ///< residual rows of a step or a prompt
  std::vector<index_t> ids, positions, token_ids, slots, lengths;
  std::vector<float> lse;
  std::vector<float> step_logits;  ///< [entry, vocabulary]
  std::vector<std::byte> scratch;  ///< of attention alone
  double sampling = 0;             ///< seconds spent on attention alone
  engine_usage usage;
};

}  // namespace kvkeep::generate
