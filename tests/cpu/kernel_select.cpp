// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
// Order keys, the slot to evict and the k best slots against a full sort.
#include <algorithm>
#include <cfloat>
#include <cmath>
#include <limits>

#include <kvkeep/backend/cpu/kernels/select.hpp>

#include "../support/random.hpp"

namespace {

using namespace kvkeep;
using test::generator;

constexpr float inf = std::numeric_limits<float>::infinity();
constexpr float not_a_number = std::numeric_limits<float>::quiet_NaN();

std::size_t uz(offset_t i) { return static_cast<std::size_t>(i); }

TEST_CASE("order keys are monotone") {
  float const ascending[] = {-inf,   -FLT_MAX, -1.5f, -1.0f, -FLT_MIN, -1e-42f, 0.0f,
                             1e-42f, FLT_MIN,  1.0f,  1.5f,  FLT_MAX,  inf};
  for (std::size_t i = 1; i < std::size(ascending); ++i)
    CHECK(cpu::order_key(ascending[i - 1]) < cpu::order_key(ascending[i]));
  CHECK(cpu::order_key(-0.0f) == cpu::order_key(0.0f));
  CHECK(cpu::order_key(not_a_number) < cpu::order_key(-inf));
  CHECK(cpu::order_key(-not_a_number) == cpu::order_key(not_a_number));
  CHECK(cpu::order_key(not_a_number) > cpu::no_key);
  generator g(1);
  for (int i = 0; i < 10000; ++i) {
    float const x = bit_copy<float>(static_cast<std::uint32_t>(g.next()));
    std::int32_t lane[8];
    cpu::store(lane, cpu::order_key(cpu::splat(x)));
    if (lane[3] != cpu::order_key(x)) FAIL("lanes differ for bits " << bit_copy<std::uint32_t>(x));
  }
}

struct sample {
  std::vector<float> scores;
  std::vector<index_t> positions;
  std::vector<std::uint8_t> allowed;
  std::vector<index_t> best;  ///< candidates, best first

  /// kind 0: uniform, 1: heavy tail, 2: few values with special ones, 3: all equal, 4: any bits,
  /// 5: mostly zero
  sample(generator& g, index_t n, int kind, int order, bool masked) {
    float const few[] = {0.0f, -0.0f, 1.0f, -1.0f, inf, -inf, not_a_number, 0.5f};
    for (index_t j = 0; j < n; ++j)
      scores.push_back(kind == 0   ? g.uniform()
                       : kind == 1 ? std::exp(4 * g.normal())
                       : kind == 2 ? g.one_of(few)
                       : kind == 3 ? 0.25f
                       : kind == 5 ? std::max(0.0f, g.normal() - 1.5f)
                                   : bit_copy<float>(static_cast<std::uint32_t>(g.next())));
    if (order == 1) positions = g.permutation(n, 5);
    if (order == 2)
      for (index_t j = 0; j < n; ++j) positions.push_back(3 * j + 7);
    if (masked)
      for (index_t j = 0; j < n; ++j) allowed.push_back(g.chance(0.7f) ? 3 : 0);
    for (index_t j = 0; j < n; ++j)
      if (!masked || allowed[uz(j)] != 0) best.push_back(j);
    std::sort(best.begin(), best.end(), [&](index_t a, index_t b) {
      std::int32_t const x = cpu::order_key(scores[uz(a)]), y = cpu::order_key(scores[uz(b)]);
      return x != y ? x > y : view().position(a) < view().position(b);
    });
  }
  cpu::candidates view() const {
    return {scores.data(), positions.empty() ? nullptr : positions.data(),
            allowed.empty() ? nullptr : allowed.data(), static_cast<index_t>(scores.size())};
  }
};

void check_selection(sample const& s, index_t k, bool protect) {
  cpu::candidates const c = s.view();
  std::size_t const bytes = cpu::select_scratch_bytes(c.n);
  std::vector<std::uint8_t> keep(uz(c.n) + 1, 9), scratch(bytes + 2, 77);
  // Protected slots come first in what is kept, and are kept even when they are too many.
  std::vector<std::uint8_t> expected(uz(c.n), protect ? 1 : 0);
  for (index_t const j : s.best) expected[uz(j)] = 0;
  auto const candidates = static_cast<index_t>(s.best.size());
  index_t const others = protect ? c.n - candidates : 0;
  index_t const chosen = std::clamp(k - others, 0, candidates), wanted = others + chosen;
  for (index_t i = 0; i < chosen; ++i) expected[uz(s.best[uz(i)])] = 1;

  cpu::keep_test const test = cpu::find_top(c, k, scratch.data() + 1, protect);
  cpu::mark_kept(test, keep.data());
  CHECK(std::equal(expected.begin(), expected.end(), keep.begin()));
  CHECK(keep.back() == 9);
  for (index_t const room : {wanted, wanted / 2}) {
    std::vector<index_t> slots(uz(room) + 1, -5), right;
    for (index_t j = 0; j < c.n && static_cast<index_t>(right.size()) < room; ++j)
      if (expected[uz(j)] != 0) right.push_back(j);
    right.push_back(-5);
    CHECK(cpu::list_kept(test, room, slots.data()) == wanted);
    CHECK(slots == right);
  }
  CHECK(scratch.front() == 77);
  CHECK(scratch.back() == 77);
}

TEST_CASE("the k best and the one to evict, small") {
  for (int kind = 0; kind < 6; ++kind)
    for (int order = 0; order < 3; ++order)
      for (bool masked : {false, true})
        for (index_t n = 0; n <= 40; ++n) {
          INFO("kind " << kind << " order " << order << " masked " << masked << " n " << n);
          generator g(static_cast<std::uint64_t>(n));
          sample const s(g, n, kind, order, masked);
          for (index_t k : {0, 1, n / 2, n - 1, n, n + 3}) check_selection(s, k, k % 2 == 0);
          CHECK(cpu::evict_index(s.view()) == (s.best.empty() ? -1 : s.best.back()));
        }
}

TEST_CASE("the k best and the one to evict, large") {
  for (int kind = 0; kind < 6; ++kind)
    for (int order = 0; order < 3; ++order)
      for (bool masked : {false, true})
        for (index_t n : {511, 512, 1000, 2048, 5003}) {
          INFO("kind " << kind << " order " << order << " masked " << masked << " n " << n);
          generator g(static_cast<std::uint64_t>(n + kind));
          sample const s(g, n, kind, order, masked);
          auto const m = static_cast<index_t>(s.best.size());
          for (index_t k : {1, n / 8, n / 2, m - 1, m}) check_selection(s, k, k % 2 == 0);
          CHECK(cpu::evict_index(s.view()) == s.best.back());
        }
}

TEST_CASE("nothing to evict") {
  float const scores[3] = {1, 2, not_a_number};
  std::uint8_t const allowed[3] = {0, 0, 0};
  CHECK(cpu::evict_index({scores, nullptr, allowed, 3}) == -1);
  CHECK(cpu::evict_index({scores, nullptr, nullptr, 3}) == 2);
  CHECK(cpu::evict_index({}) == -1);
}

}  // namespace
