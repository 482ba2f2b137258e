// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// The baseline of comparisons that knows the future: it keeps what the full cache will look at most.
#pragma once

#include <memory>
#include <utility>
#include <vector>

#include "generate/engine.hpp"

namespace kvkeep::generate {

/// Attention that the positions of one sequence get from its later queries, by layer and KV head.
class future_attention {
 public:
  future_attention() = default;
  /// @param first  position of the first query that counts
  future_attention(index_t n_layers, index_t n_kv_heads, index_t first);

  /// The weights of one more query on the positions 0, 1, ... up to its own, summed over a KV head's group. Queries
  /// come in order, each with all its layers and heads.
  void add(index_t layer, index_t kv_head, std::vector<float> weights);
  /// Turns weights into sums over the later queries. Once, when all have come.
  void finish();
  /// What the queries at `query` and later give to the token at `position`; 0 beyond what was recorded.
  float remaining(index_t layer, index_t kv_head, index_t query, index_t position) const;

 private:
  std::size_t at(index_t layer, index_t kv_head) const {
    return product(layer, n_kv_heads_) + static_cast<std::size_t>(kv_head);
  }

  index_t n_kv_heads_ = 0;
  index_t first_ = 0;
  /// [at(layer, kv_head)][query - first][position]
  std::vector<std::vector<std::vector<float>>> sums_;
};

/// Watches an engine that evicts nothing, and computes what the queries behind each prompt look at.
class attention_recorder final : public step_observer {
 public:
  explicit attention_recorder(model_config const& c) : config_(c) {}

  void on_token(token const& t) override;
  void on_attended(index_t, index_t, float const*) override {}
  void on_confirmed(std::span<index_t const> ids) override;

  /// Of all sequences, in the order in which they began.
  std::vector<future_attention> take();

 private:
  struct sequence {
    std::size_t number = 0;                ///< among those that have begun
    bool decodes = false;                  ///< its prompt is complete
    std::vector<std::vector<float>> keys;  ///< [layer * n_kv_heads + kv_head], rows by position
  };
  std::vector<float> weights(std::vector<float> const& keys, float const* group) const;

  model_config config_;
  std::vector<sequence> live_;  ///< [id]
  std::vector<future_attention> futures_;
};

/// Follows an engine, so that a scorer knows which sequence and layer a decision is about: the engine decides for a
/// layer right after it has shown that layer's newest tokens, when prompts are cut layer by layer and heads keep sets
/// of their own.
class oracle final : public step_observer {
 public:
  /// @param futures  of the sequences that the engine will begin, in this order
  explicit oracle(std::vector<future_attention> futures) : futures_(std::move(futures)) {}

  void on_token(token const& t) override;
  void on_attended(index_t, index_t, float const*) override {}
  void on_confirmed(std::span<index_t const>) override {}

  /// Sequence of the newest token.
  index_t newest() const { return id_; }
  /// What a position of the layer under decision will still get, behind the sequence's newest token.
  float score(index_t id, index_t kv_head, index_t position) const;

 private:
  struct sequence {
    std::size_t number = 0;
    index_t tokens = 0;
  };
  std::vector<future_attention> futures_;
  std::vector<sequence> live_;  ///< [id]
  std::size_t begun_ = 0;
  index_t layer_ = 0;
  index_t id_ = 0;
};

/// Ranks by what an oracle says that is its engine's observer.
struct oracle_score : scorer_base {
  std::shared_ptr<oracle const> run;

  scorer_traits traits() const {
    scorer_traits t;
    t.name = "future_attention";
    t.prefix_safe = t.draft_safe = false;  // it follows whole sequences, token by token
    return t;
  }
  template <class Ctx>
  status score(Ctx&, score_input<space_of<Ctx>> const& in, score_map<space_of<Ctx>> out,
               workspace& ws) const {
    if (ws.measuring()) return status::ok;
    for (index_t b = 0; b < in.batch.n; ++b) {
      index_t const state = in.batch.id_of(b);
      // A prompt lies in a buffer of its own; while decoding, rows of the state are the engine's ids.
      index_t const id = in.newest_row == nullptr ? run->newest() : state;
      for (index_t h = 0; h < in.layer.kv.shape.n_kv_heads; ++h)
        for (index_t s = 0; s < in.layer.slots.lengths(state, h); ++s)
          out(b, h, s) = run->score(id, h, in.layer.slots.positions(state, h, s));
    }
    return status::ok;
  }
};

/// Keeps `capacity` tokens and protects none. `run` must be the engine's observer.
policy_pair make_oracle_pair(std::shared_ptr<oracle const> run, index_t capacity);

}  // namespace kvkeep::generate
