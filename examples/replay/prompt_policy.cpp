// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
#include "prompt_policy.hpp"

namespace kvkeep::replay {

namespace {

void read_snapkv(parameters& p, prompt_policy& r, index_t group) {
  bool const pads = p.flag("pads_window_with_max_plus_1", false);
  r.window = read_window(p, r.options);
  read_window_options(p, r.options, group, pads ? window_form::kvpress : window_form::original);
  r.scores = pads ? reported::padded : reported::candidates;
}

void read_pyramidkv(recorded_case const& c, parameters& p, prompt_policy& r, index_t group) {
  r.n_layers = p.integer("num_layers", {1, most_layers});
  r.layer = p.integer("layer", {0, r.n_layers - 1});
  r.options.beta = p.integer("beta", {1, most_tokens}, 20);
  bool const pads = p.flag("pads_window_with_max_plus_1", false);
  r.window = read_window(p, r.options, 8);
  read_window_options(p, r.options, group, pads ? window_form::kvpress : window_form::original);
  // A single layer has no line of lengths: both forms keep C.
  r.options.exact_total = !c.is_official() || r.n_layers == 1;
  p.note("exact_total", r.options.exact_total);
  r.scores = pads ? reported::padded : reported::candidates;
}

void read_adakv(recorded_case const& c, parameters& p, prompt_policy& r, index_t group) {
  static constexpr std::array<named<ada_form>, 4> variants{{{"kvf", ada_form::published},
                                                            {"ffy0", ada_form::published},
                                                            {"kvpress", ada_form::safeguard},
                                                            {"spec", ada_form::exact}}};
  policy_options& o = r.options;
  o.form = p.word("variant", variants, c.is_official() ? "kvf" : "spec");
  bool const kvpress = o.form == ada_form::safeguard;
  r.window = read_window(p, o);
  read_window_options(p, o, group, kvpress ? window_form::kvpress : window_form::mean_rows);
  o.alpha = p.number(kvpress ? "alpha" : "floor", 0, 1, 0.2);
  if (!kvpress) o.normalize = p.flag("normalize", false);
  if (kvpress) {
    auto const safe = static_cast<index_t>(o.capacity * o.alpha);
    p.integer("n_safe", {safe, safe}, safe);
  }
  r.scores = kvpress ? reported::padded : reported::candidates;
}

/// Capacities per query head, the window besides, as the published program reads them from a table.
void read_headkv(recorded_case const& c, parameters& p, prompt_policy& r, index_t group) {
  r.window = read_window(p, r.options);
  read_window_options(p, r.options, group, window_form::mean_rows);
  auto const& of = checked_input(c, "head_capacity", {extent(c, "Hq")}, false).i32;
  for (std::size_t i = 0; i < of.size(); ++i)
    checked_integer(c, "inputs.head_capacity[" + std::to_string(i) + "]", of[i], {0, most_tokens});
  r.name = "snapkv";
  r.options.budget = "per_head";
  r.head_tokens = per_head::of_query_heads(of, group, r.window).tokens;
  r.scores = reported::candidates;
}

void read_tova(parameters& p, prompt_policy& r) {
  r.options.capacity = p.integer("capacity", {1, most_tokens});
  bool const protect = p.flag("protect_last", true);
  if (protect && r.options.capacity < 2) p.fail("capacity", "1, allowed: >= 2 with protect_last");
  r.window = protect ? 1 : 0;
  r.options.window = r.window;
  r.scores = protect ? reported::padded : reported::all;
}

void read_knorm(parameters& p, prompt_policy& r) {
  r.options.capacity = p.integer("capacity", {1, most_tokens});
  r.options.window = 0;
  std::vector<index_t> const skipped = p.integers("skip_layers");
  if (skipped.empty() && !p.has("layer_idx")) return;
  index_t const layer = p.integer("layer_idx", {0, most_layers});
  r.skipped = std::find(skipped.begin(), skipped.end(), layer) != skipped.end();
}

void read_lagkv(parameters& p, prompt_policy& r) {
  r.options.capacity = p.integer("capacity", {1, most_tokens});
  r.options.sinks = p.integer("n_sink", {0, most_tokens}, 4);
  r.options.lag = p.integer("lag_size", {1, most_tokens}, 128);
  r.options.cross_scoring = p.flag("cross_scoring", false);
}

/// Queries are recorded before their rotation.
void read_expected_attention(parameters& p, prompt_policy& r, index_t dim) {
  static constexpr std::array<named<bool>, 2> layouts{{{"half", false}, {"interleaved", true}}};
  policy_options& o = r.options;
  o.capacity = p.integer("capacity", {1, most_tokens});
  o.sinks = r.sinks = p.integer("n_sink", {0, most_tokens}, 4);
  o.ahead = p.integer("n_future", {1, most_tokens}, 512);
  o.covariance = p.flag("use_covariance", true);
  o.value_norms = p.flag("use_vnorm", true);
  o.epsilon = p.number("epsilon", 0, 1, 0);
  o.rotation.theta = p.number("rope_theta", 1, 1e12, 10000);
  o.rotation.interleaved = p.word("rope_layout", layouts, "half");
  o.rotated = false;
  if (dim % 2 != 0)
    p.fail("rope_layout", "pairs of features, of which D = " + std::to_string(dim) + " has none");
  r.scores = reported::padded;
}

}  // namespace

prompt_policy read_prompt_policy(recorded_case const& c, parameters& p, cache_shape const& shape) {
  index_t const group = shape.group();
  static constexpr char const* names[] = {"snapkv",
                                          "pyramidkv",
                                          "adakv",
                                          "headkv",
                                          "h2o",
                                          "tova",
                                          "knorm",
                                          "keydiff",
                                          "lagkv",
                                          "observed_attention",
                                          "expected_attention"};
  std::string const name = c.policy();
  auto const* known = std::find(std::begin(names), std::end(names), name);
  if (known == std::end(names)) throw unsupported(name);
  prompt_policy r;
  r.name = *known;
  if (name == "snapkv") read_snapkv(p, r, group);
  if (name == "pyramidkv") read_pyramidkv(c, p, r, group);
  if (name == "adakv") read_adakv(c, p, r, group);
  if (name == "headkv") read_headkv(c, p, r, group);
  if (name == "tova") read_tova(p, r);
  if (name == "knorm") read_knorm(p, r);
  if (name == "lagkv") read_lagkv(p, r);
  if (name == "expected_attention") read_expected_attention(p, r, shape.dim_k);
  if (name == "h2o") {
    r.window = read_window(p, r.options);
    r.options.group = read_group(p, group);
    r.scores = reported::candidates;
  }
  if (name == "keydiff" || name == "observed_attention") {
    r.options.capacity = p.integer("capacity", {1, most_tokens});
    r.options.window = 0;
  }
  return r;
}

}  // namespace kvkeep::replay
