// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
// The exact integer split against the naive one: sums, caps, order of remainders, large products.
#include <kvkeep/budget/apportion.hpp>

#include "../support/catch.hpp"
#include "../support/oracle_budget.hpp"
#include "../support/random.hpp"

using namespace kvkeep;

namespace {

oracle::counts split(offset_t total, oracle::counts const& weights, oracle::counts const& caps) {
  auto const n = static_cast<index_t>(caps.size());
  oracle::counts part(caps.size(), -7);
  std::vector<offset_t> remainder(caps.size());
  apportion(total, weights.data(), caps.data(), n, part.data(), remainder.data());
  return part;
}

}  // namespace

TEST_CASE("apportion follows the specification") {
  CHECK(split(10, {1, 1, 1}, {100, 100, 100}) == oracle::counts{4, 3, 3});
  CHECK(split(10, {0, 0, 0}, {100, 100, 100}) == oracle::counts{4, 3, 3});
  CHECK(split(10, {1, 0, 0}, {4, 100, 100}) == oracle::counts{4, 3, 3});
  CHECK(split(100, {5, 1, 3}, {2, 3, 4}) == oracle::counts{2, 3, 4});
  CHECK(split(0, {5, 1, 3}, {2, 3, 4}) == oracle::counts{0, 0, 0});
  CHECK(split(-4, {5, 1, 3}, {2, 3, 4}) == oracle::counts{0, 0, 0});
  CHECK(split(5, {7, 7}, {0, 9}) == oracle::counts{0, 5});
  CHECK(split(5, {0, 7}, {9, 0}) == oracle::counts{5, 0});
  CHECK(split(1000000000, {2000000000, 1000000000, 1}, {2000000000, 2000000000, 2000000000}) ==
        oracle::counts{666666667, 333333333, 0});
}

TEST_CASE("apportion equals the naive split, sums exactly and respects every cap") {
  test::for_seeds(400, [](test::generator& g) {
    index_t const n = g.integer(1, 12), kind = g.integer(0, 3);
    oracle::counts weights, caps;
    for (index_t i = 0; i < n; ++i) {
      weights.push_back(kind == 0 ? 0 : g.integer(0, kind == 1 ? 3 : 5000));
      caps.push_back(g.chance(0.2F) ? 0 : g.integer(0, kind == 2 ? 5 : 400));
    }
    offset_t const total = g.integer(-5, 1200);
    auto const part = split(total, weights, caps);
    CHECK(part == oracle::apportion(total, weights, caps));
    CHECK(oracle::total(part) == std::clamp<std::int64_t>(total, 0, oracle::total(caps)));
    for (std::size_t i = 0; i < caps.size(); ++i) CHECK((part[i] >= 0 && part[i] <= caps[i]));
  });
}
