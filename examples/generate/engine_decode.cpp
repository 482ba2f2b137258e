// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
#include <algorithm>

#include "generate/engine_state.hpp"

namespace kvkeep::generate {

using detail::clock;
using detail::expect;
using detail::stopwatch;

void engine::state::step(std::span<feed const> tokens) {
  if (tokens.empty() || tokens.size() > live.size())
    throw std::invalid_argument("step: " + std::to_string(tokens.size()) + " tokens: expected 1.." +
                                std::to_string(live.size()));
  for (feed const& f : tokens) {
    check_alive(f.id);
    check_token(f.token);
  }
  double const sampled = sampling;
  {
    stopwatch const time(usage.decode);
    ids.clear();
    positions.clear();
    token_ids.clear();
    for (feed const& f : tokens) {
      ids.push_back(f.id);
      token_ids.push_back(f.token);
      positions.push_back(kv.tokens(f.id));  // never the cache's length: tokens have left
    }
    auto const n = static_cast<index_t>(ids.size());
    blocks.embed(token_ids, x.data());
    blocks.set_positions(positions);
    ++usage.steps;
    for (index_t l = 0; l < config.n_layers; ++l) decode_layer(l);
    note_peak();
    {
      stopwatch const confirming(usage.confirm);
      expect(kv.confirm({ids}, 1), "confirm");
    }
    trim();
    blocks.logits({x.data(), n}, step_logits.data());
    for (index_t i = 0; i < n; ++i)
      std::copy_n(step_logits.data() + offset_t{i} * config.vocabulary, config.vocabulary,
                  logits_of(ids[static_cast<std::size_t>(i)]));
    usage.decoded_tokens += n;
  }
  usage.decode -= sampling - sampled;
  if (options.observer != nullptr) options.observer->on_confirmed(ids);
}

void engine::state::decode_layer(index_t layer) {
  auto const n = static_cast<index_t>(ids.size());
  blocks.project(layer, {x.data(), n});
  for (index_t const id : ids) cache.resize(layer, id, slots_to_append(layer, id));
  {
    stopwatch const time(usage.append);
    expect(kv.append(layer, {ids}, slots.data()), "append");
  }
  write_tokens(layer);
  bool const sample = options.sample_every > 0 && usage.steps % options.sample_every == 0;
  double const before = usage.attend;
  double const plain = sample ? plain_attention(layer) : 0;
  {
    stopwatch const time(usage.attend);
    expect(kv.attend(layer, {ids}, step_queries(), blocks.attention()), "attend");
  }
  if (options.observer != nullptr)
    for (index_t i = 0; i < n; ++i)
      options.observer->on_attended(layer, ids[static_cast<std::size_t>(i)],
                                    blocks.attention() + offset_t{i} * config.q_width());
  if (sample) {
    // Who was interrupted in one of the two calls says nothing about their difference.
    double const whole = usage.attend - before;
    bool const fair = whole < 8 * plain && plain < 2 * whole;
    usage.sampled_attend += fair ? whole : 0;
    usage.sampled_plain += fair ? plain : 0;
    usage.sampled_steps += layer == 0 ? 1 : 0;
  }
  blocks.finish(layer, x.data(), n);
}

queries engine::state::step_queries() const {
  return make_queries(blocks.q(0), config.n_q_heads, 1, config.head_dim);
}

void engine::state::write_tokens(index_t layer) {
  index_t const dim = config.head_dim;
  for (std::size_t i = 0; i < ids.size(); ++i) {
    auto const row = static_cast<index_t>(i);
    for (index_t h = 0; h < config.n_kv_heads; ++h) {
      index_t const slot =
          slots[i * static_cast<std::size_t>(config.n_kv_heads) + static_cast<std::size_t>(h)];
      kv_cache::place const p{layer, ids[i], h, slot};
      std::copy_n(blocks.k(row) + offset_t{h} * dim, dim, cache.k(p));
      std::copy_n(blocks.v(row) + offset_t{h} * dim, dim, cache.v(p));
    }
    if (options.observer != nullptr)
      options.observer->on_token(
          {layer, ids[i], positions[i], blocks.q(row), blocks.k(row), blocks.v(row)});
  }
}

/// Seconds of the library's attention over the slots in use, without a session. Twice, so that the data is
/// as near as it will be for the call that follows.
double engine::state::plain_attention(index_t layer) {
  stopwatch const whole(sampling);
  auto const n = static_cast<index_t>(ids.size());
  op::attend<> a;
  a.batch = {n, ids.data(), ids.data()};
  a.layer.kv = cache.view(layer);
  a.layer.slots.lengths =
      row_major<host_space>(lengths.data(), options.max_sequences, config.n_kv_heads);
  for (index_t const id : ids)
    for (index_t h = 0; h < config.n_kv_heads; ++h)
      a.layer.slots.lengths(id, h) = kv.lengths(layer)(id, h);
  a.q = row_major<host_space>(blocks.q(0), n, config.n_q_heads, config.head_dim);
  a.out = row_major<host_space>(blocks.attention(), n, config.n_q_heads, config.head_dim);
  double seconds = 0;
  for (int i = 0; i < 2; ++i) {
    seconds = 0;
    workspace w{std::span<std::byte>(scratch)};
    stopwatch const time(seconds);
    expect(run(rt.ctx, a, w), "op::attend");
  }
  return seconds;
}

index_t engine::state::longest(index_t layer, index_t id) const {
  auto const n = kv.lengths(layer);
  index_t most = 0;
  for (index_t h = 0; h < config.n_kv_heads; ++h) most = std::max(most, n(id, h));
  return most;
}

/// Slots in use once a token has come: a head without a free slot takes its tail.
index_t engine::state::slots_to_append(index_t layer, index_t id) const {
  auto const free = kv.free_slots(layer);
  bool tail = false;
  for (index_t h = 0; h < config.n_kv_heads; ++h) tail = tail || free(id, h) < 0;
  return longest(layer, id) + (tail ? 1 : 0);
}

/// Blocks behind the slots in use go back to the pool.
void engine::state::trim() {
  if (options.layout.kind != layout_kind::paged) return;
  for (index_t l = 0; l < config.n_layers; ++l)
    for (index_t const id : ids) cache.resize(l, id, longest(l, id));
}

/// Slots in use by all sequences, before a decision frees some.
void engine::state::note_peak() {
  std::int64_t in_use = 0, sequences = 0;
  for (index_t id = 0; id < options.max_sequences; ++id) {
    if (!alive(id)) continue;
    ++sequences;
    for (index_t l = 0; l < config.n_layers; ++l)
      for (index_t h = 0; h < config.n_kv_heads; ++h) in_use += kv.lengths(l)(id, h);
  }
  if (in_use < usage.peak_slots) return;
  usage.peak_slots = in_use;
  usage.state_bytes = static_cast<std::size_t>(sequences) * kv.saved_bytes();
}

}  // namespace kvkeep::generate
