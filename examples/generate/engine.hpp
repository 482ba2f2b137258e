// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// The engine: a model, a cache of bounded size and a kvkeep session that says which slots to use.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "generate/cache.hpp"
#include "generate/policies.hpp"
#include "generate/transformer.hpp"

namespace kvkeep::generate {

/// Sees every token that the engine decodes, for records and checks.
class step_observer {
 public:
  virtual ~step_observer() = default;
  /// A layer's new token: queries `[q_head, dim]`, key and value `[kv_head, dim]`.
  struct token {
    index_t layer = 0;
    index_t id = 0;
    index_t position = 0;
    float const* q = nullptr;
    float const* k = nullptr;
    float const* v = nullptr;
  };
  /// Its key and value are in the cache, its attention is still to come.
  virtual void on_token(token const& t) = 0;
  /// Attention output `[q_head, dim]` of a decoded token.
  virtual void on_attended(index_t layer, index_t id, float const* out) = 0;
  /// The tokens of a step (or of a prompt) are confirmed.
  virtual void on_confirmed(std::span<index_t const> ids) = 0;
};

struct engine_options {
  kv_cache::layout_options layout;
  index_t chunk = 64;         ///< prompt tokens that pass through a layer at a time
  index_t max_sequences = 1;  ///< alive at a time
  index_t max_prompt = 1;     ///< longest prompt that is computed in chunks
  index_t max_tokens = 2;     ///< longest sequence, prompt and generated (bounds caches that grow)
  /// Prompts go into the cache itself, which must hold them, and each chunk passes through all layers. Otherwise
  /// a layer's prompt lies in a buffer until the policy has cut it. Policies that do not cut prompts, or
  /// that join layers, work in place anyway.
  bool in_place = false;
  /// Every so many steps attention alone is timed beside the session's (0: never).
  index_t sample_every = 32;
  step_observer* observer = nullptr;
};

/// One token to feed to a sequence.
struct feed {
  index_t id = 0;
  index_t token = 0;
};

/// Seconds and counts since the engine was made.
struct engine_usage {
  double prefill = 0, decode = 0;                ///< wall time, samples excluded
  double observe = 0, end_prompt = 0;            ///< prompt calls of the session
  double append = 0, attend = 0, confirm = 0;    ///< decode calls of the session
  double sampled_attend = 0, sampled_plain = 0;  ///< the same attention with and without a session
  std::int64_t sampled_steps = 0, steps = 0;
  std::int64_t prompt_tokens = 0, decoded_tokens = 0;
  std::int64_t peak_slots = 0;  ///< most slots in use at a time: all layers, sequences and KV heads
  std::size_t slot_bytes = 0;   ///< K and V of one slot of one KV head
  std::size_t peak_blocks = 0, block_bytes = 0;  ///< paged
  std::size_t state_bytes = 0;    ///< policy state of the sequences alive at the peak
  std::size_t session_bytes = 0;  ///< all state and scratch that the session holds
  counters count;

  std::size_t peak_bytes() const { return static_cast<std::size_t>(peak_slots) * slot_bytes; }
  /// Estimated seconds that eviction took: the session's calls without the attention itself.
  double eviction() const;
};

/// Throws std::invalid_argument for what a session refuses when it is bound, bad_input for tokens out of
/// range, and std::runtime_error naming the call that a session refused later. One thread at a time.
class engine {
 public:
  engine(runtime& rt, model const& m, policy_pair const& policies, engine_options const& o);
  ~engine();

  /// Computes a prompt. Tokens beyond max_prompt are fed one by one, where the policy evicts while decoding.
  index_t begin(std::span<index_t const> prompt);
  /// One token per sequence; sequences may be listed in any order, each once.
  void step(std::span<feed const> tokens);
  void end(index_t id);

  /// Logits `[vocabulary]` behind the sequence's last token; valid until its next step.
  std::span<float const> logits(index_t id) const;
  /// Tokens seen so far, which is the next token's position.
  index_t tokens(index_t id) const;
  /// Slots in use and original positions of one layer and KV head, in slot order; -1: free.
  std::vector<index_t> positions(index_t id, index_t layer, index_t kv_head) const;
  /// @throws std::runtime_error naming what is wrong
  void verify() const;
  engine_usage usage() const;
  index_t slots_per_head() const;
  index_t max_sequences() const;

  /// A sequence's policy state with its keys and values.
  std::vector<std::byte> save(index_t id) const;
  /// Starts a sequence from what `save` wrote, on an engine with the same model, policies and slots.
  index_t load(std::span<std::byte const> in);

 private:
  struct state;
  std::unique_ptr<state> s_;
};

}  // namespace kvkeep::generate
