// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
#include "scores.hpp"

namespace kvkeep::replay {

namespace {

/// State that a session would hold for the scorer, here in vectors.
struct plain_state {
  std::vector<index_t> lengths, positions, seen, ring_from;
  std::vector<float> rows, ring_q, ring_lse;
};

/// T tokens in slots 0 .. T - 1 of every head.
slot_state<> fill_slots(plain_state& m, prompt_data const& p, index_t slot_rows) {
  cache_shape const& s = p.shape;
  std::size_t const heads = uz(s.n_seq) * uz(s.n_kv_heads);
  m.lengths.assign(heads, p.tokens);
  for (std::size_t i = 0; i < heads * uz(s.max_slots); ++i)
    m.positions.push_back(static_cast<index_t>(i % uz(s.max_slots)));
  m.seen.assign(uz(s.n_seq), p.tokens);
  m.rows.assign(heads * uz(slot_rows) * uz(s.max_slots), 0.0F);
  return {row_major(m.lengths.data(), s.n_seq, s.n_kv_heads),
          row_major(m.positions.data(), s.n_seq, s.n_kv_heads, s.max_slots),
          row_major(m.rows.data(), s.n_seq, s.n_kv_heads, slot_rows, s.max_slots)};
}

/// The ring of the last queries: position p in row p % ring.
void fill_ring(plain_state& m, prompt_data const& p, index_t ring, score_input<>& in) {
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
  in.ring_q = row_major(static_cast<float const*>(m.ring_q.data()), s.n_seq, s.n_q_heads, ring,
                        s.dim_k);
  in.ring_lse =
      row_major(static_cast<float const*>(m.ring_lse.data()), s.n_seq, s.n_q_heads, ring);
  in.ring_from = m.ring_from.data();
  in.query_ring = ring;
}

/// Hands all prompt queries to the scorer, some rows at a time.
void feed(cpu::context& ctx, policy_type const& policy, prompt_data const& p,
          score_input<> const& in) {
  constexpr index_t chunk = 128;
  cache_shape const& s = p.shape;
  for (index_t first = 0; first < p.q_rows; first += chunk) {
    index_t const n = std::min(chunk, p.q_rows - first);
    std::vector<index_t> position;
    for (index_t b = 0; b < s.n_seq; ++b)
      for (index_t r = 0; r < n; ++r) position.push_back(p.tokens - p.q_rows + first + r);
    query_rows<> rows;
    rows.q = row_major(p.q, s.n_seq, s.n_q_heads, p.q_rows, s.dim_k);
    rows.q.data += offset_t{first} * s.dim_k;
    rows.q.extent[2] = n;
    rows.position = row_major(static_cast<index_t const*>(position.data()), s.n_seq, n);
    run_measured("observe_prompt",
                 [&](workspace& w) { return policy.score.observe_prompt(ctx, in, rows, w); });
  }
}

}  // namespace

std::vector<float> prompt_scores(policy_type const& policy, prompt_data const& p,
                                 layout_kind layout) {
  cache_shape const& s = p.shape;
  tools::kv_cache const cache = make_cache(p, layout, p.tokens);
  state_spec const spec = policy.score.state(s);
  plain_state memory;
  score_input<> in;
  in.batch.n = s.n_seq;
  in.layer = {cache.view(), fill_slots(memory, p, spec.slot_rows)};
  in.guard = {policy.keep.sinks, policy.keep.recent, nullptr};
  in.seen = memory.seen.data();
  in.rows = in.layer.slots.rows;
  if (spec.query_ring > 0) fill_ring(memory, p, spec.query_ring, in);

  cpu::context ctx;
  if (policy.score.traits().prompt == evidence::all_queries) feed(ctx, policy, p, in);
  std::vector<float> scores(uz(s.n_seq) * uz(s.n_kv_heads) * uz(s.max_slots));
  score_map<> const out = row_major(scores.data(), s.n_seq, s.n_kv_heads, s.max_slots);
  run_measured("score", [&](workspace& w) { return policy.score.score(ctx, in, out, w); });
  if (policy.width() != scope::head)
    run_measured("mean_heads", [&](workspace& w) {
      return run(ctx, op::mean_heads<>{in.batch, in.layer.slots, out}, w);
    });
  return scores;
}

}  // namespace kvkeep::replay
