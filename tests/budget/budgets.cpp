// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
// Every budget alone, on plain scores, against the oracle: totals, caps, checkpoints, published
// forms.
#include <cmath>
#include <kvkeep/backend/cpu/cpu.hpp>
#include <kvkeep/budget/ada_heads.hpp>
#include <kvkeep/budget/cake_layers.hpp>
#include <kvkeep/budget/dynamic_layers.hpp>
#include <kvkeep/budget/inherit.hpp>
#include <kvkeep/budget/pyramid.hpp>
#include <kvkeep/budget/uniform.hpp>
#include <numeric>

#include "../support/oracle_cake.hpp"
#include "../support/run_op.hpp"

using namespace kvkeep;
using namespace kvkeep::test;

namespace {

static_assert(budget_rule<uniform, cpu::context>);
static_assert(budget_rule<per_layer, cpu::context>);
static_assert(budget_rule<pyramid, cpu::context>);
static_assert(budget_rule<dynamic_layers, cpu::context>);
static_assert(budget_rule<cake_layers, cpu::context>);
static_assert(budget_rule<ada_heads, cpu::context>);
static_assert(budget_rule<inherit, cpu::context>);

/// Prompt scores of all layers as a session holds them, and the same for the oracle.
struct prompt_scores {
  index_t layers, heads, tokens, sinks, window;
  std::vector<float> data;
  std::vector<float> spread{};  ///< [layer, head, 2] entropies and variances

  prompt_scores(generator& g, index_t l, index_t h, index_t n, index_t s, index_t w)
      : layers(l), heads(h), tokens(n), sinks(s), window(w), data(uz(offset_t{l} * h * n)) {
    bool const ties = g.chance(0.3F);
    for (float& x : data) x = ties ? static_cast<float>(g.integer(0, 5)) : g.uniform();
  }
  oracle::array layer(index_t l) const {
    oracle::array x({heads, tokens - sinks - window});
    for (index_t h = 0; h < heads; ++h)
      for (index_t j = 0; j < x.extent(1); ++j)
        x.at(h, j) = static_cast<double>(data[uz((offset_t{l} * heads + h) * tokens + j + sinks)]);
    return x;
  }
  oracle::array all() const {
    oracle::array x({layers, heads, tokens - sinks - window});
    x.data.clear();
    for (index_t l = 0; l < layers; ++l)
      for (double const e : layer(l).data) x.data.push_back(e);
    return x;
  }
};

/// Calls `allocate` layer after layer; the budgets after each of them.
template <class B>
std::vector<std::vector<oracle::counts>> allocate_all(B const& b, prompt_scores const& s) {
  std::vector<index_t> k(uz(s.layers * s.heads), -1);
  std::vector<std::vector<oracle::counts>> history;
  for (index_t l = 0; l < s.layers; ++l) {
    budget_input<> in{s.layers, l, s.heads, s.tokens, s.sinks, s.window, {}, {}};
    in.scores = row_major<host_space>(s.data.data(), s.layers, 1, s.heads, s.tokens);
    in.k = row_major<host_space>(k.data(), s.layers, s.heads);
    if (!s.spread.empty()) in.spread = row_major<host_space>(s.spread.data(), s.layers, s.heads, 2);
    workspace measure;
    REQUIRE(b.allocate(one_thread(), in, measure) == status::ok);
    aligned_block const block(std::max<std::size_t>(measure.peak(), 64));
    workspace place(block.span());
    REQUIRE(b.allocate(one_thread(), in, place) == status::ok);
    CHECK(place.peak() <= measure.peak());
    history.emplace_back();
    for (index_t j = 0; j <= l; ++j)
      history.back().emplace_back(k.begin() + j * s.heads, k.begin() + (j + 1) * s.heads);
  }
  return history;
}

}  // namespace

TEST_CASE("pyramid lengths, exact and published") {
  for (index_t const layers : {1, 2, 3, 7, 32})
    for (index_t const capacity : {9, 16, 64, 130})
      for (index_t const window : {1, 8})
        for (index_t const beta : {1, 2, 20, 200})
          for (index_t const tokens : {1, 8, 15, 16, 17, 60, 130, 131, 300, 5000})
            for (bool const exact : {true, false}) {
              if (!exact && layers == 1) continue;
              pyramid const b{capacity, beta, exact};
              oracle::counts got;
              for (index_t l = 0; l < layers; ++l)
                got.push_back(b.length(layers, l, window, tokens));
              INFO("L " << layers << " C " << capacity << " W " << window << " beta " << beta
                        << " T " << tokens);
              auto const want =
                  oracle::pyramid_lengths(layers, capacity, beta, window, tokens, exact);
              bool const same = got == want;
              if (!same) CHECK(got == want);
              REQUIRE(same);
              if (exact && tokens >= capacity)
                REQUIRE(oracle::total(got) == std::int64_t{layers} * capacity);
              // A prompt shorter than the capacity leaves every layer the capacity.
              REQUIRE(b.most(layers, {}, window, tokens) ==
                      std::max(*std::max_element(got.begin(), got.end()), capacity));
            }
}

TEST_CASE("DynamicKV: canonical budgets after every checkpoint") {
  for_seeds(120, [](generator& g) {
    index_t const layers = g.integer(1, 9), heads = g.integer(1, 3);
    index_t const sinks = g.integer(0, 2), window = g.integer(1, 4), base = g.integer(1, 12);
    index_t const tokens = sinks + window + base + g.integer(0, 60);
    dynamic_layers b;
    b.tokens = base + sinks + window;
    b.r_max = static_cast<double>(g.integer(2, 20)) / 2;
    b.r_min = static_cast<double>(g.integer(0, 8)) / 8;
    b.every = g.integer(1, 5);
    prompt_scores const s(g, layers, heads, tokens, sinks, window);
    auto const got = allocate_all(b, s);
    auto const want = oracle::dynamickv_canonical(s.all(), base, b.r_max, b.r_min, b.every);
    std::size_t checkpoint = 0;
    for (index_t l = 0; l < layers; ++l) {
      layer_range const due = b.due(l, layers);
      bool const at_checkpoint = (l + 1) % b.every == 0 || l + 1 == layers;
      REQUIRE(due.last == l + 1);
      REQUIRE(due.first == (at_checkpoint ? 0 : l));
      if (!at_checkpoint) continue;
      INFO("layer " << l);
      for (index_t j = 0; j <= l; ++j)
        for (index_t const k : got[uz(l)][uz(j)])
          REQUIRE(k == want[checkpoint][uz(j)] + sinks + window);
      ++checkpoint;
    }
    std::int64_t sum = 0;
    for (auto const& l : got.back()) {
      sum += l[0] - sinks - window;
      REQUIRE(l[0] <= b.most(layers, {}, sinks + window, tokens));
    }
    if (tokens - sinks - window >= base) REQUIRE(sum == std::int64_t{base} * layers);
  });
}

TEST_CASE("DynamicKV: the published arithmetic at its checkpoints") {
  for_seeds(80, [](generator& g) {
    index_t const layers = 4 * g.integer(1, 3), heads = g.integer(1, 3), window = g.integer(1, 4);
    index_t const base = g.integer(4, 20), tokens = window + 3 * base + g.integer(0, 40);
    dynamic_layers b;
    b.tokens = base + window;
    b.r_max = g.integer(1, 3);
    b.published = true;
    prompt_scores const s(g, layers, heads, tokens, 0, window);
    auto const got = allocate_all(b, s);
    std::vector<index_t> held;
    auto const cap = std::min(static_cast<index_t>(b.r_max * base), tokens - window);
    for (index_t l = 0; l < layers; ++l) {
      held.push_back(cap);
      if ((l + 1) % 4 != 0) continue;
      oracle::counts want;
      try {
        want = oracle::dynamickv_official(s.all(), base, cap, l + 1);
      } catch (std::domain_error const&) {
        return;  // the published code divides by zero here
      }
      for (std::size_t j = 0; j < held.size(); ++j) {
        held[j] = std::clamp(want[j], 0, held[j]);
        INFO("layer " << l << " budget " << j);
        REQUIRE(got[uz(l)][j][0] == held[j] + window);
      }
    }
  });
}

TEST_CASE("DynamicKV: published budgets stay zero where the published code divides by zero") {
  offset_t no_counts[] = {3, 2, 1, 0};  // below the number of layers
  published_dynamic_budgets(no_counts, 4, 8, 1, 4, 3, 64);
  for (offset_t b : no_counts) CHECK(b == 0);
  offset_t small_shares[] = {4, 4, 4, 4};  // a quarter of 3 each
  published_dynamic_budgets(small_shares, 4, 8, 1, 4, 3, 64);
  for (offset_t b : small_shares) CHECK(b == 0);
}

namespace {

/// Spreads of all layers, and the preferences that follow. Some layers have none.
std::vector<double> draw_spread(generator& g, prompt_scores& s, cake_layers const& b) {
  std::vector<double> preferences;
  for (index_t l = 0; l < s.layers; ++l) {
    bool const none = g.chance(0.1F);
    double sum[2] = {};
    for (index_t i = 0; i < 2 * s.heads; ++i) {
      s.spread.push_back(none ? 0 : g.uniform() * (i % 2 == 0 ? 40.0F : 0.1F));
      sum[i % 2] += static_cast<double>(s.spread.back());
    }
    preferences.push_back(std::pow(sum[0], 1 / b.tau1) * std::pow(sum[1], 1 / b.tau2));
  }
  return preferences;
}

}  // namespace

TEST_CASE("CAKE: canonical budgets after every checkpoint") {
  for_seeds(120, [](generator& g) {
    index_t const layers = g.integer(1, 9), heads = g.integer(1, 3);
    index_t const sinks = g.integer(0, 2), window = g.integer(2, 4), base = g.integer(1, 12);
    index_t const tokens = sinks + window + base + g.integer(0, 60);
    cake_layers b{base + sinks + window};
    b.tau1 = static_cast<double>(g.integer(1, 5)) / 2;
    b.tau2 = static_cast<double>(g.integer(1, 5)) / 2;
    b.every = g.integer(1, 5);
    prompt_scores s(g, layers, heads, tokens, sinks, window);
    auto const preferences = draw_spread(g, s, b);
    auto const got = allocate_all(b, s);
    auto const want = oracle::cake_canonical(preferences, base, tokens - sinks - window, b.every);
    std::size_t checkpoint = 0;
    for (index_t l = 0; l < layers; ++l) {
      layer_range const due = b.due(l, layers);
      bool const at_checkpoint = (l + 1) % b.every == 0 || l + 1 == layers;
      REQUIRE(due.last == l + 1);
      REQUIRE(due.first == (at_checkpoint ? 0 : l));
      if (!at_checkpoint) continue;
      INFO("layer " << l);
      std::int64_t sum = 0;
      for (index_t j = 0; j <= l; ++j) {
        for (index_t const k : got[uz(l)][uz(j)])
          REQUIRE(k == want[checkpoint][uz(j)] + sinks + window);
        REQUIRE(got[uz(l)][uz(j)][0] <= b.most(layers, {}, sinks + window, tokens));
        sum += want[checkpoint][uz(j)];
      }
      // What the layers so far hold never exceeds the total.
      REQUIRE(sum <= std::int64_t{base} * layers);
      if (l + 1 == layers) REQUIRE(sum == std::int64_t{base} * layers);
      ++checkpoint;
    }
  });
}

TEST_CASE("CAKE: the published arithmetic at its checkpoints") {
  for_seeds(120, [](generator& g) {
    index_t const layers = g.integer(1, 9), heads = g.integer(1, 3), window = g.integer(2, 4);
    index_t const base = g.integer(1, 20), open = base + g.integer(0, 60);
    cake_layers b{base + window};
    b.published = true;
    bool const whole = open <= base + window;  // up to C + W tokens
    prompt_scores s(g, layers, heads, open + window, 0, window);
    auto const preferences = draw_spread(g, s, b);
    auto const got = allocate_all(b, s);
    oracle::counts held;
    for (index_t l = 0; l < layers; ++l) {
      if (whole) REQUIRE(got[uz(l)][uz(l)][0] == open + window);
      REQUIRE(got[uz(l)][uz(l)][0] <= b.most(layers, {}, window, open + window));
      if (whole) continue;
      held.push_back(std::min(base * layers, open));
      std::vector<double> shares(preferences.begin(), preferences.begin() + l + 1);
      double const sum = std::accumulate(shares.begin(), shares.end(), 0.0);
      for (double& x : shares) x = (sum > 0 ? x / sum : 1.0 / (l + 1)) * (base * layers);
      auto const want = oracle::cake_official(shares, base * layers, open);
      for (std::size_t j = 0; j < held.size(); ++j) {
        held[j] = std::min(want[j], held[j]);
        INFO("layer " << l << " budget " << j);
        REQUIRE(got[uz(l)][j][0] == held[j] + window);
      }
    }
  });
}

TEST_CASE("AdaKV: heads of a layer") {
  for_seeds(200, [](generator& g) {
    index_t const heads = g.integer(1, 6), sinks = g.integer(0, 2), window = g.integer(1, 4);
    index_t const base = g.integer(1, 12), open = g.integer(base, base + 50);
    prompt_scores const s(g, 2, heads, open + sinks + window, sinks, window);
    ada_heads b;
    b.tokens = base + sinks + window;
    b.alpha = static_cast<double>(g.integer(0, 10)) / 10;
    b.normalize = g.chance(0.3F);
    b.form = g.chance(0.6F) ? ada_form::exact : ada_form::published;
    auto const got = allocate_all(b, s);
    for (index_t l = 0; l < 2; ++l) {
      auto const raw = oracle::ada_counts(s.layer(l), base, b.normalize);
      auto const want = b.form == ada_form::exact ? oracle::adakv_exact(raw, base, b.alpha, open)
                                                  : oracle::adakv_official(raw, base, b.alpha);
      std::int64_t sum = 0;
      for (std::size_t h = 0; h < raw.size(); ++h) {
        REQUIRE(got.back()[uz(l)][h] == std::min(want[h], open) + sinks + window);
        sum += got.back()[uz(l)][h] - sinks - window;
        cache_shape shape;
        shape.n_kv_heads = heads;
        REQUIRE(got.back()[uz(l)][h] <= b.most(2, shape, sinks + window, s.tokens));
      }
      if (b.form == ada_form::exact) REQUIRE(sum == std::int64_t{base} * heads);
    }
  });
}

TEST_CASE("AdaKV: kvpress' safeguard, and prompts with fewer candidates than the budget") {
  for_seeds(100, [](generator& g) {
    index_t const heads = g.integer(1, 5), window = g.integer(1, 3), base = g.integer(2, 10);
    index_t const open = g.integer(1, base + 30);
    prompt_scores const s(g, 1, heads, open + window, 0, window);
    ada_heads b;
    b.tokens = base + window;
    b.alpha = static_cast<double>(g.integer(0, 10)) / 10;
    b.form = ada_form::safeguard;
    auto const got = allocate_all(b, s).back()[0];
    if (base > open) {
      REQUIRE(got == oracle::counts(uz(heads), open + window));
      return;
    }
    index_t const safe = std::max(static_cast<index_t>(b.tokens * b.alpha) - window, 0);
    auto const want = oracle::adakv_safeguard(s.layer(0), base, safe);
    for (std::size_t h = 0; h < want.size(); ++h)
      REQUIRE(got[h] == oracle::count(want[h]) + window);
  });
}

TEST_CASE("the most that a budget keeps never falls below its capacity, nor with longer prompts") {
  cache_shape shape;
  shape.n_kv_heads = 2;
  auto const check = [&](auto const& b, index_t protect) {
    index_t before = b.capacity();
    for (index_t prompt = 0; prompt < 6 * b.capacity(); ++prompt) {
      index_t const most = b.most(4, shape, protect, prompt);
      INFO(b.traits().name << " C " << b.capacity() << " protected " << protect << " T " << prompt);
      REQUIRE(most >= before);
      before = most;
    }
  };
  for (index_t const tokens : {9, 16, 40})
    for (index_t const protect : {0, 1, 8}) {
      check(uniform{tokens}, protect);
      check(ada_heads{tokens}, protect);
      for (double const r_max : {1., 1.5, 10.}) check(dynamic_layers{tokens, r_max}, protect);
      for (bool const published : {true, false})
        check(cake_layers{tokens, 1, 1, 1, published}, protect);
      for (bool const exact : {true, false}) check(pyramid{tokens, 3, exact}, protect);
    }
}

TEST_CASE("uniform, per_layer and inherit say what they are") {
  CHECK(uniform{40}.capacity() == 40);
  CHECK(uniform{40}.traits().fixed);
  per_layer p;
  p.n = 3;
  p.tokens[0] = 4;
  p.tokens[1] = 20;
  p.tokens[2] = 9;
  CHECK(p.capacity() == 11);
  CHECK(p.most(3, {}, 0, 0) == 20);
  CHECK(p.traits().varies_over_layers);
  CHECK(inherit{}.traits().inherits);
  CHECK(uniform{40}.key() != uniform{41}.key());
  CHECK(pyramid{40}.key() != (pyramid{40, 10}).key());
  generator g(1);
  prompt_scores const s(g, 3, 2, 30, 0, 2);
  auto const got = allocate_all(p, s).back();
  CHECK(got == std::vector<oracle::counts>{{4, 4}, {20, 20}, {9, 9}});
  CHECK(allocate_all(uniform{7}, s).back() == std::vector<oracle::counts>(3, {7, 7}));
}
