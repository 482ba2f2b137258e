// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// layer_budget and layer_budget_from_scores: DynamicKV over the layers of a model.
#include "prompt_policy.hpp"

namespace kvkeep::replay {

namespace {

struct layers_case {
  cache_shape shape{};  ///< of one layer; max_slots = T
  index_t n_layers = 0;
  index_t candidates = 0;  ///< T' = T - W
  index_t window = 0;
  index_t every = 4;  ///< layers between checkpoints
  policy_options options{};
  std::vector<float> scores;  ///< [layer, kv_head, T']

  float const* head(index_t layer, index_t h) const {
    return scores.data() + (offset_t{layer} * shape.n_kv_heads + h) * candidates;
  }
  index_t base() const { return options.capacity - window; }
  /// Scores of the first `n` layers.
  joint_scores joint(index_t n) const {
    return {n, 1, shape.n_kv_heads, candidates, candidates, base(), false, scores.data()};
  }
  index_t cap() const {
    double const most = options.r_max * base();
    return most < candidates ? static_cast<index_t>(most) : candidates;
  }
};

layers_case read_layers(recorded_case const& c, parameters& p) {
  layers_case r;
  r.n_layers = extent(c, "L");
  if (extent(c, "B", 1) != 1) c.fail("shape.B", "allowed: 1, a case has one sequence");
  r.shape = read_shape(c, extent(c, "T"));
  r.window = read_window(p, r.options);
  if (r.window >= r.shape.max_slots)
    p.fail("window", std::to_string(r.window) +
                         ", allowed: below shape.T = " + std::to_string(r.shape.max_slots));
  r.candidates = r.shape.max_slots - r.window;
  r.options.r_max = p.number("r_max", 1, 1e6, 10.0);
  r.every = p.integer("every", {1, most_layers}, 4);
  if (!c.is_official()) r.options.r_min = p.number("r_min", 0, 1, 0.1);
  return r;
}

/// Scores of every layer from its window queries and keys, by the policy's scorer.
void score_layers(backend& b, recorded_case const& c, layers_case& r, layout_kind layout) {
  cache_shape const& s = r.shape;
  index_t const tokens = s.max_slots, window = r.window;
  float const* q = floats_of(c, "q_win", {r.n_layers, s.n_q_heads, window, s.dim_k});
  float const* k = floats_of(c, "k", {r.n_layers, s.n_kv_heads, tokens, s.dim_k});
  for (index_t l = 0; l < r.n_layers; ++l) {
    prompt_data p;
    p.shape = s;
    p.tokens = tokens;
    p.k = k + offset_t{l} * s.n_kv_heads * tokens * s.dim_k;
    p.q = q + offset_t{l} * s.n_q_heads * window * s.dim_k;
    p.q_rows = window;
    std::vector<float> const all = b.scores_of_prompt({"dynamickv", r.options}, p, layout);
    for (auto at = all.begin(); at != all.end(); at += tokens)
      r.scores.insert(r.scores.end(), at, at + r.candidates);
  }
}

/// Recorded scores, `[L, H, T']` or `[L, 1, H, T']`.
void take_scores(recorded_case const& c, layers_case& r) {
  extents shape{r.n_layers, r.shape.n_kv_heads, r.candidates};
  if (c.input("scores").shape.size() == 4) shape.insert(shape.begin() + 1, 1);
  r.scores = checked_input(c, "scores", shape).f32;
}

/// How many of the best base * H * n scores of layers [0, n) lie in each layer.
std::vector<offset_t> global_counts(backend& b, layers_case const& r, index_t n) {
  index_t const heads = r.shape.n_kv_heads;
  std::vector<index_t> const counts = b.counts(r.joint(n));
  std::vector<offset_t> sums(uz(n));
  for (std::size_t i = 0; i < counts.size(); ++i) sums[i / uz(heads)] += counts[i];
  return sums;
}

/// The canonical budgets (window excluded) of the layers seen so far, at every checkpoint.
int_rows canonical_budgets(backend& b, layers_case const& r) {
  index_t const heads = r.shape.n_kv_heads, window = r.window;
  dynamic_layers const budget{r.options.capacity, r.options.r_max, r.options.r_min, r.every};
  int_rows const kept = b.budgets(budget, window, r.joint(r.n_layers));
  int_rows history;
  for (index_t l = 0; l < r.n_layers; ++l) {
    // A checkpoint decides about all layers so far, not about this one alone.
    if (l + 1 < r.n_layers && (l + 1) % r.every != 0) continue;
    history.emplace_back();
    for (index_t i = 0; i <= l; ++i)
      history.back().push_back(kept[uz(l)][uz(i) * uz(heads)] - window);
  }
  return history;
}

/// The published storage of one head: best tokens first, then the window.
std::vector<index_t> published_list(backend& b, layers_case const& r, float const* score) {
  index_t const n = r.candidates, k = r.cap();
  std::vector<index_t> slots = b.select(score, &k, 1, n)[0];
  std::stable_sort(slots.begin(), slots.end(),
                   [&](index_t x, index_t y) { return score[x] > score[y]; });
  for (index_t i = 0; i < r.window; ++i) slots.push_back(n + i);
  return slots;
}

/// The published cut: the first `budget` stored entries (from the end where negative, as in a
/// Python slice), then the window once more, although the stored list ends in it already.
void published_cut(std::vector<index_t>& list, offset_t budget, index_t candidates,
                   index_t window) {
  auto const size = static_cast<offset_t>(list.size());
  offset_t n = std::min<offset_t>(budget, candidates);
  if (n < 0) n = std::max<offset_t>(size + n, 0);
  std::vector<index_t> const tail(list.end() - std::min<offset_t>(window, size), list.end());
  list.resize(uz(std::min(n, size)));
  list.insert(list.end(), tail.begin(), tail.end());
}

void run_published(backend& b, layers_case const& r, replayed& out) {
  index_t const heads = r.shape.n_kv_heads;
  int_rows lists, raw, after;
  std::vector<index_t> checkpoints;
  for (index_t l = 0; l < r.n_layers; ++l) {
    for (index_t h = 0; h < heads; ++h) lists.push_back(published_list(b, r, r.head(l, h)));
    if ((l + 1) % r.every != 0) continue;
    std::vector<offset_t> budget = global_counts(b, r, l + 1);
    published_dynamic_budgets(budget.data(), l + 1, r.n_layers, heads, r.base(), r.cap(),
                              offset_t{heads} * r.candidates);
    checkpoints.push_back(l + 1);
    raw.emplace_back(budget.begin(), budget.end());
    after.emplace_back();
    for (std::size_t i = 0; i < lists.size(); ++i) {
      published_cut(lists[i], budget[i / uz(heads)], r.candidates, r.window);
      if (i % uz(heads) == 0) after.back().push_back(static_cast<index_t>(lists[i].size()));
    }
  }
  // Budgets of layers not seen yet are padding: every row has an entry per layer.
  auto const table = [&](int_rows rows) {
    for (auto& row : rows) row.resize(uz(r.n_layers), -1);
    return padded({static_cast<std::int64_t>(rows.size())}, rows);
  };
  out.outputs["checkpoints"] =
      int_array({static_cast<std::int64_t>(checkpoints.size())}, checkpoints);
  out.outputs["budget_raw"] = table(raw);
  out.outputs["len_after"] = table(after);
  out.outputs["kept_official"] = padded({r.n_layers, heads}, lists);
}

}  // namespace

replayed run_layers(backend& b, recorded_case const& c, layout_kind layout) {
  if (c.policy() != "dynamickv") throw unsupported(c.policy());
  parameters params(c);
  layers_case r = read_layers(c, params);
  bool const from_scores = c.kind() == "layer_budget_from_scores";
  if (c.is_official() && !from_scores && r.shape.group() != 1)
    c.fail("shape.Hq", "allowed: shape.Hkv, the published form keeps a set per query head");
  if (from_scores) {
    take_scores(c, r);
  } else {
    read_window_options(params, r.options, r.shape.group());
    score_layers(b, c, r, layout);
  }
  params.note("published", c.is_official());
  replayed out;
  out.parameters = params.resolved();
  if (c.is_official()) {
    run_published(b, r, out);
  } else {
    int_rows const history = canonical_budgets(b, r);
    out.outputs["budgets"] = padded({static_cast<std::int64_t>(history.size())}, history);
  }
  if (!from_scores)
    out.outputs["scores"] = float_array({r.n_layers, r.shape.n_kv_heads, r.candidates}, r.scores);
  return out;
}

}  // namespace kvkeep::replay
