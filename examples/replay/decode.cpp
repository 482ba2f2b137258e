// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// decode_trace: the kept set of every step, for H2O, TOVA, StreamingLLM, MorphKV, KNorm and KeyDiff.
#include <optional>

#include "arrays.hpp"
#include "guide.hpp"
#include "prompt_policy.hpp"
#include "support/watched_score.hpp"

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

/// Slots that bursts may fill, and one for the next token.
index_t slots_of_bursts(policy_options const& o) {
  return static_cast<index_t>(std::ceil((1.0 + o.capacity) * o.evict_after)) + 2;
}

/// Extents of kept sets, `[entries, B, Hkv]`.
extents entries(trace_data const& t, index_t n) {
  return {n, t.tokens.shape.n_seq, t.tokens.shape.n_kv_heads};
}

/// Holds a run to the recorded sets, where they are followed.
class follower {
 public:
  follower(recorded_case const& c, trace_data const& t, bool follow)
      : c_(c), t_(t), follow_(follow) {}

  trace_hooks hooks(guide::scores in_double, bool whole_layer = false) {
    trace_hooks h;
    if (!follow_) return h;
    guide_.emplace(c_, t_, std::move(in_double), whole_layer);
    h.scored = guide_->hold();
    return h;
  }
  index_t near_ties() const { return guide_ ? guide_->near_ties() : 0; }

 private:
  recorded_case const& c_;
  trace_data const& t_;
  bool follow_;
  std::optional<guide> guide_;
};

/// H2O's sums in kept order, noted after every step and, where a recorded trace is followed, set to the
/// recorded ones: the sums before a step are part of what it is judged from.
class sum_log {
 public:
  sum_log(recorded_case const& c, index_t group, bool mean, bool follow)
      : recorded_(follow ? &c.output("acc") : nullptr),
        scale_(mean ? 1.0F / static_cast<float>(group) : 1.0F) {}

  void join(trace_hooks& h) {
    h.settled = [this](score_input<> const& in) { rows_ = in.rows; };
    h.noted = [this](index_t b, index_t head, auto const& slots) { note(b, head, slots); };
  }
  npy_array padded_to(extents const& shape) {
    std::vector<float> values;
    for (auto& row : sums_) {
      row.resize(uz(shape.back()));
      values.insert(values.end(), row.begin(), row.end());
    }
    return float_array(shape, std::move(values));
  }

 private:
  void note(index_t b, index_t h, std::vector<index_t> const& slots) {
    auto& sums = sums_.emplace_back();
    for (index_t const slot : slots)
      sums.push_back(tools::heavy_hitter_sum(rows_, b, h, slot, scale_));
    if (recorded_ == nullptr || rows_.extent[2] > 1) return;
    auto const width = uz(recorded_->shape.back());
    float const* const acc = recorded_->f32.data() + (sums_.size() - 1) * width;
    for (std::size_t i = 0; i < std::min(slots.size(), width); ++i)
      rows_(b, h, 0, slots[i]) = acc[i] / scale_;
  }

  npy_array const* recorded_;
  float scale_;
  tensor_ref<float, 4> rows_{};  ///< the session's
  std::vector<std::vector<float>> sums_;
};

/// Sums of all prompt tokens, `[B, kv_head, T0]`, before the cut.
npy_array prompt_sums(backend& b, chosen const& p, trace_data const& t) {
  prompt_data prompt = t.tokens;
  std::vector<float> q, k;
  cache_shape const& s = prompt.shape;
  auto const first = [&](float const* from, index_t heads, std::vector<float>& to) {
    for (index_t h = 0; h < s.n_seq * heads; ++h, from += offset_t{prompt.tokens} * s.dim_k)
      to.insert(to.end(), from, from + offset_t{t.prompt} * s.dim_k);
    return to.data();
  };
  prompt.q = first(t.tokens.q, s.n_q_heads, q);
  prompt.k = first(t.tokens.k, s.n_kv_heads, k);
  prompt.v = nullptr;
  prompt.tokens = prompt.q_rows = prompt.shape.max_slots = t.prompt;
  return float_array({s.n_seq, s.n_kv_heads, t.prompt},
                     b.scores_of_prompt(p, prompt, layout_kind::strided));
}

replayed run_h2o(backend& b, recorded_case const& c, layout_kind layout, bool follow) {
  trace_data const t = read_trace(c, true, false);
  parameters params(c);
  index_t const heavy = params.integer("hh_size", {1, most_slots});
  index_t const recent = params.integer("recent_size", {0, most_slots});
  index_t const group = t.tokens.shape.group();
  chosen policy{"h2o", {}};
  policy.options.capacity = heavy + recent;
  policy.options.window = recent;
  policy.options.group = read_group(params, group);

  trace_options o;
  o.after_prompt = true;
  o.slots = heavy + recent + 2;
  o.layout = layout;
  follower f(c, t, follow);
  sum_log sums(c, group, policy.options.group == reduction::mean, follow);
  trace_hooks hooks;
  if (follow) hooks = f.hooks(h2o_in_double(c, t));
  sums.join(hooks);
  trace_log const log = b.trace(policy, t, o, hooks);

  replayed out;
  out.parameters = params.resolved();
  out.near_ties = f.near_ties();
  npy_array const kept = padded(entries(t, t.steps + 1), log.kept);
  out.outputs["acc"] = sums.padded_to(kept.shape);
  out.outputs["kept"] = kept;
  if (wants(c, "acc_prompt")) out.outputs["acc_prompt"] = prompt_sums(b, policy, t);
  return out;
}

/// TOVA, KNorm, KeyDiff: kept sets alone, entry 0 after the prompt.
replayed run_sets(backend& b, recorded_case const& c, layout_kind layout, bool follow) {
  std::string const name = c.policy();
  trace_data const t = read_trace(c, true, false);
  parameters params(c);
  policy_options options;
  options.capacity = params.integer("capacity", {1, most_slots});
  if (name == "tova") {
    bool const protect = params.flag("protect_last", false);
    options.window = protect ? 1 : 0;
    if (protect && options.capacity < 2)
      params.fail("capacity", "1, allowed: >= 2 with protect_last");
  } else {
    options.sinks = params.integer("n_sink", {0, most_slots}, 0);
    options.window = params.integer("window", {0, most_slots}, 0);
    options.evict_after = params.number("evict_after", 1, 1024, 1.0);
  }
  trace_options o;
  o.after_prompt = true;
  o.slots = slots_of_bursts(options);
  o.layout = layout;
  follower f(c, t, follow);
  trace_hooks const hooks = f.hooks(name == "tova"    ? tova_in_double(t)
                                    : name == "knorm" ? knorm_in_double(t)
                                                      : keydiff_in_double(t),
                                    name == "tova");
  auto const log = b.trace({name, options}, t, o, hooks);
  replayed out;
  out.parameters = params.resolved();
  out.near_ties = f.near_ties();
  out.outputs["kept"] = padded(entries(t, t.steps + 1), log.kept);
  return out;
}

/// Positions alone: the sets of the first sequence's first head stand for all.
replayed run_streaming(backend& b, recorded_case const& c, layout_kind layout) {
  trace_data const t = read_trace(c, false, false);
  parameters params(c);
  policy_options options;
  index_t const sinks = params.integer("start_size", {0, most_slots}, 4);
  index_t const recent = params.integer("recent_size", {1, most_slots});
  options.sinks = sinks;
  options.capacity = sinks + recent;
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
    auto const log = b.trace({"streamingllm", options}, longer, o);
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
  index_t const window = read_window(p, o);
  if (o.capacity > most_slots)
    p.fail("capacity", std::to_string(o.capacity) + ", allowed: <= " + std::to_string(most_slots));
  o.fusion = p.word("fusion", fusions, "sum_fused");
  o.evict_after = p.number("evict_after", 1, 1024, 1.0);
  o.n_rows = p.integer("n_query_rows", {1, window}, std::max(window - 1, 1));
  if (window < 2 && !p.has("n_query_rows"))
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

replayed run_morphkv(backend& b, recorded_case const& c, layout_kind layout, bool follow) {
  trace_data const t = read_trace(c, true, true);
  cache_shape const& s = t.tokens.shape;
  parameters params(c);
  policy_options options = read_morphkv(c, params);
  // From keys and queries every slot is scored; bounds score few.
  if (follow) options.evaluation = morph_rows::direct;
  follower f(c, t, follow);
  trace_options o;
  o.slots = slots_of_bursts(options);
  o.layout = layout;
  bool const official = c.is_official();
  params.note("per_head_mask", official);
  replayed out;
  out.parameters = params.resolved();
  auto const run = [&](char const* output, bool per_head_mask) {
    options.per_head_mask = per_head_mask;
    // A set decided within the step is complete after it; else it is decided before the append.
    bool const within = options.per_head_mask || options.include_current;
    o.when = within ? moment::settled : moment::appended;
    trace_log log = b.trace({"morphkv", options}, t, o, f.hooks(morphkv_in_double(t, options)));
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
  out.near_ties = f.near_ties();
  return out;
}

}  // namespace

replayed run_decode(backend& b, recorded_case const& c, layout_kind layout, bool follow) {
  std::string const policy = c.policy();
  if (policy == "h2o") return run_h2o(b, c, layout, follow);
  if (policy == "tova" || policy == "knorm" || policy == "keydiff")
    return run_sets(b, c, layout, follow);
  if (policy == "streamingllm") return run_streaming(b, c, layout);
  if (policy == "morphkv") return run_morphkv(b, c, layout, follow);
  throw unsupported(policy);
}

}  // namespace kvkeep::replay
