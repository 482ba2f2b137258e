// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
// Budgets per head: tables of the caller's, published ones, and HeadKV's from importances.
#include <kvkeep/backend/cpu/cpu.hpp>
#include <kvkeep/budget/per_head.hpp>

#include "../support/run_op.hpp"
#include "../support/text.hpp"

using namespace kvkeep;
using namespace kvkeep::test;

namespace {

static_assert(budget_rule<per_head, cpu::context>);

std::int64_t total(std::vector<index_t> const& all) {
  return std::accumulate(all.begin(), all.end(), std::int64_t{0});
}

}  // namespace

TEST_CASE("a table per head reaches every head, and says what it is") {
  per_head const b{{4, 9, 1, 20, 7, 7}};
  CHECK(b.capacity() == 8);
  cache_shape const shape{1, 4, 2, 8, 8, 40};
  CHECK(b.most(3, shape, 0, 0) == 20);
  CHECK(b.most_in(0, 3, shape, 0, 0) == 9);
  CHECK(b.most_in(2, 3, shape, 0, 0) == 7);
  budget_traits const t = b.traits();
  CHECK((t.fixed && t.varies_over_heads && t.varies_over_layers && !t.needs_scores));
  CHECK(b.key() != per_head{{4, 9, 1, 20, 7, 8}}.key());
  CHECK(b.key() != per_head{{4, 9, 1, 20, 7}}.key());
  std::vector<index_t> k(6, -1);
  for (index_t l = 0; l < 3; ++l) {
    budget_input<> in{3, l, 2, 30, 0, 1, {}, row_major<host_space>(k.data(), 3, 2)};
    workspace none;
    REQUIRE(b.allocate(one_thread(), in, none) == status::ok);
    CHECK(none.peak() == 0);
    CHECK(k[uz(2 * l)] == -1);
    workspace place(std::span<std::byte>{});
    REQUIRE(b.allocate(one_thread(), in, place) == status::ok);
  }
  CHECK(k == b.tokens);
}

TEST_CASE("a table of many heads") {
  index_t const heads = GENERATE(1, 8, 9, 200);
  per_head b;
  for (index_t h = 0; h < 2 * heads; ++h) b.tokens.push_back(1000 + h);
  std::vector<index_t> k(uz(2 * heads + 1), -1);
  for (index_t l = 0; l < 2; ++l) {
    budget_input<> in{2, l, heads, 30, 0, 1, {}, row_major<host_space>(k.data(), 2, heads)};
    workspace place(std::span<std::byte>{});
    REQUIRE(b.allocate(one_thread(), in, place) == status::ok);
  }
  CHECK(k.back() == -1);
  k.pop_back();
  CHECK(k == b.tokens);
}

TEST_CASE("tables that do not fit are refused") {
  cache_shape const shape{1, 4, 2, 8, 8, 40};
  per_head const b{{4, 9, 1, 20}};
  CHECK(refusal([&] { b.check(2, shape, 1); }) == "accepted");
  CHECK(refusal([&] { b.check(3, shape, 1); }).find("per_head.tokens.size = 4, allowed: 6") !=
        std::string::npos);
  CHECK(refusal([&] {
          b.check(2, shape, 2);
        }).find("per_head.tokens = 1, allowed: >= sinks + window = 2") != std::string::npos);
}

TEST_CASE("capacities of query heads: means of groups, halves to even") {
  std::vector<index_t> const of{1, 2, 3, 2, 7, 7, 0, 1};  // 1.5, 2.5, 7, 0.5
  CHECK(per_head::of_query_heads(of, 2, 8).tokens == std::vector<index_t>{10, 10, 15, 8});
  CHECK(per_head::of_query_heads(of, 1, 0).tokens == of);
  CHECK(per_head::of_query_heads(of, 4, 1).tokens == std::vector<index_t>{3, 5});  // 2, 3.75
  CHECK(refusal([&] { (void)per_head::of_query_heads(of, 3, 0); }).find("capacities.size = 8") !=
        std::string::npos);
  CHECK(refusal([&] { (void)per_head::of_query_heads(of, 0, 0); }).find("group = 0") !=
        std::string::npos);
}

TEST_CASE("HeadKV's budgets: exact totals, shares within one token of the formula") {
  for_seeds(200, [](generator& g) {
    index_t const heads = g.integer(1, 40), group = g.integer(1, 4), protect = g.integer(0, 9);
    index_t const base = g.integer(1, 3000);
    double const beta = g.one_of(std::array<double, 4>{1, 1.01, 1.5, 7});
    std::vector<double> importance(uz(heads * group));
    for (double& x : importance)
      x = g.chance(0.2F) ? 0 : static_cast<double>(g.uniform()) * (g.chance(0.1F) ? 100 : 1);
    auto const b = headkv_budget({importance, group}, base + protect, protect, beta);
    REQUIRE(b.tokens.size() == uz(heads));
    CHECK(total(b.tokens) == std::int64_t{heads} * (base + protect));
    double const all = std::accumulate(importance.begin(), importance.end(), 0.0);
    double const given = std::floor(base / beta);
    for (index_t h = 0; h < heads; ++h) {
      double own = 0;
      for (index_t i = 0; i < group; ++i) own += importance[uz(h * group + i)];
      double const share = all > 0 ? own / all : 1.0 / heads;
      double const want = base - given + share * given * heads + protect;
      INFO("head " << h << " of " << heads << ", base " << base << ", beta " << beta);
      CHECK(std::abs(b.tokens[uz(h)] - want) <= 1.01);
    }
  });
}

TEST_CASE("HeadKV's budgets: equal, absent and wrong importances") {
  std::vector<double> const equal(12, 0.3), none(12, 0.0);
  CHECK(headkv_budget({equal, 3}, 50, 10).tokens == std::vector<index_t>(4, 50));
  CHECK(headkv_budget({none, 3}, 50, 10).tokens == std::vector<index_t>(4, 50));
  // Tokens of all heads at 128k each: products stay in 63 bits.
  std::vector<double> const large(128 * 128, 1e300);
  CHECK(refusal([&] { (void)headkv_budget({large, 1}, 1 << 17, 32); }) == "accepted");
  std::vector<double> one(128 * 8, 0.0);
  one[5] = 1;
  auto const all = headkv_budget({one, 1}, 1 << 17, 32, 1);
  CHECK(all.tokens[5] == ((1 << 17) - 32) * (128 * 8) + 32);
  auto const bad = [&](double x) {
    std::vector<double> some = equal;
    some[4] = x;
    return refusal([&] { (void)headkv_budget({some, 3}, 50, 10); });
  };
  for (double const x : {-1.0, std::nan(""), HUGE_VAL})
    CHECK(bad(x).find("importance") != std::string::npos);
  CHECK(refusal([&] {
          (void)headkv_budget({equal, 5}, 50, 10);
        }).find("importance.size = 12") != std::string::npos);
  CHECK(refusal([&] {
          (void)headkv_budget({equal, 3}, 10, 10);
        }).find("capacity = 10") != std::string::npos);
  CHECK(refusal([&] {
          (void)headkv_budget({equal, 3}, 50, 10, 0.5);
        }).find("beta") != std::string::npos);
}
