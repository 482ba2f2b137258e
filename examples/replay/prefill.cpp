// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// prefill_select and prefill_select_ragged: what remains of a prompt, and the scores behind it.
#include <limits>
#include <numeric>

#include "prompt_policy.hpp"

namespace kvkeep::replay {

namespace {

prompt_offer offer_of(policy_type const& policy) {
  evidence const e = policy.score.traits().prompt;
  return e == evidence::all_queries      ? prompt_offer::all_queries
         : e == evidence::window_queries ? prompt_offer::window_queries
                                         : prompt_offer::nothing;
}

/// The prompt goes through a session with `n_layers` layers of the same content; positions that one
/// of them keeps, ascending, in rows of (sequence, KV head).
int_rows kept_by_session(prompt_policy const& r, prompt_data const& p, layout_kind layout) {
  cpu::context ctx;
  auto const policy = make_policy<cpu::context>(r.name, r.options);
  auto const grow = make_policy<cpu::context>("fullkv");  // prefill alone: nothing leaves later
  std::vector<tools::kv_cache> caches;
  std::vector<layer_spec<>> layers;
  for (index_t l = 0; l < r.n_layers; ++l) {
    caches.push_back(make_cache(p, layout, p.tokens));
    layers.emplace_back(caches.back().view());
  }
  limits lim;
  lim.max_sequences = p.shape.n_seq;
  lim.prompt = offer_of(policy);
  lim.decode = decode_offer::nothing;
  auto s = bind_session(ctx, policy, grow, std::span<layer_spec<> const>(layers), lim);

  int_rows kept;
  offset_t const q_size = offset_t{p.shape.n_q_heads} * p.q_rows * p.shape.dim_k;
  for (index_t b = 0; b < p.shape.n_seq; ++b) {
    index_t id = -1;
    expect(s.begin(id, {b}), "begin");
    queries q = tokens_only(p.tokens);
    if (p.q != nullptr)
      q = make_queries(p.q + b * q_size, p.shape.n_q_heads, p.q_rows, p.shape.dim_k);
    q.tokens = p.tokens;
    for (index_t l = 0; l < r.n_layers; ++l) expect(s.observe(l, id, q), "observe");
    expect(s.end_prompt(id), "end_prompt");
    for (index_t h = 0; h < p.shape.n_kv_heads; ++h) {
      index_t const* positions = s.positions(r.layer).at(id, h);
      kept.emplace_back(positions, positions + s.lengths(r.layer)(id, h));
      std::sort(kept.back().begin(), kept.back().end());
    }
  }
  expect(s.verify(), "verify");
  return kept;
}

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
    float most = candidates > 0 ? -std::numeric_limits<float>::infinity() : 0.0F;
    for (std::size_t i = 0; i < all.size(); ++i)
      if (i % uz(tokens) < uz(candidates)) most = std::max(most, all[i]);
    for (std::size_t i = 0; i < all.size(); ++i)
      if (i % uz(tokens) >= uz(candidates)) all[i] = most + 1;
  }
  return float_array(shape, std::move(all));
}

/// AdaKV: members of the layer's best (C - W) * Hkv candidates per head, `[B, Hkv]`.
npy_array raw_counts(std::vector<float> const& scores, prompt_policy const& r,
                     prompt_data const& p) {
  cache_shape const& s = p.shape;
  std::vector<index_t> counts(uz(s.n_seq) * uz(s.n_kv_heads));
  std::vector<index_t> const candidates(counts.size(), std::max(p.tokens - r.window, 0));
  op::layer_counts<> o;
  o.batch.n = s.n_seq;
  o.n_maps = 1;
  o.scores = row_major(scores.data(), 1, s.n_seq, s.n_kv_heads, s.max_slots);
  o.candidates = row_major(candidates.data(), s.n_seq, s.n_kv_heads);
  o.best_per_head = r.options.capacity - r.options.window;
  o.normalize = r.options.normalize;
  o.out = row_major(counts.data(), 1, s.n_seq, s.n_kv_heads);
  cpu::context ctx;
  run_measured("layer_counts", [&](workspace& w) { return run(ctx, o, w); });
  return int_array({s.n_seq, s.n_kv_heads}, std::move(counts));
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
void read_evidence(recorded_case const& c, policy_type const& policy, prompt_data& p,
                   std::vector<float>& memory) {
  cache_shape const& s = p.shape;
  evidence const e = policy.score.traits().prompt;
  if (e == evidence::window_queries)
    take_window(c, p, policy.score.state(s).query_ring, memory);
  if (e == evidence::all_queries) {
    p.q_rows = p.tokens;
    p.q = floats_of(c, "q", {s.n_seq, s.n_q_heads, p.tokens, s.dim_k});
  }
  p.k = floats_of(c, "k", {s.n_seq, s.n_kv_heads, p.tokens, s.dim_k});
  if (e == evidence::keys_values || has_input(c, "v"))
    p.v = floats_of(c, "v", {s.n_seq, s.n_kv_heads, p.tokens, s.dim_v});
}

/// Two forms: KVCache-Factory's (the first C - W tokens are sinks), and kvpress' (n_sink sinks).
replayed run_streaming(recorded_case const& c, layout_kind layout) {
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
    int_rows kept = kept_by_session(r, p, layout);
    // One set for all heads, unless the case has an axis for them.
    index_t heads = p.shape.n_kv_heads;
    auto const declared = c.output_info.find(output);
    if (declared != c.output_info.end() && declared->second.shape.size() == 3 &&
        declared->second.shape[1] == 1)
      heads = 1;
    int_rows rows;
    for (std::size_t b = 0; b < uz(p.shape.n_seq); ++b)
      for (std::size_t h = 0; h < uz(heads); ++h)
        rows.push_back(kept[b * uz(p.shape.n_kv_heads) + h]);
    out.outputs[output] = padded({p.shape.n_seq, heads}, rows);
  };
  index_t window = 0;
  bool const kvf = wants(c, "kept_kvf");
  if (kvf)
    read_window(params, window, r.options.capacity);
  else
    r.options.capacity = params.integer("capacity", {1, most_tokens});
  index_t const sinks = params.integer("n_sink", {0, r.options.capacity - 1}, 4);
  if (kvf) keep("kept_kvf", r.options.capacity - window);
  keep("kept_kvpress", sinks);
  out.parameters = params.resolved();
  return out;
}

}  // namespace

replayed run_prefill(recorded_case const& c, layout_kind layout) {
  if (c.policy() == "streamingllm") return run_streaming(c, layout);
  prompt_data p;
  parameters params(c);
  p.tokens = extent(c, "T");
  p.shape = read_shape(c, p.tokens);
  prompt_policy const r = read_prompt_policy(c, params, p.shape.group());
  auto const policy = make_policy<cpu::context>(r.name, r.options);
  std::vector<float> memory;
  read_evidence(c, policy, p, memory);

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
    kept = kept_by_session(r, p, layout);
  }
  out.outputs["kept"] = padded(heads, kept);
  if (c.kind() == "prefill_select_ragged") out.outputs["lens"] = lengths(heads, kept);
  if (wants(c, "scores") || wants(c, "raw_counts")) {
    std::vector<float> scores = prompt_scores(policy, p, layout);
    if (c.policy() == "adakv" && r.options.form != ada_form::safeguard)
      out.outputs["raw_counts"] = raw_counts(scores, r, p);
    out.outputs["scores"] = report_scores(std::move(scores), r, p);
  }
  return out;
}

}  // namespace kvkeep::replay
