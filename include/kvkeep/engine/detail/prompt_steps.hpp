// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// Steps of a prompt that every kind of session takes.
#pragma once

#include <algorithm>

#include "../../op/compact.hpp"
#include "../../op/reduce.hpp"
#include "../slots.hpp"
#include "../steps.hpp"

namespace kvkeep::detail {

/// Whether a transient prompt of `tokens` tokens can be in row `row` of a view, and its rows can move into a pool.
/// @param max_prompt  limits::max_prompt
template <class Space>
status check_prompt_view(kv_ref<Space> const& v, kv_ref<Space> const& pool, index_t max_prompt,
                         index_t row, index_t tokens) noexcept {
  cache_shape shape = v.shape;
  shape.n_seq = pool.shape.n_seq;
  shape.max_slots = pool.shape.max_slots;
  if (!(shape == pool.shape) || !op::same_rows(v.k, pool.k) || !op::same_rows(v.v, pool.v))
    return status::bad_argument;
  if (row < 0 || row >= v.shape.n_seq) return status::bad_argument;
  if (v.shape.max_slots < tokens) return status::capacity_exceeded;
  return v.shape.max_slots > max_prompt ? status::bad_argument : status::ok;
}

/// Layers of the model that are decided on when the prompt of managed layer `m` ends: earlier ones too where a budget
/// couples layers, all of them with the last one where a sequence keeps one set.
template <class P, class Layers>
layer_range due_layers(P const& prompt, Layers const& layers, index_t m) noexcept {
  auto const n = static_cast<index_t>(layers.size());
  layer_range r = prompt.budget.due(m, n);
  if (prompt.width() == scope::sequence) r = {m + 1 == n ? 0 : m + 1, m + 1};
  if (r.empty()) return {};
  return {layers[static_cast<std::size_t>(r.first)].spec,
          layers[static_cast<std::size_t>(r.last - 1)].spec + 1};
}

/// Adds a layer's scores to those of the layers before; with the last one's, `m.sum` is their mean. Scores that
/// cannot be compared (positions) are the same in all layers, and would not survive a sum.
/// @param layer  the managed layer's number  @param m  but for its place among the layers
template <class Space>
op::mean_layers<Space> placed_among(index_t layer, index_t n_layers, bool comparable,
                                    op::mean_layers<Space> m) noexcept {
  m.n_layers = comparable ? n_layers : 1;
  m.first = !comparable || layer == 0;
  m.last = !comparable || layer + 1 == n_layers;
  return m;
}

/// Hands prompt queries to a scorer that wants all of them, `max_chunk` rows at a time.
/// @param p0 position of the first row of `q`
template <class Ctx, class Score>
status feed_prompt(Ctx& ctx, Score const& score, score_input<space_of<Ctx>> const& in,
                   queries const& q, index_t p0, index_t max_chunk, workspace& w) noexcept {
  using space = space_of<Ctx>;
  if (score.traits().prompt != evidence::all_queries) return status::ok;
  index_t const heads = in.layer.kv.shape.n_q_heads, dim = in.layer.kv.shape.dim_k;
  for (index_t first = 0; first < q.n_rows; first += max_chunk) {
    workspace::frame const frame(w);
    index_t const n = std::min(max_chunk, q.n_rows - first);
    auto const size = product(heads, n);
    bool const lse = q.lse != nullptr || w.measuring();
    float* rows = w.take<float>(product(size, dim));
    float* row_lse = lse ? w.take<float>(size) : nullptr;
    index_t* position = w.take<index_t>(static_cast<std::size_t>(n));
    if (!w.measuring()) {
      if (!w.ok()) return status::workspace_too_small;
      copy_queries<space> const copy{q, 0, first, n, p0 + first, dim, rows, row_lse, position};
      KVKEEP_TRY(run(ctx, op::for_each<copy_queries<space>, space>{heads * n, copy}, w));
    }
    query_rows<space> block;
    block.q = row_major<space>(static_cast<float const*>(rows), 1, heads, n, dim);
    block.position = row_major<space>(static_cast<index_t const*>(position), 1, n);
    block.lse = row_major<space>(static_cast<float const*>(row_lse), 1, heads, n);
    KVKEEP_TRY(score.observe_prompt(ctx, in, block, w));
    if (!w.measuring()) continue;
    block.lse = {};  // needs more scratch
    KVKEEP_TRY(score.observe_prompt(ctx, in, block, w));
  }
  return status::ok;
}

/// Whether the layers of a prompt are decided on together.
template <class P>
bool joins_layers(P const& prompt) noexcept {
  bool const one_set = prompt.width() == scope::sequence && !keeps_all(prompt.score);
  return one_set || prompt.budget.traits().couples_layers;
}

/// Whether a scorer of the last queries has seen too few: of a prompt of so many tokens, or of what follows a prefix.
/// @param shown  query rows up to the prompt's end, without a gap
template <class P>
bool lacks_queries(P const& prompt, cache_shape const& cache, index_t shown, index_t tokens) {
  return prompt.score.traits().prompt == evidence::window_queries &&
         shown < std::min(prompt.score.state(cache).query_ring, tokens);
}
template <class P, class Space>
bool lacks_queries(P const& prompt, cache_shape const& cache, layer_state<Space> const& l,
                   index_t id, index_t frozen) {
  return lacks_queries(prompt, cache, l.appended[id] - l.ring_from[id], l.appended[id] - frozen);
}

/// What a layer's budget is made of when its prompt ends.
template <class Space>
struct prompt_budget {
  budget_input<Space> in{};
  bool short_prompt = false;  ///< all of it stays
};

/// Whether a prompt's policy leaves all of its tokens whatever the scores are.
template <class P>
bool keeps_prompt(P const& prompt, index_t tokens) {
  auto const b = prompt.budget.traits();
  bool const even = !b.varies_over_layers && !b.varies_over_heads;  // the capacity, of all heads
  return keeps_all(prompt.score) || ((even || !b.fixed) && tokens < prompt.budget.capacity());
}

/// Allocates the layer's budget, but for one that waits for the scores. Nobody reads it before the prompt's end, so it
/// may be done again.
template <class Ctx, class P>
status begin_budget(Ctx& ctx, P const& prompt, shared_state<space_of<Ctx>> const& shared,
                    layer_state<space_of<Ctx>> const& l, index_t tokens,
                    prompt_budget<space_of<Ctx>>& out, workspace& w) noexcept {
  auto const traits = prompt.budget.traits();
  budget_input<space_of<Ctx>>& in = out.in;
  in.n_layers = shared.prompt_k.extent[0];
  in.layer = l.number;
  in.n_kv_heads = l.kv.shape.n_kv_heads;
  in.tokens = tokens;
  in.sinks = prompt.keep.sinks;
  in.recent = prompt.keep.recent;
  in.k = shared.prompt_k;
  if (traits.needs_scores) in.scores = shared.prompt_scores;
  if (traits.needs_spread) in.spread = shared.prompt_spread;
  out.short_prompt = keeps_prompt(prompt, tokens);
  if (out.short_prompt && !w.measuring())
    return fill_layer(ctx, in, l.number, std::max(tokens, prompt.budget.capacity()), w);
  return traits.after_scores() ? status::ok : prompt.budget.allocate(ctx, in, w);
}

/// Whether a host session scores a layer's prompt when that ends. @param cuts  whether the budget cuts it, if it is
/// known
template <class P, class Space, class F>
bool scores_prompt(P const& prompt, prompt_budget<Space> const& b, F const& cuts) {
  auto const traits = prompt.budget.traits();
  if (keeps_all(prompt.score)) return false;
  if (traits.couples_layers || prompt.width() == scope::sequence) return true;
  return traits.after_scores() ? !b.short_prompt : cuts();
}

/// Whether a layer has part of a prompt that has not ended.
template <class Space>
bool in_prompt(layer_state<Space> const& l, index_t id) noexcept {
  return l.prompt_done[id] == 0 && l.appended[id] > 0;
}

/// The step that raises a layer's budgets to what cannot leave.
template <class Space, class D>
fix_budget<Space> raised_budget(D const& decode, layer_state<Space> const& l, index_t id,
                                index_t const* frozen) noexcept {
  index_t const beyond = decode.keep.recent + decode.when.room;
  return {
      {}, l.number, l.k, id, least_budget(decode), frozen, beyond, decode.select.traits().block};
}

/// The tokens per head that decoding keeps. A prompt shorter than the capacity leaves the capacity.
/// @param one  one policy serves the prompt and decoding
/// @param prompt_k  budgets of the prompt that has ended, `[layer, kv_head]`
/// @param frozen    [id] tokens that never leave
template <class Ctx, class P, class D>
status fix_decode_budget(Ctx& ctx, P const& prompt, D const& decode, bool one, index_t n_layers,
                         layer_state<space_of<Ctx>> const& l, index_t id, index_t tokens,
                         tensor_ref<index_t, 2, space_of<Ctx>> prompt_k, index_t const* frozen,
                         workspace& w) noexcept {
  using space = space_of<Ctx>;
  workspace::frame const frame(w);
  auto const traits = decode.budget.traits();
  bool const given = !traits.fixed && (one || traits.inherits);  // by the prompt's policy
  index_t const heads = l.kv.shape.n_kv_heads;
  budget_input<space> b{n_layers,          l.number,           heads, tokens,
                        decode.keep.sinks, decode.keep.recent, {},    {}};
  b.k.data = l.k.at(id);
  b.k.extent[0] = n_layers;
  b.k.extent[1] = heads;
  b.k.stride[1] = 1;  // stride[0] = 0: every layer number is this layer
  if (w.measuring()) return given ? status::ok : decode.budget.allocate(ctx, b, w);
  index_t const capacity = traits.inherits ? prompt.budget.capacity() : decode.budget.capacity();
  auto fix = raised_budget<space>(decode, l, id, frozen);
  if (!traits.fixed && tokens < capacity)
    KVKEEP_TRY(fill_layer(ctx, b, l.number, capacity, w));
  else if (given)
    fix.from = prompt_k;
  else
    KVKEEP_TRY(decode.budget.allocate(ctx, b, w));
  return run(ctx, op::for_each<fix_budget<space>, space>{heads, fix}, w);
}

}  // namespace kvkeep::detail
