// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// Prompts on a backend: through its session, and their scores from the pieces below it.
#pragma once

#include "ops_on.hpp"
#include "support/cache.hpp"

namespace kvkeep::replay {

template <class B>
using policy_on_machine = any_policy<typename B::context>;
template <class B>
using cache_on = tools::kv_cache_in<space_on<B>, B::template allocator>;

/// The prompt's tokens in a cache of the given layout.
template <class B>
cache_on<B> make_cache(prompt_data const& p, layout_kind layout) {
  cache_shape s = p.shape;
  s.max_slots = p.tokens;
  cache_on<B> cache(s, layout);
  if (p.k == nullptr) return cache;
  offset_t row = 0;
  for (index_t b = 0; b < s.n_seq; ++b)
    for (index_t h = 0; h < s.n_kv_heads; ++h)
      for (index_t t = 0; t < p.tokens; ++t, ++row)
        cache.write(b, h, t, p.k + row * s.dim_k, p.v == nullptr ? nullptr : p.v + row * s.dim_v);
  return cache;
}

inline prompt_offer offer_of(evidence e) {
  return e == evidence::all_queries      ? prompt_offer::all_queries
         : e == evidence::window_queries ? prompt_offer::window_queries
                                         : prompt_offer::nothing;
}

template <class B>
int_rows keep_on(B& machine, chosen const& c, prompt_data const& p, layout_kind layout,
                 index_t n_layers, index_t layer) {
  using context = typename B::context;
  auto const policy = make_policy<context>(c.name, c.options);
  auto const grow = make_policy<context>("fullkv");  // prefill alone: nothing leaves later
  std::vector<cache_on<B>> caches;
  std::vector<layer_spec<space_on<B>>> layers;
  for (index_t l = 0; l < n_layers; ++l) {
    caches.push_back(make_cache<B>(p, layout));
    layers.emplace_back(caches.back().view());
  }
  limits lim;
  lim.max_sequences = p.shape.n_seq;
  lim.prompt = offer_of(policy.score.traits().prompt);
  lim.decode = decode_offer::nothing;
  typename B::session s(machine, policy, grow, layers, lim);

  int_rows kept;
  std::size_t const q_size = product(p.shape.n_q_heads, p.q_rows, p.shape.dim_k);
  auto const q_all = copy_on<B>(p.q, uz(p.shape.n_seq) * q_size);
  for (index_t b = 0; b < p.shape.n_seq; ++b) {
    s.begin(b);
    queries q = tokens_only(p.tokens);
    if (p.q != nullptr)
      q = make_queries(q_all.data() + uz(b) * q_size, p.shape.n_q_heads, p.q_rows, p.shape.dim_k);
    q.tokens = p.tokens;
    for (index_t l = 0; l < n_layers; ++l) s.observe(l, b, q);
    s.end_prompt(b);
    machine.wait();
    for (index_t h = 0; h < p.shape.n_kv_heads; ++h) {
      index_t const* positions = s.positions(layer).at(b, h);
      kept.emplace_back(positions, positions + s.lengths(layer)(b, h));
      std::sort(kept.back().begin(), kept.back().end());
    }
  }
  s.verify();
  return kept;
}

/// State that a session would hold for the scorer, here in arrays.
template <class B>
struct plain_state {
  array_on<B, index_t> lengths, positions, seen, ring_from;
  array_on<B, float> rows, ring_q, ring_lse, gathered;
};

/// T tokens in slots 0 .. T - 1 of every head.
template <class B>
slot_state<space_on<B>> fill_slots(plain_state<B>& m, prompt_data const& p, index_t slot_rows) {
  using space = space_on<B>;
  cache_shape const& s = p.shape;
  std::size_t const heads = uz(s.n_seq) * uz(s.n_kv_heads);
  m.lengths.assign(heads, p.tokens);
  for (std::size_t i = 0; i < heads * uz(s.max_slots); ++i)
    m.positions.push_back(static_cast<index_t>(i % uz(s.max_slots)));
  m.seen.assign(uz(s.n_seq), p.tokens);
  m.rows.assign(heads * uz(slot_rows) * uz(s.max_slots), 0.0F);
  return {row_major<space>(m.lengths.data(), s.n_seq, s.n_kv_heads),
          row_major<space>(m.positions.data(), s.n_seq, s.n_kv_heads, s.max_slots),
          row_major<space>(m.rows.data(), s.n_seq, s.n_kv_heads, slot_rows, s.max_slots)};
}

/// The ring of the last queries: position p in row p % ring.
template <class B>
void fill_ring(plain_state<B>& m, prompt_data const& p, index_t ring,
               score_input<space_on<B>>& in) {
  using space = space_on<B>;
  cache_shape const& s = p.shape;
  index_t const rows = std::min(p.q_rows, ring), first = p.tokens - rows;
  std::size_t const heads = uz(s.n_seq) * uz(s.n_q_heads);
  m.ring_q.assign(heads * uz(ring) * uz(s.dim_k), 0.0F);
  m.ring_lse.assign(heads * uz(ring), 0.0F);
  m.ring_from.assign(uz(s.n_seq), first);
  for (std::size_t h = 0; h < heads; ++h)
    for (index_t t = first; t < p.tokens; ++t) {
      std::size_t const from = h * uz(p.q_rows) + uz(t - p.tokens + p.q_rows);
      std::size_t const to = h * uz(ring) + uz(t % ring);
      std::copy_n(p.q + from * uz(s.dim_k), s.dim_k,
                  m.ring_q.begin() + static_cast<std::ptrdiff_t>(to * uz(s.dim_k)));
    }
  in.ring_q = row_major<space>(static_cast<float const*>(m.ring_q.data()), s.n_seq, s.n_q_heads,
                               ring, s.dim_k);
  in.ring_lse =
      row_major<space>(static_cast<float const*>(m.ring_lse.data()), s.n_seq, s.n_q_heads, ring);
  in.ring_from = m.ring_from.data();
  in.query_ring = ring;
}

/// Hands all prompt queries to the scorer, some rows at a time.
template <class B>
void feed(B& machine, policy_on_machine<B> const& policy, prompt_data const& p,
          score_input<space_on<B>> const& in) {
  using space = space_on<B>;
  constexpr index_t chunk = 128;
  cache_shape const& s = p.shape;
  auto const q = copy_on<B>(p.q, product(s.n_seq, s.n_q_heads, p.q_rows, s.dim_k));
  for (index_t first = 0; first < p.q_rows; first += chunk) {
    index_t const n = std::min(chunk, p.q_rows - first);
    array_on<B, index_t> position;
    for (index_t b = 0; b < s.n_seq; ++b)
      for (index_t r = 0; r < n; ++r) position.push_back(p.tokens - p.q_rows + first + r);
    query_rows<space> rows;
    rows.q = row_major<space>(q.data(), s.n_seq, s.n_q_heads, p.q_rows, s.dim_k);
    rows.q.data += offset_t{first} * s.dim_k;
    rows.q.extent[2] = n;
    rows.position = row_major<space>(static_cast<index_t const*>(position.data()), s.n_seq, n);
    run_measured(machine, "observe_prompt", [&](workspace& w) {
      return policy.score.observe_prompt(machine.ctx, in, rows, w);
    });
  }
}

template <class B>
std::vector<float> scores_on(B& machine, chosen const& c, prompt_data const& p,
                             layout_kind layout) {
  using space = space_on<B>;
  auto const policy = make_policy<typename B::context>(c.name, c.options);
  cache_shape const& s = p.shape;
  auto const cache = make_cache<B>(p, layout);
  state_spec const spec = policy.score.state(s);
  plain_state<B> memory;
  score_input<space> in;
  in.batch.n = s.n_seq;
  in.layer = {cache.view(), fill_slots(memory, p, spec.slot_rows)};
  in.guard = {policy.keep.sinks, policy.keep.recent, nullptr};
  in.seen = memory.seen.data();
  in.rows = in.layer.slots.rows;
  if (spec.query_ring > 0) fill_ring(memory, p, spec.query_ring, in);
  memory.gathered.assign(product(s.n_seq, s.n_kv_heads, spec.prompt_floats), 0.0F);
  in.gathered = row_major<space>(memory.gathered.data(), s.n_seq, s.n_kv_heads, spec.prompt_floats);

  if (policy.score.traits().prompt == evidence::all_queries) feed(machine, policy, p, in);
  array_on<B, float> scores(uz(s.n_seq) * uz(s.n_kv_heads) * uz(s.max_slots));
  score_map<space> const out = row_major<space>(scores.data(), s.n_seq, s.n_kv_heads, s.max_slots);
  run_measured(machine, "score",
               [&](workspace& w) { return policy.score.score(machine.ctx, in, out, w); });
  if (policy.width() != scope::head)
    run_measured(machine, "mean_heads", [&](workspace& w) {
      return run(machine.ctx, op::mean_heads<space>{in.batch, in.layer.slots, out}, w);
    });
  return {scores.begin(), scores.end()};
}

}  // namespace kvkeep::replay
