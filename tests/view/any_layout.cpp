// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
// The test caches themselves: rows do not overlap, content survives, canaries notice stray writes.
#include "../support/any_layout.hpp"

#include <kvkeep/view/check.hpp>

namespace {

using namespace kvkeep;
using test::generator;

float rounded(float x, dtype type) {
  return type == dtype::f16    ? to_float(to_fp16(x))
         : type == dtype::bf16 ? to_float(to_bf16(x))
         : type == dtype::e4m3 ? to_float(to_e4m3(x))
         : type == dtype::e5m2 ? to_float(to_e5m2(x))
                               : x;
}

bool close_to(std::vector<float> const& stored, std::vector<float> const& x, dtype type) {
  float largest = 0;
  for (float e : x) largest = std::max(largest, std::abs(e));
  for (std::size_t d = 0; d < x.size(); ++d) {
    if (type == dtype::opaque ? std::abs(stored[d] - x[d]) > largest / 253
                              : stored[d] != rounded(x[d], type))
      return false;
  }
  return stored.size() == x.size();
}

}  // namespace

TEST_CASE("a test cache keeps every row apart, in every layout and type") {
  cache_shape const shape{2, 4, 2, 9, 6, 11};
  for (test::layout_id const layout : test::all_layouts())
    for (dtype const type : test::all_dtypes()) {
      INFO(layout << " " << type);
      auto cache = test::test_cache::make(layout, type, shape, 3);
      CHECK_NOTHROW(check_view(cache.ref()));
      cache.fill(7);
      generator g(7);
      bool all = true;
      for (index_t s = 0; s < 2; ++s)
        for (index_t h = 0; h < 2; ++h)
          for (index_t t = 0; t < 11; ++t) {
            auto const k = g.normals(9), v = g.normals(6);
            all = all && close_to(cache.get_k(s, h, t), k, type);
            all = all && close_to(cache.get_v(s, h, t), v, type);
          }
      CHECK(all);
      CHECK(cache.canaries_intact());
    }
}

TEST_CASE("ragged planes take capacities of their own, zero included") {
  test::cache_options o;
  o.layout = test::layout_id::ragged;
  o.shape = {2, 2, 2, 3, 5, 6};
  o.capacities = {6, 0, 2, 5};
  test::test_cache cache(o);
  CHECK_NOTHROW(check_view(cache.ref()));
  cache.fill(1);
  CHECK(cache.capacity(0, 1) == 0);
  CHECK(cache.capacity(1, 1) == 5);
  CHECK(cache.canaries_intact());
}

TEST_CASE("a stray byte outside the rows is noticed, rows may be moved bytewise") {
  for (test::layout_id const layout : {test::layout_id::padded, test::layout_id::paged,
                                       test::layout_id::ragged, test::layout_id::tiled}) {
    auto cache = test::test_cache::make(layout, dtype::f16, {1, 2, 2, 8, 8, 6}, 5);
    cache.fill(1);
    auto const row = cache.k().raw(0, 1, 2);
    cache.k().set_raw(0, 0, 4, row);
    CHECK(cache.get_k(0, 0, 4) == cache.get_k(0, 1, 2));
    CHECK(cache.canaries_intact());
    auto const last = cache.k().bytes().size() - 1;
    const_cast<std::byte&>(cache.k().bytes()[last]) = std::byte{0};
    CHECK_FALSE(cache.canaries_intact());
  }
}
