// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
// Strided references: offsets by the naive formula, broadcast, constness, memory space in the type.
#include <kvkeep/core/tensor_ref.hpp>

#include <limits>

#include "../support/random.hpp"

namespace {
using namespace kvkeep;
}

TEST_CASE("row_major places the last axis contiguously") {
  test::for_seeds(20, [](test::generator& g) {
    index_t const a = g.integer(1, 5), b = g.integer(1, 6), c = g.integer(1, 7);
    std::vector<int> data(static_cast<std::size_t>(a * b * c));
    auto const t = row_major(data.data(), a, b, c);
    CHECK((t.extent[0] == a && t.extent[1] == b && t.extent[2] == c));
    int n = 0;
    for (index_t i = 0; i < a; ++i)
      for (index_t j = 0; j < b; ++j)
        for (index_t k = 0; k < c; ++k) t(i, j, k) = n++;
    for (std::size_t i = 0; i < data.size(); ++i) REQUIRE(data[i] == static_cast<int>(i));
  });
}

TEST_CASE("offsets follow the strides, also zero and negative ones and leading indices") {
  test::for_seeds(50, [](test::generator& g) {
    tensor_ref<float, 4> t;
    for (int a = 0; a < 4; ++a) {
      t.extent[a] = g.integer(1, 100);
      t.stride[a] = g.integer(-1000, 1000);
    }
    index_t i[4];
    for (int a = 0; a < 4; ++a) i[a] = g.integer(0, t.extent[a] - 1);
    offset_t naive[4];
    offset_t sum = 0;
    for (int a = 0; a < 4; ++a) naive[a] = sum += i[a] * t.stride[a];
    CHECK(t.offset(i[0]) == naive[0]);
    CHECK(t.offset(i[0], i[1]) == naive[1]);
    CHECK(t.offset(i[0], i[1], i[2]) == naive[2]);
    CHECK(t.offset(i[0], i[1], i[2], i[3]) == naive[3]);
  });
}

TEST_CASE("offsets do not overflow 32 bits") {
  tensor_ref<float, 3> t;
  t.stride[0] = offset_t{1} << 30;
  t.stride[1] = 3'000'000'000;
  t.stride[2] = 1;
  CHECK(t.offset(3, 2, 1) == 3 * (offset_t{1} << 30) + 6'000'000'001);
  CHECK(t.offset(std::numeric_limits<index_t>::max(), 0, 0) ==
        std::numeric_limits<index_t>::max() * (offset_t{1} << 30));
}

TEST_CASE("a stride of zero broadcasts") {
  float x[] = {1, 2, 3};
  tensor_ref<float, 2> t;
  t.data = x;
  t.extent[0] = 5;
  t.extent[1] = 3;
  t.stride[1] = 1;
  CHECK(t(4, 2) == 3);
  CHECK(t.at(3) == x);
  CHECK(t.at(3, 1) == x + 1);
}

TEST_CASE("a mutable reference converts to a constant one of the same space, never back") {
  float x[6] = {0, 1, 2, 3, 4, 5};
  tensor_ref<float, 2> const t = row_major(x, 2, 3);
  tensor_ref<float const, 2> const c = t;
  CHECK(c.data == x);
  CHECK(c(1, 2) == 5);
  CHECK((c.extent[0] == 2 && c.extent[1] == 3 && c.stride[0] == 3 && c.stride[1] == 1));
  STATIC_REQUIRE_FALSE(std::is_convertible_v<tensor_ref<float const, 2>, tensor_ref<float, 2>>);
  STATIC_REQUIRE_FALSE(
      std::is_convertible_v<tensor_ref<float, 2, device_space>, tensor_ref<float, 2, host_space>>);
  STATIC_REQUIRE_FALSE(std::is_convertible_v<tensor_ref<float, 2, device_space>,
                                             tensor_ref<float const, 2, host_space>>);
  STATIC_REQUIRE(std::is_trivially_copyable_v<tensor_ref<float, 4>>);
}

TEST_CASE("a default reference is null and empty") {
  tensor_ref<float, 2> const t;
  CHECK_FALSE(t);
  CHECK((t.extent[0] == 0 && t.extent[1] == 0));
  float x = 0;
  CHECK(row_major(&x, 1));
}
