// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
// Vector primitives, exp, tanh and the step from dot product to logit.
#include <cmath>
#include <limits>

#include <kvkeep/backend/cpu/kernels/math.hpp>

#include "../support/random.hpp"

namespace {

using namespace kvkeep;
using test::generator;

constexpr float inf = std::numeric_limits<float>::infinity();
constexpr float not_a_number = std::numeric_limits<float>::quiet_NaN();

double relative(float x, double expected) { return std::abs(x - expected) / std::abs(expected); }

TEST_CASE("exp is accurate and flushes to zero") {
  double worst = 0;
  for (int i = 0; i <= 2000000; ++i) {
    float const x = -87.3f + 175.5f * static_cast<float>(i) / 2000000;
    worst = std::max(worst, relative(cpu::exp(x), std::exp(static_cast<double>(x))));
  }
  CHECK(worst < 3e-7);
  CHECK(cpu::exp(0.0f) == 1.0f);
  for (float x : {-87.4f, -100.0f, -FLT_MAX, -inf, not_a_number}) CHECK(cpu::exp(x) == 0.0f);
  CHECK(cpu::exp(1e30f) == cpu::exp(89.0f));
  CHECK(std::isfinite(cpu::exp(inf)));
}

TEST_CASE("tanh is accurate and odd") {
  double worst = 0;
  for (int i = 1; i <= 400000; ++i) {
    float const x = 12.0f * static_cast<float>(i) / 400000;
    float const y = cpu::first_lane(cpu::tanh(cpu::splat(x)));
    worst = std::max(worst, relative(y, std::tanh(static_cast<double>(x))));
    if (cpu::first_lane(cpu::tanh(cpu::splat(-x))) != -y) FAIL("not odd at " << x);
  }
  CHECK(worst < 4e-7);
  CHECK(cpu::first_lane(cpu::tanh(cpu::splat(0.0f))) == 0.0f);
  CHECK(cpu::first_lane(cpu::tanh(cpu::splat(1e20f))) == 1.0f);
}

TEST_CASE("logits are scaled, capped and made finite, whatever the length") {
  generator g(3);
  for (float cap : {0.0f, 30.0f, 1e-3f})
    for (index_t n = 0; n <= 40; ++n) {
      std::vector<float> z(static_cast<std::size_t>(n) + 1), expected;
      for (float& x : z) x = 100 * g.normal();
      if (n > 6) z[0] = not_a_number, z[3] = inf, z[6] = -inf;
      if (n > 20) z[19] = -not_a_number, z[20] = 1e38f;
      z.back() = 7;
      for (float x : z) {
        double y = static_cast<double>(x) * 2.5;
        if (cap > 0) y = cap * std::tanh(y / cap);
        y = std::isnan(x) ? -FLT_MAX : std::min(std::max(y, -double(FLT_MAX)), double(FLT_MAX));
        expected.push_back(static_cast<float>(y));
      }
      cpu::finish_logits(z.data(), n, {.scale = 2.5f, .softcap = cap});
      for (std::size_t j = 0; j < static_cast<std::size_t>(n); ++j) {
        INFO("cap " << cap << " n " << n << " j " << j);
        CHECK(z[j] == Approx(expected[j]).epsilon(1e-6));
      }
      CHECK(z.back() == 7);
    }
}

template <class T>
void check_load(T (*convert)(float)) {
  generator g(5);
  std::vector<T> x;
  for (int i = 0; i < 9; ++i) x.push_back(convert(g.normal() * (i % 3 == 0 ? 1e-6f : 3.0f)));
  float full[8], part[8];
  cpu::store(full, cpu::load(x.data() + 1));
  for (std::size_t i = 0; i < 8; ++i) CHECK(full[i] == to_float(x[i + 1]));
  for (index_t n = 0; n <= 8; ++n) {
    cpu::store(part, cpu::load_some(x.data() + 1, n));
    for (index_t i = 0; i < 8; ++i) CHECK(part[i] == (i < n ? full[i] : 0.0f));
    float out[9] = {9, 9, 9, 9, 9, 9, 9, 9, 9};
    cpu::store_some(out, cpu::load(x.data() + 1), n);
    for (index_t i = 0; i < 9; ++i) CHECK(out[i] == (i < n ? full[i] : 9.0f));
  }
}

TEST_CASE("loads convert, also a part of a vector") {
  check_load<float>([](float x) { return x; });
  check_load<fp16>([](float x) { return to_fp16(x); });
  check_load<bf16>([](float x) { return to_bf16(x); });
}

TEST_CASE("horizontal operations and masks") {
  generator g(7);
  float x[64];
  for (float& e : x) e = g.normal();
  cpu::vf r[8], s[8], t[8];
  for (int i = 0; i < 8; ++i) r[i] = s[i] = t[i] = cpu::load(x + 8 * i);
  float sums[8], tops[8], column[8];
  cpu::store(sums, cpu::sum_each(r));
  cpu::store(tops, cpu::max_each(s));
  cpu::transpose8(t);
  for (int i = 0; i < 8; ++i) {
    CHECK(sums[i] == cpu::sum_lanes(cpu::load(x + 8 * i)));
    CHECK(tops[i] == cpu::max_lanes(cpu::load(x + 8 * i)));
    cpu::store(column, t[i]);
    for (int j = 0; j < 8; ++j) CHECK(column[j] == x[8 * j + i]);
  }
  for (unsigned bits = 0; bits < 256; ++bits) CHECK(cpu::lane_bits(cpu::lane_mask(bits)) == bits);
}

}  // namespace
