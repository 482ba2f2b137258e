// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// Whether two policies, the layers of a model and an engine's limits go together, in any kind of session.
#pragma once

#include <string>

#include "../../view/check.hpp"
#include "../slots.hpp"
#include "offers.hpp"
#include "tables.hpp"

namespace kvkeep::detail {

/// The views of a model's managed layers, each by itself and together.
template <class Layers>
KVKEEP_COLD void check_layers(Layers const& layers) {
  cache_shape const& first = layers[0].kv.shape;
  for (auto const& l : layers) {
    std::string const name = "layers[" + std::to_string(l.spec) + "]";
    check_view(l.kv, name);
    auto const same = [&](char const* field, index_t v, index_t want) {
      KVKEEP_EXPECTS(v == want, (name + ".shape." + field).c_str(), v,
                     std::to_string(want) + ", as in the first layer");
    };
    same("n_seq", l.kv.shape.n_seq, first.n_seq);
    same("n_q_heads", l.kv.shape.n_q_heads, first.n_q_heads);
    same("n_kv_heads", l.kv.shape.n_kv_heads, first.n_kv_heads);
    same("dim_k", l.kv.shape.dim_k, first.dim_k);
    same("dim_v", l.kv.shape.dim_v, first.dim_v);
  }
}

/// The engine's evidence serves the scorers, and what has to be read can be.
template <class P, class D, class Layers>
KVKEEP_COLD void check_evidence(P const& prompt, D const& decode, bool one, Layers const& layers,
                                limits const& lim) {
  check_offer(prompt.score, layers[0].kv.shape, lim, one);
  if (!one) check_offer(decode.score, layers[0].kv.shape, lim, true);
  auto const reads = [](evidence e) { return e != evidence::none && e != evidence::engine_scores; };
  bool const reads_k = reads(prompt.score.traits().prompt) || reads(decode.score.traits().decode) ||
                       lim.decode == decode_offer::attend;
  for (auto const& l : layers)
    for (auto const* p : {&l.kv.k, &l.kv.v})
      KVKEEP_EXPECTS(p->type != dtype::opaque || p->reader.read != nullptr || !reads_k,
                     "view.reader", "null", "a row_reader, to score or attend over opaque rows");
}

/// Whole blocks leave tables, so everything that shares a table shares a kept set.
template <class Space>
KVKEEP_COLD void check_blocks_view(kv_ref<Space> const& kv, index_t block, scope width,
                                   bool moves) {
  KVKEEP_EXPECTS(kv.k.layout.kind == layout_kind::paged && kv.v.layout.kind == layout_kind::paged,
                 "view.k.layout", to_string(kv.k.layout.kind), "paged, for a selector of blocks");
  KVKEEP_EXPECTS(kv.k.layout.paged.block_size == block && kv.v.layout.paged.block_size == block,
                 "select.block", block,
                 "the views' block_size = " + std::to_string(kv.k.layout.paged.block_size));
  KVKEEP_EXPECTS(moves || kv.k.layout.paged.table_head_stride != 0 || width != scope::head, "per",
                 to_string(width),
                 "layer or sequence, where KV heads share a block table and whole blocks leave");
}

/// And layers that share a table share the set of a sequence.
template <class Layers>
KVKEEP_COLD void check_own_tables(Layers const& layers, scope width) {
  if (width == scope::sequence) return;
  for (auto const& a : layers)
    for (auto const& b : layers) {
      auto const &x = a.kv.k.layout, &y = b.kv.k.layout;
      bool const paged = x.kind == layout_kind::paged && y.kind == layout_kind::paged;
      KVKEEP_EXPECTS(a.spec == b.spec || !paged || x.paged.table != y.paged.table, "per",
                     to_string(width),
                     "sequence, where layers share a block table and whole blocks leave");
    }
}

/// @param one  one policy serves the prompt and decoding
template <class P, class D>
KVKEEP_COLD void check_budgets(P const& prompt, D const& decode, bool one) {
  auto const pb = prompt.budget.traits(), db = decode.budget.traits();
  KVKEEP_EXPECTS(!pb.inherits, "budget", pb.name,
                 "a budget of its own (inherit is for a decode policy beside another)");
  KVKEEP_EXPECTS(one || !db.needs_scores, "decode.budget", db.name,
                 "uniform, per_layer, per_head, pyramid or inherit beside another prompt policy");
  if (!db.inherits || !cuts_while_decoding(decode.score)) return;
  index_t const guarded = decode.keep.sinks + decode.keep.recent;
  index_t const left = prompt.budget.capacity(), block = decode.select.traits().block;
  KVKEEP_EXPECTS(
      left > guarded, "prompt.capacity", left,
      "> sinks + window = " + std::to_string(guarded) + " of the decode policy, which inherits it");
  KVKEEP_EXPECTS(
      block == 1 || left >= block, "prompt.capacity", left,
      ">= block = " + std::to_string(block) + " of the decode policy, which inherits it");
}

/// @param one     one policy serves the prompt and decoding
/// @param layers  the managed ones
template <class P, class D, class Layers>
KVKEEP_COLD void check_pair(P const& prompt, D const& decode, bool one, Layers const& layers,
                            limits const& lim) {
  check_budgets(prompt, decode, one);
  bool const cuts_prompt = !keeps_all(prompt.score);
  bool const cuts_decode = cuts_while_decoding(decode.score);
  if (cuts_prompt && cuts_decode && !one) {
    bool const fits = decode.width() == scope::head || prompt.width() >= decode.width();
    std::string const per = to_string(prompt.width());
    if (decode.score.traits().whole_layer)  // it cannot do otherwise
      KVKEEP_EXPECTS(fits, "prompt.per", per,
                     std::string("layer or sequence, before ") + decode.name);
    KVKEEP_EXPECTS(fits, "decode.per", to_string(decode.width()),
                   "head, after a prompt policy that keeps one set per " + per);
  }
  if (cuts_prompt)
    KVKEEP_EXPECTS(lim.max_prompt == 0 || prompt.width() != scope::sequence, "limits.max_prompt",
                   lim.max_prompt,
                   "0, for one set per sequence (all layers are decided together, in place)");
  if (decides_late(decode.when)) {
    KVKEEP_EXPECTS(decode.score.traits().direct, "when.before_attention",
                   decode.score.traits().name, "a scorer of recent query rows (MorphKV)");
    KVKEEP_EXPECTS(lim.max_draft == 0 && lim.max_prompt == 0 && !lim.engine_commits,
                   "when.before_attention", "true",
                   "false with drafts, transient prompts or engine_commits");
    KVKEEP_EXPECTS(lim.decode == decode_offer::attend && decode.width() == scope::head,
                   "limits.decode", to_string(lim.decode), "attend, and one set per head");
  }
  auto const st = decode.score.traits();
  if (st.finds_victims) {
    KVKEEP_EXPECTS(decode.keep.sinks == 0, "keep.sinks", decode.keep.sinks,
                   "0, where the scorer finds victims itself (MorphKV's lazy evaluation)");
    KVKEEP_EXPECTS(decode.keep.recent == st.victims_recent, "keep.recent", decode.keep.recent,
                   "the window = " + std::to_string(st.victims_recent) +
                       ", where the scorer finds victims itself (MorphKV's lazy evaluation)");
  }
  auto const ps = prompt.select.traits(), ds = decode.select.traits();
  KVKEEP_EXPECTS(!cuts_decode || ds.evicts_one || lim.engine_commits, "decode.select", ds.name,
                 "top_k, unless limits.engine_commits (blocks leave through choose and commit)");
  bool const whole_prompt = cuts_prompt && !ps.moves_tokens;
  KVKEEP_EXPECTS(!whole_prompt || !prompt.budget.traits().couples_layers, "prompt.budget",
                 prompt.budget.traits().name,
                 "one that cuts each layer once, where whole blocks leave");
  if (whole_prompt) check_own_tables(layers, prompt.width());
  if (cuts_decode && !ds.moves_tokens) check_own_tables(layers, decode.width());
  for (auto const& l : layers) {
    if (cuts_prompt && (ps.block > 1 || !ps.moves_tokens))
      check_blocks_view(l.kv, ps.block, prompt.width(), ps.moves_tokens);
    if (cuts_decode && (ds.block > 1 || !ds.moves_tokens))
      check_blocks_view(l.kv, ds.block, decode.width(), ds.moves_tokens);
    if (ps.moves_tokens && ds.moves_tokens) continue;
    KVKEEP_EXPECTS(lim.max_prompt == 0, "limits.max_prompt", lim.max_prompt,
                   "0 with whole blocks, which never move");
    offset_t const steps = offset_t{table_entries(l.kv)} + 1;
    KVKEEP_EXPECTS(steps * lim.max_batch * l.kv.shape.n_kv_heads < offset_t{1} << 31,
                   "limits.max_batch", lim.max_batch,
                   "less, by which the blocks of all KV heads are multiplied");
  }
}

}  // namespace kvkeep::detail
