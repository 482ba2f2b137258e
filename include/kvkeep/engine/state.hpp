// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// The memory of a session: per-slot and per-sequence state of every layer, carved from one block.
#pragma once

#include <utility>

#include "../policy/policy.hpp"
#include "limits.hpp"

namespace kvkeep::detail {

/// Rows of the per-slot state, in this order: the prompt scorer's, the decode scorer's (the same rows when
/// one policy serves both), the ring of attention weights, loose rows, the prompt's scores for coupled layers.
struct row_plan {
  index_t prompt_rows = 0;
  index_t decode_at = 0;
  index_t decode_rows = 0;
  index_t weights_at = 0;
  index_t weight_ring = 0;  ///< ring rows, drafts included; group * weight_ring slot rows
  index_t loose_at = 0;
  index_t loose_rows = 0;     ///< the decode scorer's rows that new tokens do not find cleared
  index_t head_floats = 0;    ///< the decode scorer's floats per sequence and KV head
  index_t prompt_floats = 0;  ///< the prompt scorer's, until the prompt has ended
  index_t score_at = -1;      ///< -1: none
  index_t total = 0;
  index_t query_ring = 0;     ///< rows of the query ring, drafts included
  bool rings_tokens = false;  ///< decoded tokens' queries enter it
};

/// Shape of all state.
struct state_shape {
  cache_shape cache{};
  index_t n_sequences = 0;
  index_t max_prompt = 0;  ///< slots of the transient prompt's state, or 0
  index_t drafts = 1;      ///< tokens that may be unconfirmed
  row_plan rows{};
};

/// What two policies ask for together.
struct bound_rows {
  row_plan rows{};
  bool attention_folds = false;  ///< attention does the decode scorer's fold
};

/// Rows of the state of a prompt policy and a decode policy; `one`: they are the same.
template <class P, class D>
bound_rows plan_rows(P const& prompt, D const& decode, bool one, limits const& lim,
                     cache_shape const& cache) {
  bound_rows b;
  row_plan& r = b.rows;
  state_spec const ps = prompt.score.state(cache);
  state_spec const ds = one ? ps : decode.score.state(cache);
  r.prompt_rows = ps.slot_rows;
  r.decode_at = one ? 0 : ps.slot_rows;
  r.decode_rows = ds.slot_rows;
  r.weights_at = one ? ps.slot_rows : ps.slot_rows + ds.slot_rows;
  bool const at_decode = decode.score.traits().at_decode;
  r.rings_tokens = at_decode && ds.ring_at_decode;
  b.attention_folds =
      at_decode && ds.folds_weights && lim.decode == decode_offer::attend && lim.max_draft == 0;
  if (at_decode && ds.weight_ring > 0 && !b.attention_folds)
    r.weight_ring = ds.weight_ring + lim.max_draft;
  r.loose_at = r.weights_at + r.weight_ring * cache.group();
  r.loose_rows = at_decode ? ds.loose_rows : 0;
  r.head_floats = at_decode ? ds.head_floats : 0;
  r.prompt_floats = ps.prompt_floats;
  r.total = r.loose_at + r.loose_rows;
  if (prompt.budget.traits().couples_layers) r.score_at = r.total++;
  index_t const queries =
      at_decode && ds.query_ring > ps.query_ring ? ds.query_ring : ps.query_ring;
  r.query_ring = queries > 0 ? queries + lim.max_draft + 1 : 0;
  return b;
}

/// State of one managed layer.
template <class Space>
struct layer_state {
  kv_ref<Space> kv{};
  index_t spec = 0;                        ///< index among all layers
  index_t number = 0;                      ///< index among managed layers
  slot_state<Space> slots{};               ///< lengths [S,H], positions [S,H,N], rows [S,H,R,N]
  tensor_ref<index_t, 2, Space> k{};       ///< [S, H] tokens that decoding keeps
  tensor_ref<index_t, 2, Space> victim{};  ///< [S, H] free slot inside the slots in use, or -1
  tensor_ref<index_t, 3, Space>
      fresh{};  ///< [draft, S, H] slots of the unconfirmed tokens, by sequence in memory
  tensor_ref<float, 4, Space> ring_q{};      ///< [S, Hq, ring, dim_k]
  tensor_ref<float, 3, Space> ring_lse{};    ///< [S, Hq, ring]
  tensor_ref<float, 4, Space> weight_sum{};  ///< [S, H, g, ring]
  tensor_ref<float, 4, Space> weight_max{};  ///< [S, H, g, ring], where there are head floats
  tensor_ref<float, 3, Space> head{};        ///< [S, H, head floats]
  tensor_ref<float, 3, Space> gathered{};    ///< [S, H, prompt floats], but for transient prompts
  index_t* seen = nullptr;                   ///< [S] confirmed tokens
  index_t* ring_from = nullptr;              ///< [S] oldest position in the query ring
  index_t* appended = nullptr;               ///< [S] tokens with a slot
  index_t* attended = nullptr;               ///< [S] host: tokens with evidence
  std::uint8_t* has_lse = nullptr;           ///< [S] host: every ring row has a log-sum-exp
  std::uint8_t* prompt_done = nullptr;       ///< [S] host: 1: it has ended; 2: there was none
  counters count{};
};

/// State of the slots of one transient prompt.
template <class Space>
struct staging_state {
  slot_state<Space> slots{};
  tensor_ref<float, 4, Space> weight_sum{};
  tensor_ref<float, 3, Space> gathered{};
};

/// Per-slot rows begin a cache line apart, so that kernels may take whole vectors.
template <class Space>
void carve_slots(workspace& w, slot_state<Space>& s, index_t n, index_t heads, index_t rows,
                 index_t slots) {
  index_t const padded = (slots + 15) / 16 * 16;
  s.lengths = row_major<Space>(w.take<index_t>(product(n, heads)), n, heads);
  s.positions = row_major<Space>(w.take<index_t>(product(n, heads, padded)), n, heads, padded);
  s.rows = row_major<Space>(w.take<float>(product(n, heads, rows, padded)), n, heads, rows, padded);
  s.positions.extent[2] = s.rows.extent[3] = slots;
}

/// Takes one layer's arrays. The same code measures and places.
template <class Space>
void carve_layer(workspace& w, layer_state<Space>& l, state_shape const& s) {
  index_t const n = s.n_sequences, h = s.cache.n_kv_heads, hq = s.cache.n_q_heads;
  carve_slots(w, l.slots, n, h, s.rows.total, s.cache.max_slots);
  l.k = row_major<Space>(w.take<index_t>(product(n, h)), n, h);
  l.victim = row_major<Space>(w.take<index_t>(product(n, h)), n, h);
  l.fresh = row_major<Space>(w.take<index_t>(product(n, s.drafts, h)), n, s.drafts, h);
  std::swap(l.fresh.extent[0], l.fresh.extent[1]);
  std::swap(l.fresh.stride[0], l.fresh.stride[1]);
  index_t const ring = s.rows.query_ring;
  l.ring_q = row_major<Space>(w.take<float>(product(n, hq, ring, s.cache.dim_k)), n, hq, ring,
                              s.cache.dim_k);
  l.ring_lse = row_major<Space>(w.take<float>(product(n, hq, ring)), n, hq, ring);
  index_t const g = s.cache.group();
  l.weight_sum = row_major<Space>(w.take<float>(product(n, hq, s.rows.weight_ring)), n, h, g,
                                  s.rows.weight_ring);
  index_t const floats = s.rows.head_floats, maxima = floats > 0 ? s.rows.weight_ring : 0;
  l.weight_max = row_major<Space>(w.take<float>(product(n, hq, maxima)), n, h, g, maxima);
  l.head = row_major<Space>(w.take<float>(product(n, h, floats)), n, h, floats);
  index_t const kept = s.max_prompt > 0 ? 0 : s.rows.prompt_floats;
  l.gathered = row_major<Space>(w.take<float>(product(n, h, kept)), n, h, kept);
  l.seen = w.take<index_t>(product(n));
  l.ring_from = w.take<index_t>(product(n));
  l.appended = w.take<index_t>(product(n));
  l.attended = w.take<index_t>(product(n));
  l.has_lse = w.take<std::uint8_t>(product(n));
  l.prompt_done = w.take<std::uint8_t>(product(n));
}

/// Session-wide arrays.
template <class Space>
struct shared_state {
  index_t* frozen = nullptr;                    ///< [S]
  index_t* confirmed = nullptr;                 ///< [S] host: tokens confirmed in all layers
  std::uint8_t* alive = nullptr;                ///< [S] host
  std::uint32_t* generation = nullptr;          ///< [S] host: changes when slots move or are reused
  tensor_ref<index_t, 2, Space> prompt_k{};     ///< [layer, H] budgets of the prompt that is ending
  tensor_ref<float, 3, Space> prompt_spread{};  ///< [layer, H, 2] for budgets that need it
  tensor_ref<float, 4, Space> prompt_scores{};  ///< [layer, 1, H, slot] where budgets need them
  tensor_ref<float, 3, Space> sequence_scores{};  ///< [entry, H, slot] sum over layers
  tensor_ref<float, 3, Space> prompt_sum{};  ///< [1, H, slot] that of the prompt that is ending
  staging_state<Space> staging;
  index_t prompt_owner = -1;   ///< sequence whose coupled layers are being decided
  index_t staging_layer = -1;  ///< owner of the transient prompt's state
  index_t staging_id = -1;
};

template <class Space>
void carve_shared(workspace& w, shared_state<Space>& s, state_shape const& shape, index_t n_layers,
                  index_t score_layers, index_t sequence_entries) {
  index_t const n = shape.n_sequences, h = shape.cache.n_kv_heads;
  index_t const slots =
      shape.max_prompt > shape.cache.max_slots ? shape.max_prompt : shape.cache.max_slots;
  s.frozen = w.take<index_t>(product(n));
  s.confirmed = w.take<index_t>(product(n));
  s.alive = w.take<std::uint8_t>(product(n));
  s.generation = w.take<std::uint32_t>(product(n));
  s.prompt_k = row_major<Space>(w.take<index_t>(product(n_layers, h)), n_layers, h);
  s.prompt_spread = row_major<Space>(w.take<float>(product(n_layers, h, 2)), n_layers, h, 2);
  s.prompt_scores =
      row_major<Space>(w.take<float>(product(score_layers, h, slots)), score_layers, 1, h, slots);
  s.sequence_scores = row_major<Space>(w.take<float>(product(sequence_entries, h, slots)),
                                       sequence_entries, h, slots);
  index_t const sums = sequence_entries > 0 ? 1 : 0;
  s.prompt_sum = row_major<Space>(w.take<float>(product(sums, h, slots)), sums, h, slots);
  if (shape.max_prompt > 0) {
    carve_slots(w, s.staging.slots, 1, h, shape.rows.total, shape.max_prompt);
    s.staging.weight_sum =
        row_major<Space>(w.take<float>(product(shape.cache.n_q_heads, shape.rows.weight_ring)), 1,
                         h, shape.cache.group(), shape.rows.weight_ring);
    index_t const floats = shape.rows.prompt_floats;
    s.staging.gathered = row_major<Space>(w.take<float>(product(h, floats)), 1, h, floats);
  }
}

/// Leading-index slice of a tensor: `t[i, ...]` keeps its rank, so that index 0 is `i`.
template <class T, int R, class Space>
tensor_ref<T, R, Space> rebase(tensor_ref<T, R, Space> t, index_t i) noexcept {
  if (t.data != nullptr) t.data += static_cast<offset_t>(i) * t.stride[0];
  return t;
}

/// `t[i, ...]`, a tensor of one rank less.
template <class T, int R, class Space>
tensor_ref<T, R - 1, Space> slice(tensor_ref<T, R, Space> const& t, index_t i) noexcept {
  tensor_ref<T, R - 1, Space> s{};
  s.data = rebase(t, i).data;
  for (int a = 0; a < R - 1; ++a) {
    s.extent[a] = t.extent[a + 1];
    s.stride[a] = t.stride[a + 1];
  }
  return s;
}

/// `[id, kv_head, row, slot]` restricted to rows from `first` on.
template <class Space>
tensor_ref<float, 4, Space> rows_from(tensor_ref<float, 4, Space> t, index_t first,
                                      index_t n) noexcept {
  if (t.data != nullptr) t.data += static_cast<offset_t>(first) * t.stride[2];
  t.extent[2] = n;
  return t;
}

/// The weight ring inside the slot rows as `[id, kv_head, g, slot]` of ring row 0; the next ring row lies
/// one slot row further.
template <class Space>
tensor_ref<float, 4, Space> weight_rows(tensor_ref<float, 4, Space> rows, row_plan const& p,
                                        index_t group) noexcept {
  auto t = rows_from(rows, p.weights_at, group);
  t.stride[2] *= p.weight_ring;
  return t;
}

/// One cache with its state, as scorers see it: the pool, or a transient prompt, whose arrays have one row.
template <class Space>
struct cache_source {
  batch_ref<Space> batch{};
  layer_ref<Space> layer{};
  tensor_ref<float, 4, Space> weight_sum{};
  tensor_ref<float, 3, Space> gathered{};
  index_t id0 = 0;  ///< sequence that index 0 of the arrays stands for
};

/// What a scorer sees of a cache, but for what a call adds. `prompt`: in the prompt's role.
template <class Space>
score_input<Space> view_of(layer_state<Space> const& l, row_plan const& r,
                           cache_source<Space> const& s, bool prompt) noexcept {
  layer_ref<Space> const& layer = s.layer;
  score_input<Space> in;
  in.batch = s.batch;
  in.layer = layer;
  if (l.seen != nullptr) in.seen = l.seen + s.id0;
  in.rows = prompt ? rows_from(layer.slots.rows, 0, r.prompt_rows)
                   : rows_from(layer.slots.rows, r.decode_at, r.decode_rows);
  in.ring_q = rebase(l.ring_q, s.id0);
  in.ring_lse = rebase(l.ring_lse, s.id0);
  if (l.ring_from != nullptr) in.ring_from = l.ring_from + s.id0;
  in.query_ring = r.query_ring;
  in.rings_tokens = r.rings_tokens;
  in.weights = weight_rows(layer.slots.rows, r, layer.kv.shape.group());
  in.weight_sum = s.weight_sum;
  in.weight_stride = layer.slots.rows.stride[2];
  in.weight_ring = r.weight_ring;
  in.weight_max = rebase(l.weight_max, s.id0);
  in.loose = rows_from(layer.slots.rows, r.loose_at, r.loose_rows);
  in.head = rebase(l.head, s.id0);
  if (prompt) in.gathered = s.gathered;
  in.fresh = slice(l.fresh, 0);
  return in;
}

/// Query head `g` of each group of `[entry, q_head, slot]` as a score map `[entry, kv_head, slot]`.
template <class Space>
tensor_ref<float const, 3, Space> heads_of_groups(tensor_ref<float, 3, Space> const& t,
                                                  index_t group, index_t g) noexcept {
  tensor_ref<float const, 3, Space> m = t;
  if (m.data != nullptr) m.data += g * t.stride[1];
  m.extent[1] /= group;
  m.stride[1] *= group;
  return m;
}

/// One slot row as a score map `[id, kv_head, slot]`.
template <class Space>
score_map<Space> row_as_map(tensor_ref<float, 4, Space> const& rows, index_t row) noexcept {
  score_map<Space> m{};
  m.data = rows.data + row * rows.stride[2];
  int const axis[] = {0, 1, 3};
  for (int a = 0; a < 3; ++a) {
    m.extent[a] = rows.extent[axis[a]];
    m.stride[a] = rows.stride[axis[a]];
  }
  return m;
}

}  // namespace kvkeep::detail
