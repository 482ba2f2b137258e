// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
// Slots in the order of their positions, whatever these are.
#include <kvkeep/backend/cpu/pool.hpp>

#include "../support/catch.hpp"
#include "../support/random.hpp"

using namespace kvkeep;

TEST_CASE("slots are sorted by positions that are near or far apart") {
  test::for_seeds(200, [](test::generator& g) {
    index_t const n = g.integer(0, 600);
    index_t const step = g.one_of(std::array<index_t, 4>{1, 7, 300, 400000});
    std::vector<index_t> positions(cpu::size_of(n)), want(cpu::size_of(n)),
        list(cpu::size_of(2 * n));
    index_t next = g.one_of(std::array<index_t, 3>{0, 200, 1900000000});
    for (index_t& p : positions) p = next, next += g.integer(1, step);
    if (g.chance(0.9F)) g.shuffle(positions);
    for (index_t j = 0; j < n; ++j) want[cpu::size_of(j)] = j;
    std::sort(want.begin(), want.end(), [&](index_t a, index_t b) {
      return positions[cpu::size_of(a)] < positions[cpu::size_of(b)];
    });
    index_t const* const got = cpu::position_order(positions.data(), n, list.data());
    if (got == nullptr)
      CHECK(std::is_sorted(positions.begin(), positions.end()));
    else
      CHECK(std::equal(want.begin(), want.end(), got));
  });
}
