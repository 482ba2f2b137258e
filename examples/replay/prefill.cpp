// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// prefill_select and prefill_select_ragged: what remains of a prompt, and the scores behind it.
#include <limits>
#include <numeric>

#include "prompt_policy.hpp"

namespace kvkeep::replay {

namespace {

/// Scores `[B, Hkv, T]` in the form that the case reports.
npy_array report_scores(std::vector<float> all, prompt_policy const& r, prompt_data const& p) {
  index_t const tokens = p.tokens, window = std::min(r.window, tokens);
  index_t const candidates = tokens - window;
  extents shape{p.shape.n_seq, p.shape.n_kv_heads, tokens};
  if (r.scores == reported::candidates) {
    std::vector<float> some;
    for (std::size_t at = 0; at < all.size(); at += uz(tokens))
      some.insert(some.end(), all.begin() + static_cast<std::ptrdiff_t>(at),
                  all.begin() + static_cast<std::ptrdiff_t>(at + uz(candidates)));
    shape[2] = candidates;
    return float_array(shape, std::move(some));
  }
  if (r.scores == reported::padded) {
    auto const is_candidate = [&](std::size_t i) {
      return i % uz(tokens) >= uz(r.sinks) && i % uz(tokens) < uz(candidates);
    };
    float most = candidates > r.sinks ? -std::numeric_limits<float>::infinity() : 0.0F;
    for (std::size_t i = 0; i < all.size(); ++i)
      if (is_candidate(i)) most = std::max(most, all[i]);
    for (std::size_t i = 0; i < all.size(); ++i)
      if (!is_candidate(i)) all[i] = most + 1;
  }
  return float_array(shape, std::move(all));
}

/// AdaKV: members of the layer's best (C - W) * Hkv candidates per head, `[B, Hkv]`.
npy_array raw_counts(backend& b, std::vector<float> const& scores, prompt_policy const& r,
                     prompt_data const& p) {
  cache_shape const& s = p.shape;
  joint_scores const all{1,
                         s.n_seq,
                         s.n_kv_heads,
                         s.max_slots,
                         std::max(p.tokens - r.window, 0),
                         r.options.capacity - r.window,
                         r.options.normalize,
                         scores.data()};
  return int_array({s.n_seq, s.n_kv_heads}, b.counts(all));
}

/// The last `rows` queries: q_win as recorded, or the end of q (into `memory`).
void take_window(recorded_case const& c, prompt_data& p, index_t rows, std::vector<float>& memory) {
  cache_shape const& s = p.shape;
  p.q_rows = std::min(rows, p.tokens);
  if (has_input(c, "q_win") || !has_input(c, "q")) {
    p.q = floats_of(c, "q_win", {s.n_seq, s.n_q_heads, p.q_rows, s.dim_k});
    return;
  }
  float const* q = floats_of(c, "q", {s.n_seq, s.n_q_heads, p.tokens, s.dim_k});
  offset_t const head = offset_t{p.tokens} * s.dim_k, part = offset_t{p.q_rows} * s.dim_k;
  for (index_t h = 0; h < s.n_seq * s.n_q_heads; ++h)
    memory.insert(memory.end(), q + (h + 1) * head - part, q + (h + 1) * head);
  p.q = memory.data();
}

/// The arrays that the policy's evidence asks for.
void read_evidence(recorded_case const& c, prompt_demand const& demand, prompt_data& p,
                   std::vector<float>& memory) {
  cache_shape const& s = p.shape;
  evidence const e = demand.shown;
  if (e == evidence::window_queries) take_window(c, p, demand.window, memory);
  if (e == evidence::all_queries) {
    p.q_rows = p.tokens;
    p.q = floats_of(c, "q", {s.n_seq, s.n_q_heads, p.tokens, s.dim_k});
  }
  p.k = floats_of(c, "k", {s.n_seq, s.n_kv_heads, p.tokens, s.dim_k});
  if (e == evidence::keys_values || has_input(c, "v"))
    p.v = floats_of(c, "v", {s.n_seq, s.n_kv_heads, p.tokens, s.dim_v});
}

/// Two forms: KVCache-Factory's (the first C - W tokens are sinks), and kvpress' (n_sink sinks).
replayed run_streaming(backend& b, recorded_case const& c, layout_kind layout) {
  prompt_data p;
  p.tokens = extent(c, "T");
  p.shape = read_shape(c, p.tokens);
  parameters params(c);
  replayed out;
  prompt_policy r;
  r.name = "streamingllm";
  r.options.make_room_first = false;
  auto const keep = [&](char const* output, index_t sinks) {
    r.options.sinks = sinks;
    int_rows kept = b.keep_of_prompt(r.policy(), p, layout, r.n_layers, r.layer);
    // One set for all heads, unless the case has an axis for them.
    index_t heads = p.shape.n_kv_heads;
    auto const declared = c.output_info.find(output);
    if (declared != c.output_info.end() && declared->second.shape.size() == 3 &&
        declared->second.shape[1] == 1)
      heads = 1;
    int_rows rows;
    for (std::size_t i = 0; i < uz(p.shape.n_seq); ++i)
      for (std::size_t h = 0; h < uz(heads); ++h)
        rows.push_back(kept[i * uz(p.shape.n_kv_heads) + h]);
    out.outputs[output] = padded({p.shape.n_seq, heads}, rows);
  };
  index_t window = 0;
  bool const kvf = wants(c, "kept_kvf");
  if (kvf)
    window = read_window(params, r.options);
  else
    r.options.capacity = params.integer("capacity", {1, most_tokens});
  index_t const sinks = params.integer("n_sink", {0, r.options.capacity - 1}, 4);
  if (kvf) keep("kept_kvf", r.options.capacity - window);
  keep("kept_kvpress", sinks);
  out.parameters = params.resolved();
  return out;
}

}  // namespace

replayed run_prefill(backend& b, recorded_case const& c, layout_kind layout) {
  if (c.policy() == "streamingllm") return run_streaming(b, c, layout);
  prompt_data p;
  parameters params(c);
  p.tokens = extent(c, "T");
  p.shape = read_shape(c, p.tokens);
  prompt_policy const r = read_prompt_policy(c, params, p.shape);
  std::vector<float> memory;
  read_evidence(c, b.demand_of(r.policy(), p.shape), p, memory);

  replayed out;
  out.parameters = params.resolved();
  extents const heads{p.shape.n_seq, p.shape.n_kv_heads};
  int_rows kept(uz(p.shape.n_seq) * uz(p.shape.n_kv_heads));
  if (r.skipped) {
    for (auto& row : kept) {
      row.resize(uz(p.tokens));
      std::iota(row.begin(), row.end(), 0);
    }
  } else {
    kept = b.keep_of_prompt(r.policy(), p, layout, r.n_layers, r.layer);
  }
  out.outputs["kept"] = padded(heads, kept);
  if (c.kind() == "prefill_select_ragged") out.outputs["lens"] = lengths(heads, kept);
  if (wants(c, "scores") || wants(c, "raw_counts")) {
    std::vector<float> scores = b.scores_of_prompt(r.policy(), p, layout);
    if (c.policy() == "adakv" && r.options.form != ada_form::safeguard)
      out.outputs["raw_counts"] = raw_counts(b, scores, r, p);
    out.outputs["scores"] = report_scores(std::move(scores), r, p);
  }
  return out;
}

}  // namespace kvkeep::replay
