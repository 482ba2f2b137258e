// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// A model's caches under one session, and what decode steps in it need. Layers rotate, so that K, V
/// and all state come from memory.
#pragma once

#include <memory>

#include <kvkeep/engine/policy_table.hpp>

#include "inputs.hpp"

namespace bench {

class decode_model {
 public:
  /// @param policy  a name of the policy table; `-cached` behind it chooses MorphKV's cached rows
  /// @param prompt  tokens of every sequence's prompt
  decode_model(point const& p, std::string const& policy, index_t prompt)
      : p_(p), shape_(shape_of(p, most_slots(p, policy))), prompt_(prompt) {
    random_bits r{5};
    for (std::size_t i = 0, n = layers_for(p, prompt); i < n; ++i)
      with_type(p.type, [&](auto t) { caches_.emplace_back(t, shape_, p.where, r); });
    bind(policy);
    queries_ = random_rows<float>(query_sets * static_cast<std::size_t>(row_floats()), r);
    rows_ = random_rows<float>(4096 + 2 * static_cast<std::size_t>(p.dim), r);
    out_.resize(static_cast<std::size_t>(row_floats()));
    slot_.resize(static_cast<std::size_t>(p.batch * p.kv_heads));
    begin_all(r, policy == "h2o");
    ids_.resize(static_cast<std::size_t>(p.batch));
    std::iota(ids_.begin(), ids_.end(), 0);
    prepare_plain();
  }

  /// Layers that no cache holds together. One that alone is larger than any cache needs one other.
  static std::size_t layers_for(point const& p, index_t tokens) {
    double const bytes = 2.0 * p.batch * p.kv_heads * tokens * p.dim * dtype_bytes(p.type);
    if (bytes > 50e6) return 2;
    // 3 i + 2: then each of three works comes to a layer after equally many others.
    return static_cast<std::size_t>(std::clamp(72e6 / bytes, 5.0, 32.0)) / 3 * 3 + 2;
  }

  /// Tokens between two bursts of "morphkv-burst".
  static index_t burst_length(point const& p) {
    return static_cast<index_t>(std::ceil((1 + p.capacity) * burst_factor)) - p.capacity;
  }

  std::size_t layers() const { return caches_.size(); }
  /// Slots in use in every head of a layer.
  index_t in_use(std::size_t layer) const { return session_->lengths(int_of(layer))(0, 0); }
  /// The layer for the `which`-th of the other works while `layer` makes its step.
  std::size_t other(std::size_t layer, std::size_t which) const {
    return (layer + which * (layers() + 1) / 3) % layers();
  }

  double append(std::size_t layer) {
    return timed(
        [&] { expect(session_->append(int_of(layer), entries(), slot_.data()), "append"); });
  }
  /// The engine's part: the new token's rows.
  void write_token(std::size_t layer) {
    for (index_t i = 0; i < p_.batch * p_.kv_heads; ++i)
      for (auto const* plane : {&caches_[layer].view.k, &caches_[layer].view.v})
        write_row(*plane, i / p_.kv_heads, i % p_.kv_heads, slot_[static_cast<std::size_t>(i)]);
  }
  double attend(std::size_t layer) {
    queries const q = make_queries(next_queries(), shape_.n_q_heads, 1, p_.dim);
    return timed(
        [&] { expect(session_->attend(int_of(layer), entries(), q, out_.data()), "attend"); });
  }
  double confirm() {
    return timed([&] { expect(session_->confirm(entries(), 1), "confirm"); });
  }
  /// Attention without a session, over the first `length` slots; with `evidence` it hands over weights.
  double plain_attention(std::size_t layer, index_t length, bool evidence) {
    plain_.layer.kv = caches_[layer].view;
    plain_.q.data = next_queries();
    plain_.weights = {};
    plain_.weight_sum = {};
    if (evidence) {
      index_t const group = p_.group, stride = shape_.max_slots + 14;
      plain_.weights = row_major(weights_[layer].data(), p_.batch, p_.kv_heads, group, stride);
      plain_.weight_sum = row_major(weight_sums_.data(), p_.batch, p_.kv_heads, group, 1);
    }
    return timed([&] {
      for (std::size_t i = 0; i < lengths_.size(); ++i) lengths_[i] = length;  // "append"
      workspace ws(scratch_);
      expect(run(ctx_, plain_, ws), "attention");
    });
  }
  counters count() const { return session_->count(); }
  /// What the attention over `length` slots cannot avoid.
  work attention_work(index_t length) const {
    double const rows = 2.0 * p_.batch * p_.kv_heads * length * p_.dim;  // of K and V, in elements
    return {rows * dtype_bytes(p_.type), rows * 2 * p_.group};
  }

 private:
  using session_type = session<cpu::context, any_policy<cpu::context>>;
  static constexpr std::size_t query_sets = 61;

  static constexpr double burst_factor = 1.1;  ///< evict_after
  static index_t most_slots(point const& p, std::string const& policy) {
    return p.capacity + (policy == "morphkv-burst" ? burst_length(p) : 0) + 2;
  }

  static index_t int_of(std::size_t n) { return static_cast<index_t>(n); }
  batch entries() const { return {ids_}; }
  index_t row_floats() const { return p_.batch * shape_.n_q_heads * p_.dim; }
  float const* next_queries() {
    turn_ = (turn_ + 1) % query_sets;
    return queries_.data() + turn_ * static_cast<std::size_t>(row_floats());
  }
  void bind(std::string const& policy) {
    std::vector<layer_spec<>> layers;
    for (auto const& c : caches_) layers.push_back(c.view);
    policy_options o;
    o.capacity = p_.capacity;
    o.window = p_.window;
    o.sinks = policy == "streamingllm" ? 4 : 0;
    if (policy == "morphkv-cached") o.evaluation = morph_rows::cached;
    if (policy == "morphkv-burst") o.evict_after = burst_factor;
    limits lim;
    lim.max_sequences = p_.batch;
    session_ = std::make_unique<session_type>(
        bind_session(ctx_, make_policy<cpu::context>(policy.substr(0, policy.find('-')), o),
                     std::span<layer_spec<> const>(layers), lim));
  }
  /// The prompts. Sums of attention (H2O) cost a prompt's square and say nothing about the keys of a
  /// sequence: there the others are copies of the first.
  void begin_all(random_bits& r, bool copies) {
    for (index_t i = 0, id = 0; i < p_.batch; ++i) {
      if (copies && i > 0) {
        expect(session_->fork(0, id), "fork");
        continue;
      }
      expect(session_->begin(id), "begin");
      auto const q = random_rows<float>(product(shape_.n_q_heads, prompt_, p_.dim), r);
      auto const shown = make_queries(q.data(), shape_.n_q_heads, prompt_, p_.dim);
      for (std::size_t l = 0; l < layers(); ++l) {
        expect(session_->observe(int_of(l), id, shown), "observe");
        expect(session_->end_prompt(int_of(l), id), "end_prompt");
      }
    }
  }
  void write_row(plane_ref<> const& plane, index_t seq, index_t head, index_t slot) {
    float const* const from = rows_.data() + (row_at_ += 7) % 4096;
    offset_t const at =
        visit_layout(plane.layout, [&](auto const& l) { return l.offset(seq, head, slot); });
    with_type(p_.type, [&](auto t) {
      using T = decltype(t);
      T* const to = reinterpret_cast<T*>(plane.data) + at;
      for (index_t d = 0; d < p_.dim; ++d) to[d] = from_float<T>(from[d]);
    });
  }
  void prepare_plain() {
    lengths_.assign(slot_.size(), prompt_);
    plain_.batch.n = p_.batch;
    plain_.layer.kv = caches_[0].view;
    plain_.layer.slots.lengths = row_major(lengths_.data(), p_.batch, p_.kv_heads);
    plain_.q =
        row_major(static_cast<float const*>(queries_.data()), p_.batch, shape_.n_q_heads, p_.dim);
    plain_.out = row_major(out_.data(), p_.batch, shape_.n_q_heads, p_.dim);
    scratch_ = scratch_for(ctx_, plain_);
    weight_sums_.resize(static_cast<std::size_t>(p_.batch * shape_.n_q_heads));
    weights_.assign(layers(), std::vector<float>(weight_sums_.size() *
                                                 static_cast<std::size_t>(shape_.max_slots + 14)));
  }

  point p_;
  cache_shape shape_;
  index_t prompt_;
  cpu::context ctx_;
  std::vector<layer_cache> caches_;
  std::unique_ptr<session_type> session_;
  std::vector<float> queries_, rows_, out_, weight_sums_;
  std::vector<std::vector<float>> weights_;
  std::vector<index_t> ids_, slot_, lengths_;
  std::vector<std::byte> scratch_;
  op::attend<> plain_;
  std::size_t turn_ = 0, row_at_ = 0;
};

}  // namespace bench
