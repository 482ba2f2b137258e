// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// What an engine declares when it binds a session, and what it may read back.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "../op/common.hpp"
#include "../view/evidence.hpp"

namespace kvkeep {

/// Evidence that the engine will bring for prompts.
enum class prompt_offer : std::uint8_t {
  nothing,         ///< token counts only; keys and values can be read from the cache
  window_queries,  ///< at least the last W queries, in one chunk or in the newest ones
  all_queries,     ///< every query, chunk by chunk
  scores           ///< scores of its own
};

/// Evidence that the engine will bring for decoded tokens.
enum class decode_offer : std::uint8_t {
  nothing,
  attend,          ///< calls session::attend, or observes the queries after its own attention
  attention_rows,  ///< observes its own attention probabilities
  scores           ///< scores of its own
};

constexpr char const* to_string(prompt_offer o) noexcept {
  constexpr char const* n[] = {"nothing", "window_queries", "all_queries", "scores"};
  return n[static_cast<int>(o)];
}
constexpr char const* to_string(decode_offer o) noexcept {
  constexpr char const* n[] = {"nothing", "attend", "attention_rows", "scores"};
  return n[static_cast<int>(o)];
}

/// Bounds of a session. They fix all memory: nothing is allocated after `bind_session`.
struct limits {
  index_t max_sequences = 1;  ///< sequences alive at a time (ids 0 .. max_sequences - 1)
  index_t max_batch = 0;      ///< entries of one call; 0: max_sequences
  /// Longest prompt that comes through a transient one-layer view into a smaller pool; 0: prompts are
  /// written into the cache itself. One layer of one sequence at a time: all its chunks, then its end.
  index_t max_prompt = 0;
  index_t max_chunk = 128;  ///< query rows that are scored at a time (memory, not a limit of calls)
  /// Tokens that may be unconfirmed at a time (0: one, as in plain decoding). While one is, nothing leaves: an engine
  /// that never settles all of them grows beyond its budget.
  index_t max_draft = 0;
  prompt_offer prompt = prompt_offer::all_queries;
  decode_offer decode = decode_offer::attend;
  /// The engine calls due, choose and commit itself while decoding (and appends at the tail).
  bool engine_commits = false;
  /// Different layers may be worked on by different threads at once: scratch per layer. On the CPU it has a part for
  /// each thread of the context's pool too, of up to 16 MiB where query rows are scored without log-sum-exp (kept
  /// logits): layers * threads * 16 MiB (`session_bytes`). Layers do not look at one another then, and a session
  /// accepts a token in one while the prompt is open in another.
  bool concurrent_layers = false;
};

/// A layer of the model. Layers that hold no full-attention KV cache (sliding window, linear, latent) are
/// skipped: calls for them do nothing, and budgets do not count them.
template <class Space = host_space>
struct layer_spec {
  kv_ref<Space> kv{};
  bool skip = false;

  layer_spec() = default;
  /// @param view  a kv_ref, or a typed view
  template <class V>
  requires std::is_convertible_v<V const&, kv_ref<Space>> layer_spec(V const& view,
                                                                     bool skip_layer = false)
  noexcept : kv(view), skip(skip_layer) {}
};

/// Sequences of one call. `ids` come from `begin`; `rows` are the sequence rows of the views (null: the
/// id itself).
struct batch {
  std::span<index_t const> ids{};
  std::span<index_t const> rows{};
};

/// What begin and fork may be told.
struct sequence_options {
  index_t id = -1;  ///< wanted id; -1: the lowest free one
  /// Tokens of a shared prefix: never evicted, moved or reused. Unsupported with limits::max_prompt, and for scorers
  /// that want all queries of the prompt (policy_info::prefix_safe).
  index_t frozen = 0;
};

/// Proof that it ran. Sums over all layers, sequences and heads since `bind_session`.
struct counters {
  std::int64_t tokens = 0;        ///< tokens appended or observed, per layer
  std::int64_t evicted = 0;       ///< slots freed by decisions, per KV head
  std::int64_t cuts = 0;          ///< decisions that moved tokens
  std::int64_t victims = 0;       ///< slots marked for reuse (no byte moved)
  std::int64_t moved_bytes = 0;   ///< upper bound of K and V bytes rewritten by cuts
  std::int64_t freed_bytes = 0;   ///< K and V bytes of evicted slots
  std::size_t state_bytes = 0;    ///< policy state held by the session
  std::size_t scratch_bytes = 0;  ///< scratch, measured when the session was bound
  std::size_t scratch_peak = 0;   ///< scratch that a call really took
};

}  // namespace kvkeep
