// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// The test oracle against every golden case: kept sets and integers exactly, scores within
/// tolerance.
#include <cmath>
#include <map>
#include <string>
#include <vector>

#include "../support/case.hpp"
#include "../support/catch.hpp"
#include "../support/oracle.hpp"
#include "../support/oracle_budget.hpp"
#include "../support/oracle_cake.hpp"
#include "../support/oracle_decode.hpp"
#include "../support/oracle_expected.hpp"
#include "../support/oracle_morph.hpp"

namespace {

namespace oracle = kvkeep::oracle;
using kvkeep::index_t;
using kvkeep::test::golden_case;
using kvkeep::tools::npy_array;
using oracle::array;
using oracle::kept_set;
using oracle::kept_sets;
using oracle::uz;

array to_array(npy_array const& a) {
  std::vector<index_t> shape;
  for (std::int64_t e : a.shape) shape.push_back(static_cast<index_t>(e));
  return a.is_float ? array(shape, a.f32) : array(shape, a.i32);
}

/// Row of integers up to the padding of -1.
std::vector<index_t> ints(array const& row) {
  std::vector<index_t> v;
  for (double x : row.data)
    if (x >= 0) v.push_back(static_cast<index_t>(x));
  return v;
}

void check_close(array const& mine, array const& gold, double atol = 1e-6) {
  REQUIRE(mine.shape == gold.shape);
  std::size_t bad = 0;
  for (std::size_t i = 0; i < mine.data.size(); ++i)
    bad += !(std::abs(mine.data[i] - gold.data[i]) <= atol + 2e-4 * std::abs(gold.data[i]));
  CHECK(bad == 0);
}

/// gold {Hkv, n} padded with -1
void check_sets(kept_sets const& mine, array const& gold) {
  REQUIRE(oracle::count(mine) == gold.extent(0));
  for (index_t c = 0; c < gold.extent(0); ++c) CHECK(mine[uz(c)] == ints(gold.slice(c)));
}

oracle::reduction to_reduction(std::string const& s) {
  static std::map<std::string, oracle::reduction> const names{
      {"none", oracle::reduction::mean},  // one query head per KV head
      {"mean", oracle::reduction::mean},
      {"max", oracle::reduction::max},
      {"sum", oracle::reduction::sum}};
  return names.at(s);
}

oracle::window_rule window_of(golden_case const& c) {
  oracle::window_rule w;
  w.window = c.param("window");
  w.kernel = c.param("kernel");
  w.pool =
      c.param<std::string>("pooling") == "maxpool" ? oracle::pooling::max : oracle::pooling::avg;
  w.group = to_reduction(c.param_or<std::string>("gqa_agg", "mean"));
  w.gqa_before_pool = c.param_or("gqa_before_pool", true);
  w.rows = to_reduction(c.param_or<std::string>("window_reduce", "sum"));
  return w;
}

/// s {H, T'} with `extra` columns of the largest score plus one.
array with_protected(array const& s, index_t extra) {
  double const top = *std::max_element(s.data.begin(), s.data.end()) + 1;
  array full({s.extent(0), s.extent(1) + extra}, top);
  for (index_t h = 0; h < s.extent(0); ++h)
    for (index_t j = 0; j < s.extent(1); ++j) full.at(h, j) = s.at(h, j);
  return full;
}

void check_window_policy(golden_case const& c) {
  array const q = to_array(c.input("q_win")), k = to_array(c.input("k"));
  auto const w = window_of(c);
  index_t const n = c.shape("T");
  index_t length = c.param("capacity");
  if (c.policy() == "pyramidkv")
    length = oracle::pyramid_lengths(c.param("num_layers"), length, c.param("beta"), w.window, n,
                                     false)[uz(c.param("layer"))];
  for (index_t b = 0; b < k.extent(0); ++b) {
    array s = oracle::window_scores(q.slice(b), k.slice(b), w);
    check_sets(oracle::keep_with_window(s, length - w.window, n),
               to_array(c.output("kept")).slice(b));
    if (c.param_or("pads_window_with_max_plus_1", false)) s = with_protected(s, w.window);
    check_close(s, to_array(c.output("scores")).slice(b));
  }
}

void check_adakv(golden_case const& c) {
  array s = oracle::window_scores(to_array(c.input("q_win")).slice(0),
                                  to_array(c.input("k")).slice(0), window_of(c));
  index_t const window = c.param("window"), base = c.param("capacity") - window, n = c.shape("T");
  array const kept = to_array(c.output("kept")).slice(0),
              scores = to_array(c.output("scores")).slice(0);
  if (c.param<std::string>("variant") == "kvpress") {
    s = with_protected(s, window);
    check_close(s, scores);
    check_sets(oracle::adakv_safeguard(s, c.param("capacity"), c.param("n_safe")), kept);
    return;
  }
  check_close(s, scores);
  auto const raw = oracle::ada_counts(s, base, c.param<bool>("normalize"));
  CHECK(raw == ints(to_array(c.output("raw_counts"))));
  double const alpha = c.param<double>("floor");
  auto lens = c.is_official() ? oracle::adakv_official(raw, base, alpha)
                              : oracle::adakv_exact(raw, base, alpha, n - window);
  check_sets(oracle::keep_with_window(s, lens, n), kept);
  for (index_t& x : lens) x += window;
  CHECK(lens == ints(to_array(c.output("lens"))));
}

void check_headkv(golden_case const& c) {
  array const s = oracle::window_scores(to_array(c.input("q_win")).slice(0),
                                        to_array(c.input("k")).slice(0), window_of(c));
  check_close(s, to_array(c.output("scores")).slice(0));
  auto const capacity = ints(to_array(c.input("head_capacity")));
  index_t const heads = c.shape("Hkv"), group = c.shape("Hq") / heads, n = c.shape("T");
  oracle::counts lens;
  for (index_t h = 0; h < heads; ++h) {
    double sum = 0;
    for (index_t g = 0; g < group; ++g) sum += capacity[static_cast<std::size_t>(h * group + g)];
    lens.push_back(static_cast<index_t>(std::nearbyint(sum / group)));
  }
  check_sets(oracle::keep_with_window(s, lens, n), to_array(c.output("kept")).slice(0));
  for (index_t& x : lens) x += c.param("window");
  CHECK(lens == ints(to_array(c.output("lens"))));
}

void check_expected(golden_case const& c) {
  array const k = to_array(c.input("k")).slice(0);
  oracle::expected_rule r;
  r.theta = c.param<double>("rope_theta");
  r.rotated = false;
  r.ahead = c.param("n_future");
  r.sinks = c.param("n_sink");
  array s =
      oracle::expected_scores(to_array(c.input("q")).slice(0), k, to_array(c.input("v")).slice(0),
                              r, 1 / std::sqrt(static_cast<double>(k.extent(2))));
  check_sets(oracle::keep_top(
                 s, oracle::counts(static_cast<std::size_t>(k.extent(0)), c.param("capacity")), {}),
             to_array(c.output("kept")).slice(0));
  double most = 0;  // that of all heads and one more are recorded for sinks
  for (double& x : s.data) most = std::isinf(x) ? most : std::max(most, x);
  for (double& x : s.data) x = std::isinf(x) ? most + 1 : x;
  check_close(s, to_array(c.output("scores")).slice(0));
}

/// Score of the policies that see the whole prompt; the first of them protects its window.
void check_prompt_policy(golden_case const& c) {
  std::string const policy = c.policy();
  array const k4 = to_array(c.input("k")), kept = to_array(c.output("kept"));
  for (index_t b = 0; b < k4.extent(0); ++b) {
    array const k = k4.slice(b);
    array s;
    oracle::guard keep;
    index_t window = 0;
    if (policy == "h2o") {
      window = c.param("window");
      s = oracle::h2o_scores(to_array(c.input("q")).slice(b), k, window,
                             to_reduction(c.param<std::string>("gqa_agg")));
    } else if (policy == "observed_attention") {
      s = oracle::observed_attention_scores(to_array(c.input("q")).slice(b), k);
    } else if (policy == "tova") {
      array const all = oracle::tova_scores(to_array(c.input("q_win")).slice(b), k);
      array old({all.extent(0), all.extent(1) - 1});
      for (index_t h = 0; h < old.extent(0); ++h)
        for (index_t j = 0; j < old.extent(1); ++j) old.at(h, j) = all.at(h, j);
      s = with_protected(old, 1);
      keep.recent = 1;
    } else if (policy == "knorm") {
      s = oracle::knorm_scores(k);
    } else if (policy == "keydiff") {
      s = oracle::keydiff_scores(k);
    } else {
      s = oracle::lagkv_scores(k, to_array(c.input("v")).slice(b), c.param("n_sink"),
                               c.param("lag_size"), c.param<bool>("cross_scoring"));
    }
    check_close(s, to_array(c.output("scores")).slice(b));
    index_t const capacity = c.param("capacity");
    check_sets(window > 0 ? oracle::keep_with_window(s, capacity - window, k.extent(1))
                          : oracle::keep_top(s, capacity, keep),
               kept.slice(b));
  }
}

void check_streaming(golden_case const& c) {
  if (c.kind() == "prefill_select") {
    index_t const n = c.shape("T"), capacity = c.param("capacity"), sinks = c.param("n_sink");
    kept_set const all = oracle::iota_positions(n);
    std::vector<double> const newest(all.begin(), all.end());
    index_t const kvf_sinks = capacity - c.param("window");
    CHECK(oracle::select(newest, all, capacity, {.sinks = kvf_sinks}) ==
          ints(to_array(c.output("kept_kvf"))));
    CHECK(oracle::select(newest, all, capacity, {.sinks = sinks}) ==
          ints(to_array(c.output("kept_kvpress"))));
    return;
  }
  index_t const n = c.shape("T0"), steps = c.shape("steps");
  oracle::tokens t;
  t.q = t.k = array({1, n + steps + 1, 1});
  oracle::decode_rule rule;
  rule.keep.sinks = c.param("start_size");
  rule.capacity = rule.keep.sinks + c.param("recent_size");
  oracle::streaming_decode post(t, rule, oracle::full_cache(t, n), false);
  oracle::streaming_decode space(t, rule, oracle::full_cache(t, n), true);
  array const gold_post = to_array(c.output("kept_post")),
              gold_space = to_array(c.output("kept_space"));
  post.cut(n - 1);
  for (index_t s = 0; s <= steps; ++s) {
    if (s > 0) post.step(n + s - 1);
    CHECK(post.live()[0] == ints(gold_post.slice(s)));
    CHECK(space.step(n + s).kept[0] == ints(gold_space.slice(s)));
  }
}

void check_h2o_trace(golden_case const& c) {
  oracle::tokens const t{to_array(c.input("q")).slice(0), to_array(c.input("k")).slice(0), {}};
  index_t const n = c.shape("T0");
  oracle::decode_rule rule;
  rule.keep.recent = c.param("recent_size");
  rule.capacity = c.param("hh_size") + rule.keep.recent;
  oracle::h2o_decode sim(t, rule, oracle::full_cache(t, n), oracle::h2o_decode::prompt_acc(t, n));
  array const kept = to_array(c.output("kept")), acc = to_array(c.output("acc"));
  sim.cut(n - 1);
  for (index_t s = 0; s <= c.shape("steps"); ++s) {
    if (s > 0) sim.step(n + s - 1);
    check_sets(sim.live(), kept.slice(s).slice(0));
    for (index_t h = 0; h < t.k.extent(0); ++h) {
      auto const mine = sim.acc(h);
      auto gold = acc.slice(s).slice(0).row(h);
      gold.resize(mine.size());
      check_close(array({oracle::count(mine)}, mine), array({oracle::count(mine)}, gold));
    }
  }
}

void check_tova_trace(golden_case const& c) {
  oracle::tokens const t{to_array(c.input("q")).slice(0), to_array(c.input("k")).slice(0), {}};
  index_t const n = c.shape("T0");
  oracle::decode_rule rule;
  rule.capacity = c.param("capacity");
  rule.keep.recent = c.param<bool>("protect_last") ? 1 : 0;
  oracle::tova_decode sim(t, rule, oracle::full_cache(t, n));
  array const kept = to_array(c.output("kept"));
  sim.cut(n - 1);
  for (index_t s = 0; s <= c.shape("steps"); ++s) {
    if (s > 0) sim.step(n + s - 1);
    check_sets(sim.live(), kept.slice(s).slice(0));
  }
}

void check_morph(golden_case const& c, bool per_head_mask) {
  oracle::tokens const t{to_array(c.input("q")).slice(0), to_array(c.input("k")).slice(0),
                         to_array(c.input("v")).slice(0)};
  index_t const n = c.shape("T0");
  oracle::decode_rule rule;
  rule.capacity = c.param("capacity");
  oracle::morph_rule morph;
  morph.window = c.param("window");
  morph.max_fused = c.param<std::string>("fusion") == "max_fused";
  morph.evict_after = c.param<double>("evict_after");
  morph.n_rows = c.param("n_query_rows");
  morph.include_current = c.param_or("include_current", false);
  morph.per_head_mask = per_head_mask;
  oracle::morph_decode sim(t, rule, morph, oracle::full_cache(t, n));
  array const kept = to_array(c.output("kept")), evicted = to_array(c.output("evicted"));
  array const out = to_array(c.output(c.is_official() ? "attn_out_official" : "attn_out_kept"));
  array const lens = to_array(c.output("lens"));
  for (index_t s = 0; s < c.shape("steps"); ++s) {
    auto const r = sim.step(n + s);
    check_sets(r.kept, kept.slice(s).slice(0));
    CHECK(r.evicted == (evicted.at(s) != 0));
    CHECK(static_cast<double>(r.kept[0].size()) == lens.at(s));
    check_close(r.out, out.slice(s).slice(0), 2e-5);
  }
}

void check_pyramid_budgets(golden_case const& c) {
  array const combos = to_array(c.input("combos")), gold = to_array(c.output("lengths"));
  for (index_t i = 0; i < combos.extent(0); ++i) {
    auto const x = ints(combos.slice(i));
    CHECK(oracle::pyramid_lengths(x[0], x[1], x[2], x[3], x[4], !c.is_official()) ==
          ints(gold.slice(i)));
  }
}

void check_cake_budgets(golden_case const& c) {
  array const meta = to_array(c.input("meta")), raw = to_array(c.input("raw"));
  array const gold = to_array(c.output("budgets"));
  for (index_t i = 0; i < meta.extent(0); ++i) {
    auto const x = ints(meta.slice(i));
    auto shares = raw.row(i);
    shares.resize(uz(x[0]));
    CHECK(oracle::cake_official(shares, x[1], x[2]) == ints(gold.slice(i)));
  }
}

void check_small(golden_case const& c) {
  bool const top = c.policy() == "topk";
  array const gold = to_array(c.output(top ? "kept" : "parts"));
  for (index_t i = 0; i < gold.extent(0); ++i) {
    if (top) {
      auto const s = to_array(c.input("scores")).row(i);
      auto const k = static_cast<index_t>(to_array(c.input("k")).at(i));
      CHECK(oracle::top_positions(s, oracle::iota_positions(oracle::count(s)), k) ==
            ints(gold.slice(i)));
    } else {
      CHECK(oracle::apportion(c.input("total").i32[uz(i)],
                              ints(to_array(c.input("weights")).slice(i)),
                              ints(to_array(c.input("caps")).slice(i))) == ints(gold.slice(i)));
    }
  }
}

array dynamickv_scores(golden_case const& c) {
  if (c.kind() != "layer_budget") return to_array(c.input("scores"));
  array const q = to_array(c.input("q_win")), k = to_array(c.input("k"));
  array const gold = to_array(c.output("scores"));
  array all(gold.shape);
  for (index_t l = 0; l < gold.extent(0); ++l) {
    array const s = oracle::window_scores(q.slice(l), k.slice(l), window_of(c));
    check_close(s, gold.slice(l));
    for (index_t h = 0; h < s.extent(0); ++h)
      for (index_t j = 0; j < s.extent(1); ++j) all.at(l, h, j) = s.at(h, j);
  }
  return all;
}

/// The reference's stored list of one head: best first, then the window, cut at each checkpoint by
/// a slice that may catch window entries, whereupon the window is appended again.
kept_set cut_stored(kept_set list, index_t budget, index_t window) {
  kept_set const tail(list.end() - window, list.end());
  index_t const n = oracle::count(list);
  list.resize(uz(std::clamp<index_t>(budget >= 0 ? budget : n + budget, 0, n)));
  list.insert(list.end(), tail.begin(), tail.end());
  return list;
}

void check_dynamickv_official(golden_case const& c) {
  array const s = dynamickv_scores(c);
  index_t const window = c.param("window"), base = c.param("capacity") - window, n = s.extent(2);
  auto const checkpoints = ints(to_array(c.output("checkpoints")));
  index_t const size = std::min(static_cast<index_t>(c.param<double>("r_max") * base), n);
  std::vector<kept_sets> stored(uz(s.extent(0)));
  for (index_t l = 0; l < s.extent(0); ++l)
    for (index_t h = 0; h < s.extent(1); ++h) {
      kept_set list = oracle::ranked(s.slice(l).row(h), oracle::iota_positions(n));
      list.resize(uz(size));
      for (index_t w = 0; w < window; ++w) list.push_back(n + w);
      stored[uz(l)].push_back(list);
    }
  for (std::size_t i = 0; i < checkpoints.size(); ++i) {
    auto const b = oracle::dynamickv_official(s, base, size, checkpoints[i]);
    auto gold = to_array(c.output("budget_raw")).row(static_cast<index_t>(i));
    gold.resize(b.size());
    CHECK(std::vector<double>(b.begin(), b.end()) == gold);
    std::vector<index_t> lens;
    for (std::size_t l = 0; l < b.size(); ++l) {
      for (kept_set& list : stored[l]) list = cut_stored(list, std::min(b[l], n), window);
      lens.push_back(oracle::count(stored[l][0]));
    }
    CHECK(lens == ints(to_array(c.output("len_after")).slice(static_cast<index_t>(i))));
  }
  if (c.outputs.count("kept_official"))
    for (index_t l = 0; l < s.extent(0); ++l)
      check_sets(stored[uz(l)], to_array(c.output("kept_official")).slice(l));
}

void check_dynamickv_canonical(golden_case const& c) {
  array const s = dynamickv_scores(c), gold = to_array(c.output("budgets"));
  index_t const base = c.param("capacity") - c.param("window");
  auto const history = oracle::dynamickv_canonical(s, base, c.param<double>("r_max"),
                                                   c.param<double>("r_min"), c.param("every"));
  REQUIRE(oracle::count(history) == gold.extent(0));
  for (std::size_t i = 0; i < history.size(); ++i)
    CHECK(history[i] == ints(gold.slice(static_cast<index_t>(i))));
  CHECK(oracle::total(history.back()) == static_cast<std::int64_t>(base) * s.extent(0));
}

void check_case(golden_case const& c) {
  std::string const policy = c.policy(), kind = c.kind();
  if (policy == "topk" || policy == "apportion") return check_small(c);
  if (policy == "pyramidkv" && kind == "budget") return check_pyramid_budgets(c);
  if (policy == "cake") return check_cake_budgets(c);
  if (policy == "snapkv" || policy == "pyramidkv") return check_window_policy(c);
  if (policy == "adakv") return check_adakv(c);
  if (policy == "headkv") return check_headkv(c);
  if (policy == "expected_attention") return check_expected(c);
  if (policy == "streamingllm") return check_streaming(c);
  if (policy == "dynamickv")
    return c.is_official() ? check_dynamickv_official(c) : check_dynamickv_canonical(c);
  if (policy == "morphkv") {
    check_morph(c, c.is_official());
    // With one query head per KV head the official output is attention over the kept set.
    if (c.is_official() && c.shape("Hq") == c.shape("Hkv")) check_morph(c, false);
    return;
  }
  if (policy == "h2o" && kind == "decode_trace") return check_h2o_trace(c);
  if (policy == "tova" && kind == "decode_trace") return check_tova_trace(c);
  if (policy == "h2o" || policy == "tova" || policy == "observed_attention" || policy == "knorm" ||
      policy == "keydiff" || policy == "lagkv")
    return check_prompt_policy(c);
  FAIL("no check for policy " << policy << ", kind " << kind);
}

TEST_CASE("the oracle reproduces every golden case", "[oracle][golden]") {
  auto const dirs = kvkeep::test::case_dirs(KVKEEP_GOLDEN_DIR);
  REQUIRE(dirs.size() >= 69);
  int checked = 0;
  for (auto const& dir : dirs) {
    golden_case const c = kvkeep::test::load_case(dir);
    INFO("case " << c.name());
    check_case(c);
    ++checked;
  }
  CHECK(checked == static_cast<int>(dirs.size()));
}

}  // namespace
