// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// decode_trace: the kept set of every step, for H2O, TOVA, StreamingLLM and MorphKV.
#include "prompt_policy.hpp"
#include "trace.hpp"

namespace kvkeep::replay {

namespace {

/// Capacities of decode traces: the cache has a slot for each.
inline constexpr index_t most_slots = 1 << 20;

trace_data read_trace(recorded_case const& c, bool arrays, bool values) {
  trace_data t;
  t.prompt = extent(c, "T0");
  t.steps = extent(c, "steps");
  prompt_data& p = t.tokens;
  p.tokens = t.prompt + t.steps;
  p.shape = read_shape(c, p.tokens);
  if (!arrays) return t;
  cache_shape const& s = p.shape;
  p.q_rows = p.tokens;
  p.q = floats_of(c, "q", {s.n_seq, s.n_q_heads, p.tokens, s.dim_k});
  p.k = floats_of(c, "k", {s.n_seq, s.n_kv_heads, p.tokens, s.dim_k});
  if (values || has_input(c, "v"))
    p.v = floats_of(c, "v", {s.n_seq, s.n_kv_heads, p.tokens, s.dim_v});
  return t;
}

/// Extents of kept sets, `[entries, B, Hkv]`.
extents entries(trace_data const& t, index_t n) {
  return {n, t.tokens.shape.n_seq, t.tokens.shape.n_kv_heads};
}

/// H2O's scorer, which also shows where its sums lie: rows `[id, kv_head, row, slot]` of the
/// session's state, which stay in place for the session's life.
struct shown_sums : heavy_hitter_score {
  tensor_ref<float, 4>* sums = nullptr;

  template <class Ctx>
  status settle(Ctx& ctx, score_input<> const& in, workspace& ws) const {
    if (!ws.measuring()) *sums = in.rows;
    return heavy_hitter_score::settle(ctx, in, ws);
  }
};

replayed run_h2o(recorded_case const& c, layout_kind layout) {
  trace_data const t = read_trace(c, true, false);
  parameters params(c);
  index_t const heavy = params.integer("hh_size", {1, most_slots});
  index_t const recent = params.integer("recent_size", {0, most_slots});
  h2o const plain = make_h2o({heavy + recent, recent, read_group(params, t.tokens.shape.group())});
  tensor_ref<float, 4> sums;
  policy<shown_sums> shown{plain.name, {}, plain.budget, {}, plain.keep};
  static_cast<heavy_hitter_score&>(shown.score) = plain.score;
  shown.score.sums = &sums;

  trace_options o;
  o.after_prompt = true;
  o.slots = heavy + recent + 2;
  o.layout = layout;
  std::vector<std::vector<float>> acc;
  auto const see = [&](index_t b, index_t h, std::vector<index_t> const& slots) {
    acc.emplace_back();
    float const scale = plain.score.group == reduction::mean
                            ? 1.0F / static_cast<float>(t.tokens.shape.group())
                            : 1.0F;
    for (index_t const slot : slots) {
      float sum = sums(b, h, 0, slot);
      for (index_t row = 1; row < sums.extent[2]; ++row) sum = std::max(sum, sums(b, h, row, slot));
      acc.back().push_back(sum * scale);
    }
  };
  trace_log const log = run_trace(erase_policy<cpu::context>(shown), t, o, see);

  replayed out;
  out.parameters = params.resolved();
  npy_array const kept = padded(entries(t, t.steps + 1), log.kept);
  std::vector<float> values;
  for (auto& row : acc) {
    row.resize(uz(kept.shape.back()));
    values.insert(values.end(), row.begin(), row.end());
  }
  out.outputs["acc"] = float_array(kept.shape, std::move(values));
  out.outputs["kept"] = kept;
  return out;
}

replayed run_tova(recorded_case const& c, layout_kind layout) {
  trace_data const t = read_trace(c, true, false);
  parameters params(c);
  policy_options options;
  options.capacity = params.integer("capacity", {1, most_slots});
  options.window = params.flag("protect_last", false) ? 1 : 0;
  if (options.window >= options.capacity)
    params.fail("capacity", "1, allowed: >= 2 with protect_last");
  trace_options o;
  o.after_prompt = true;
  o.slots = options.capacity + 2;
  o.layout = layout;
  auto const log = run_trace(make_policy<cpu::context>("tova", options), t, o);
  replayed out;
  out.parameters = params.resolved();
  out.outputs["kept"] = padded(entries(t, t.steps + 1), log.kept);
  return out;
}

/// Positions alone: the sets of the first sequence's first head stand for all.
replayed run_streaming(recorded_case const& c, layout_kind layout) {
  trace_data const t = read_trace(c, false, false);
  parameters params(c);
  policy_options options;
  options.sinks = params.integer("start_size", {0, most_slots}, 4);
  index_t const recent = params.integer("recent_size", {1, most_slots});
  options.capacity = options.sinks + recent;
  index_t const stride = t.tokens.shape.n_seq * t.tokens.shape.n_kv_heads;
  replayed out;
  out.parameters = params.resolved();
  auto const run = [&](char const* output, bool make_room_first) {
    if (!wants(c, output)) return;
    options.make_room_first = make_room_first;
    trace_options o;
    // Room is made before the first entry: its set is the one right after the first append.
    o.when = make_room_first ? moment::appended : moment::settled;
    o.after_prompt = !make_room_first;
    o.slots = options.capacity + 2;
    o.layout = layout;
    trace_data longer = t;
    if (make_room_first) ++longer.steps;
    longer.tokens.tokens = t.prompt + longer.steps;
    auto const log = run_trace(make_policy<cpu::context>("streamingllm", options), longer, o);
    int_rows rows;
    for (std::size_t i = 0; i < log.kept.size(); i += uz(stride)) rows.push_back(log.kept[i]);
    out.outputs[output] = padded({t.steps + 1}, rows);
  };
  run("kept_post", false);
  run("kept_space", true);
  return out;
}

policy_options read_morphkv(recorded_case const& c, parameters& p) {
  static constexpr std::array<named<reduction>, 2> fusions{
      {{"sum_fused", reduction::sum}, {"max_fused", reduction::max}}};
  policy_options o;
  read_window(p, o.window, o.capacity);
  if (o.capacity > most_slots)
    p.fail("capacity", std::to_string(o.capacity) + ", allowed: <= " + std::to_string(most_slots));
  o.fusion = p.word("fusion", fusions, "sum_fused");
  o.evict_after = p.number("evict_after", 1, 1024, 1.0);
  o.n_rows = p.integer("n_query_rows", {1, o.window}, std::max(o.window - 1, 1));
  if (o.window < 2 && !p.has("n_query_rows"))
    p.fail("window", "1, allowed: >= 2, where n_query_rows is window - 1");
  o.include_current = p.flag("include_current", false);
  if (o.include_current && c.is_official())
    p.fail("include_current", "true, allowed: false with origin official");
  return o;
}

/// 1 where tokens left before (or within) a step: the set grew by less than the new token.
std::vector<index_t> evictions(std::vector<index_t> const& sizes, index_t prompt) {
  std::vector<index_t> evicted;
  index_t before = prompt;
  for (index_t const n : sizes) {
    evicted.push_back(n < before + 1 ? 1 : 0);
    before = n;
  }
  return evicted;
}

replayed run_morphkv(recorded_case const& c, layout_kind layout) {
  trace_data const t = read_trace(c, true, true);
  cache_shape const& s = t.tokens.shape;
  parameters params(c);
  policy_options options = read_morphkv(c, params);
  trace_options o;
  o.slots = static_cast<index_t>(std::ceil((1.0 + options.capacity) * options.evict_after)) + 2;
  o.layout = layout;
  bool const official = c.is_official();
  params.note("per_head_mask", official);
  replayed out;
  out.parameters = params.resolved();
  auto const run = [&](char const* output, bool per_head_mask) {
    options.per_head_mask = per_head_mask;
    // A set decided within the step is complete after it; else it is decided before the append.
    bool const within = per_head_mask || options.include_current;
    o.when = within ? moment::settled : moment::appended;
    trace_log log = run_trace(make_policy<cpu::context>("morphkv", options), t, o);
    std::vector<index_t> sizes;
    for (std::size_t i = 0; i < log.kept.size(); i += uz(s.n_seq) * uz(s.n_kv_heads))
      sizes.push_back(static_cast<index_t>(log.kept[i].size()));
    out.outputs["kept"] = padded(entries(t, t.steps), log.kept);
    out.outputs["evicted"] = int_array({t.steps}, evictions(sizes, t.prompt));
    out.outputs["lens"] = int_array({t.steps}, sizes);
    out.outputs[output] =
        float_array({t.steps, s.n_seq, s.n_q_heads, s.dim_v}, std::move(log.attention));
  };
  // The origin's form is run last: its sets are the ones that are reported.
  char const* const names[] = {"attn_out_kept", "attn_out_official"};
  if (wants(c, names[official ? 0 : 1])) run(names[official ? 0 : 1], !official);
  run(names[official ? 1 : 0], official);
  return out;
}

}  // namespace

replayed run_decode(recorded_case const& c, layout_kind layout) {
  std::string const policy = c.policy();
  if (policy == "h2o") return run_h2o(c, layout);
  if (policy == "tova") return run_tova(c, layout);
  if (policy == "streamingllm") return run_streaming(c, layout);
  if (policy == "morphkv") return run_morphkv(c, layout);
  throw unsupported(policy);
}

}  // namespace kvkeep::replay
