// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// A sequence that starts without a prompt: decoding alone fills the cache and stays within the budget.
#include "support/catch.hpp"

#include <kvkeep/kvkeep.hpp>

#include <vector>

using namespace kvkeep;

TEST_CASE("a sequence may begin with decoding") {
  cache_shape const shape{1, 2, 1, 4, 4, 9};
  std::vector<float> k(9 * 4, 0.0F), v(9 * 4, 1.0F), q(2 * 4, 0.5F), out(2 * 4);
  layer_spec<> const layers[] = {contiguous_view(k.data(), v.data(), shape)};
  cpu::context ctx;
  auto s = bind_session(ctx, make_morphkv({.capacity = 8, .window = 4}),
                        std::span<layer_spec<> const>(layers), limits{});
  index_t id = 0;
  REQUIRE(s.begin(id) == status::ok);
  batch const b{{&id, 1}};
  for (index_t p = 0; p < 40; ++p) {
    INFO("token " << p);
    index_t slot = -1;
    REQUIRE(s.append(0, b, &slot) == status::ok);
    for (index_t d = 0; d < 4; ++d)
      k[static_cast<std::size_t>(slot * 4 + d)] = static_cast<float>((p * 7 + d * 3) % 11) - 5;
    REQUIRE(s.attend(0, b, make_queries(q.data(), 2, 1, 4), out.data()) == status::ok);
    REQUIRE(s.confirm(b, 1) == status::ok);
    REQUIRE(s.verify() == status::ok);
    CHECK(s.lengths(0)(id, 0) == std::min(p + 1, 9));
    for (float const x : out) CHECK(x == Approx(1));
  }
  CHECK(s.count().victims == 32);
  // The prompt's time is over.
  CHECK(s.observe(0, id, make_queries(q.data(), 2, 1, 4)) == status::bad_order);
}
