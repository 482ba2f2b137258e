// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
// ExpectedAttention's scorer alone: turns, moments in any chunks, frequencies, sinks, bad keys.
#include <kvkeep/kvkeep.hpp>

#include "../support/oracle_expected.hpp"
#include "../support/run_op.hpp"
#include "../support/text.hpp"

using namespace kvkeep;
using namespace kvkeep::test;

namespace {

static_assert(scorer<expected_attention_score, cpu::context>);

/// Tokens of one sequence in plain arrays, and what a session would hold beside them.
struct plain_prompt {
  cache_shape shape;
  oracle::array q, k, v;
  std::vector<float> q_data, k_data, v_data, gathered, scores;
  std::vector<index_t> lengths, positions, seen;
  std::optional<kv_view<float>> view;

  /// @param distance  of the queries' mean from zero
  plain_prompt(generator& g, index_t tokens, index_t dim, double distance = 0)
      : shape{1, 4, 2, dim, 6, tokens},
        q({4, tokens, dim}),
        k({2, tokens, dim}),
        v({2, tokens, 6}),
        lengths(2, tokens),
        seen(1, tokens) {
    for (double& x : q.data) x = static_cast<double>(g.normal() + static_cast<float>(distance));
    for (double& x : k.data) x = static_cast<double>(g.normal() * 0.3F);
    for (double& x : v.data) x = static_cast<double>(g.normal());
    for (index_t h = 0; h < 2; ++h)
      for (index_t i = 0; i < tokens; ++i) positions.push_back(i);
    place();
  }
  /// The arrays as floats.
  void place() {
    q_data.assign(q.data.begin(), q.data.end());
    k_data.assign(k.data.begin(), k.data.end());
    v_data.assign(v.data.begin(), v.data.end());
    view.emplace(contiguous_view(k_data.data(), v_data.data(), shape));
  }

  /// {Hkv, T}, after observing chunks of at most `chunk` rows.
  oracle::array scored(expected_attention_score const& s, index_t chunk) {
    index_t const n = shape.max_slots;
    s.check(shape);
    // What lies there before a prompt says nothing.
    gathered.assign(product(2, s.state(shape).prompt_floats), std::nanf(""));
    score_input<> in;
    in.batch.n = 1;
    in.layer = {kv_ref<>(*view),
                {row_major<host_space>(lengths.data(), 1, 2),
                 row_major<host_space>(positions.data(), 1, 2, n),
                 {}}};
    in.seen = seen.data();
    in.gathered = row_major<host_space>(gathered.data(), 1, 2, s.state(shape).prompt_floats);
    for (index_t first = 0; first < n; first += chunk) {
      query_rows<> rows;
      index_t const count = std::min(chunk, n - first);
      rows.q =
          row_major<host_space>(static_cast<float const*>(q_data.data()), 1, 4, n, shape.dim_k);
      rows.q.data += offset_t{first} * shape.dim_k;
      rows.q.extent[2] = count;
      rows.position =
          row_major<host_space>(static_cast<index_t const*>(positions.data()) + first, 1, count);
      measured([&](workspace& w) { return s.observe_prompt(one_thread(), in, rows, w); });
    }
    scores.assign(product(2, n), -77.0F);
    auto const out = row_major<host_space>(scores.data(), 1, 2, n);
    measured([&](workspace& w) { return s.score(one_thread(), in, out, w); });
    return {{2, n}, scores};
  }

 private:
  /// In exactly the memory that was measured.
  template <class F>
  static void measured(F const& f) {
    workspace measure;
    REQUIRE(f(measure) == status::ok);
    aligned_block const block(std::max<std::size_t>(measure.peak(), 64));
    workspace place(block.span());
    REQUIRE(f(place) == status::ok);
    CHECK(place.peak() == measure.peak());
  }
};

oracle::expected_rule rule_of(expected_attention_score const& s) {
  return {s.rotation.theta, s.rotation.dims, s.rotation.interleaved,
          s.rotated,        s.ahead,         s.sinks,
          s.covariance,     s.value_norms,   static_cast<double>(s.epsilon)};
}

void same_scores(oracle::array const& got, oracle::array const& want, double relative) {
  for (std::size_t i = 0; i < got.data.size(); ++i) {
    INFO("token " << i << ": " << got.data[i] << ", " << want.data[i]);
    REQUIRE(near(got.data[i], want.data[i], relative, 1e-7));
  }
}

}  // namespace

TEST_CASE("turns are cosines and sines, however many") {
  for_seeds(20, [](generator& g) {
    double const most[] = {1, 8, 1e3, 1e6};
    double const turns = static_cast<double>(g.uniform() - 0.5F) * g.one_of(most);
    double const angle = std::fmod(turns, 1.0) * 6.283185307179586476925;
    double c = 0, s = 0;
    detail::turn(turns, c, s);
    CHECK(std::abs(c - std::cos(angle)) < 1e-12);
    CHECK(std::abs(s - std::sin(angle)) < 1e-12);
  });
  for (int quarter = -9; quarter <= 9; ++quarter) {
    double c = 0, s = 0;
    detail::turn(quarter / 4.0, c, s);
    int const q = (quarter % 4 + 4) % 4;
    CHECK(c == (q == 0 ? 1 : q == 2 ? -1 : 0));
    CHECK(s == (q == 1 ? 1 : q == 3 ? -1 : 0));
  }
}

TEST_CASE("expected attention is the oracle's in chunks of any size") {
  for_seeds(10, [](generator& g) {
    index_t const dims[] = {2, 6, 16, 34};
    plain_prompt p(g, g.integer(1, 60), g.one_of(dims));
    expected_attention_score s;
    s.rotation.interleaved = g.chance(0.5F);
    s.rotated = g.chance(0.7F);
    s.ahead = g.integer(1, 100);
    s.sinks = g.integer(0, 5);
    s.covariance = g.chance(0.7F);
    s.value_norms = g.chance(0.7F);
    s.epsilon = g.chance(0.5F) ? 0.01F : 0;
    auto const want = oracle::expected_scores(p.q, p.k, p.v, rule_of(s), kv_ref<>(*p.view).scale);
    for (index_t chunk : {1, 7, 64}) {
      INFO("T " << p.shape.max_slots << " D " << p.shape.dim_k << " chunk " << chunk);
      same_scores(p.scored(s, chunk), want, 1e-4);
    }
  });
}

TEST_CASE("a mean far from zero costs no covariance") {
  for_seeds(4, [](generator& g) {
    std::uint64_t const seed = g.next();
    std::vector<float> const still(8, 0.0F);
    auto const scored = [&](double distance, bool covariance, index_t chunk) {
      generator same(seed);
      plain_prompt p(same, 200, 16, distance);
      for (index_t h = 0; h < 2; ++h)  // keys across the mean, which thus takes no part in logits
        for (index_t j = 0; j < 200; ++j) {
          double sum = 0;
          for (index_t d = 0; d < 16; ++d) sum += p.k.at(h, j, d) / 16;
          for (index_t d = 0; d < 16; ++d) p.k.at(h, j, d) = 3 * (p.k.at(h, j, d) - sum);
        }
      p.place();
      expected_attention_score s;
      s.rotated = false;
      s.rotation.frequencies = still.data();
      s.covariance = covariance;
      return p.scored(s, chunk);
    };
    auto const want = scored(0, true, 200), without = scored(0, false, 200);
    double apart = 0;
    for (std::size_t i = 0; i < want.data.size(); ++i)
      if (!std::isinf(want.data[i]))
        apart = std::max(apart, std::abs(want.data[i] / without.data[i] - 1));
    CHECK(apart > 0.1);
    for (index_t chunk : {1, 16, 200}) same_scores(scored(300, true, chunk), want, 2e-3);
  });
}

TEST_CASE("frequencies that are given take the place of theta's") {
  generator g(3);
  plain_prompt p(g, 40, 8);
  expected_attention_score s;
  s.rotation.theta = 500;
  std::vector<float> frequencies;
  for (index_t i = 0; i < 4; ++i)
    frequencies.push_back(static_cast<float>(std::pow(500.0, -2.0 * i / 8)));
  auto const want = p.scored(s, 16);
  s.rotation.theta = 1e6;
  CHECK(p.scored(s, 16).data != want.data);
  s.rotation.frequencies = frequencies.data();
  same_scores(p.scored(s, 16), want, 1e-4);
}

TEST_CASE("sinks score infinity, and a prompt of nothing else as well") {
  generator g(5);
  plain_prompt p(g, 6, 8);
  expected_attention_score s;
  for (index_t sinks : {0, 2, 6, 9}) {
    s.sinks = sinks;
    auto const got = p.scored(s, 4);
    for (index_t h = 0; h < 2; ++h)
      for (index_t j = 0; j < 6; ++j) CHECK(std::isinf(got.at(h, j)) == (j < sinks));
  }
}

TEST_CASE("a key that is not finite spoils its own score alone") {
  for (float const bad : {std::nanf(""), std::numeric_limits<float>::infinity()}) {
    generator g(8);
    plain_prompt p(g, 30, 8);
    expected_attention_score s;
    p.k.at(0, 12, 3) = static_cast<double>(bad);
    p.place();
    auto const got = p.scored(s, 16);
    for (index_t h = 0; h < 2; ++h)
      for (index_t j = s.sinks; j < 30; ++j) {
        INFO("head " << h << " token " << j);
        CHECK(std::isfinite(got.at(h, j)));
        CHECK(got.at(h, j) >= 0);
      }
    if (std::isnan(bad)) CHECK(got.at(0, 12) == 0);
  }
}

TEST_CASE("a query that is not finite leaves the keys of its head equal") {
  for (float const bad : {std::nanf(""), std::numeric_limits<float>::infinity()}) {
    generator g(9);
    plain_prompt p(g, 30, 8);
    expected_attention_score s;
    s.value_norms = false;
    auto const good = p.scored(s, 8);
    for (index_t h : {2, 3}) p.q.at(h, 20, 1) = static_cast<double>(bad);  // of KV head 1
    p.place();
    auto const got = p.scored(s, 8);
    for (index_t j = s.sinks; j < 30; ++j) {
      CHECK(got.at(0, j) == good.at(0, j));
      CHECK(near(got.at(1, j), 1.0 / 26));
    }
  }
}

TEST_CASE("a rope that a model cannot have is refused") {
  cache_shape const shape{1, 4, 2, 8, 6, 40};
  auto const message = [&](auto&& edit, index_t dim = 8) {
    expected_attention_score s;
    edit(s);
    cache_shape x = shape;
    x.dim_k = dim;
    return refusal([&] { s.check(x); });
  };
  CHECK(message([](auto&) {}) == "accepted");
  auto const has = [](std::string const& text, char const* part) {
    INFO(text);
    CHECK(text.find(part) != std::string::npos);
  };
  has(message([](auto& s) { s.rotation.theta = 0.5; }), "rope.theta");
  has(message([](auto& s) { s.rotation.theta = std::nan(""); }), "rope.theta");
  has(message([](auto& s) { s.rotation.dims = 3; }), "rope.dims = 3");
  has(message([](auto& s) { s.rotation.dims = 10; }), "dim_k = 8");
  has(message([](auto&) {}, 7), "shape.dim_k = 7");
  CHECK(message([](auto& s) { s.rotation.dims = 6; }, 7) == "accepted");
  has(message([](auto& s) { s.ahead = 0; }), "ahead = 0");
  has(message([](auto& s) { s.sinks = -1; }), "sinks = -1");
  has(message([](auto& s) { s.epsilon = 2; }), "epsilon");
}
