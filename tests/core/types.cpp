// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
// Exact conversions of the types of 16 and 8 bits against rounding in double, and the shape.
#include <kvkeep/core/types.hpp>

#include <cmath>
#include <limits>

#include "../support/random.hpp"

namespace {

using namespace kvkeep;

struct format {
  int bits;
  int mantissa;      // stored bits
  int min_exponent;  // of the smallest normal number
  double largest;
  bool infinities = true;  // else the last exponent has numbers, and one NaN
  bool saturates = false;  // what is too large becomes the largest number

  unsigned body() const { return (1U << (bits - 1)) - 1; }
};
constexpr format half_format{16, 10, -14, 65504};
constexpr format brain_format{16, 7, -126, 0x1.fep127};
constexpr format e4m3_format{8, 3, -6, 448, false, true};
constexpr format e5m2_format{8, 2, -14, 57344, true, true};

/// Value of a bit pattern, by definition.
double decode(unsigned bits, format f) {
  unsigned const mantissa = bits & ((1U << f.mantissa) - 1), body = bits & f.body();
  int const exponent = static_cast<int>(body >> f.mantissa);
  double const sign = bits > f.body() ? -1 : 1;
  if (!f.infinities && body == f.body()) return std::numeric_limits<double>::quiet_NaN();
  if (f.infinities && body >> f.mantissa == f.body() >> f.mantissa)
    return mantissa ? std::numeric_limits<double>::quiet_NaN()
                    : sign * std::numeric_limits<double>::infinity();
  double const fraction = std::ldexp(mantissa, -f.mantissa);
  if (exponent == 0) return sign * std::ldexp(fraction, f.min_exponent);
  return sign * std::ldexp(1 + fraction, exponent - 1 + f.min_exponent);
}

/// Nearest representable value, ties to even.
double nearest(double x, format f) {
  double const most = f.saturates ? f.largest : std::numeric_limits<double>::infinity();
  if (std::isinf(x)) return std::copysign(most, x);
  if (!std::isfinite(x) || x == 0) return x;
  int const exponent = std::max(std::ilogb(x), f.min_exponent);
  double const unit = std::ldexp(1.0, exponent - f.mantissa);
  double const rounded = std::nearbyint(x / unit) * unit;
  return std::abs(rounded) > f.largest ? std::copysign(most, x) : rounded;
}

bool same(double a, double b) {
  return (std::isnan(a) && std::isnan(b)) || (a == b && std::signbit(a) == std::signbit(b));
}

template <class T>
T narrow(float x) {
  if constexpr (std::is_same_v<T, fp16>)
    return to_fp16(x);
  else if constexpr (std::is_same_v<T, bf16>)
    return to_bf16(x);
  else if constexpr (std::is_same_v<T, fp8_e4m3>)
    return to_e4m3(x);
  else
    return to_e5m2(x);
}

template <class T>
bool rounds_right(float x, format f) {
  return same(static_cast<double>(to_float(narrow<T>(x))), nearest(static_cast<double>(x), f));
}

template <class T>
void check_format(format f) {
  int wrong_decode = 0, wrong_round_trip = 0, wrong_rounding = 0;
  for (unsigned bits = 0; bits <= 2 * f.body() + 1; ++bits) {
    T const x{static_cast<decltype(T::bits)>(bits)};
    float const value = to_float(x);
    wrong_decode += !same(static_cast<double>(value), decode(x.bits, f));
    T const back = narrow<T>(value);
    bool const returns = std::isnan(value) ? std::isnan(to_float(back))
                         : std::isinf(value) && f.saturates
                             ? same(to_float(back), nearest(value, f))
                             : back.bits == x.bits;
    wrong_round_trip += !returns;
    // The point halfway to the next value, and the floats on its two sides.
    if ((bits & f.body()) == f.body()) continue;
    double const next = decode(bits + 1, f);
    double const middle = decode(x.bits, f) / 2 + next / 2;
    if (!std::isfinite(middle)) continue;
    auto const m = static_cast<float>(middle);
    float const inf = std::numeric_limits<float>::infinity();
    for (float y : {m, std::nextafter(m, inf), std::nextafter(m, -inf)})
      wrong_rounding += !rounds_right<T>(y, f);
  }
  CHECK(wrong_decode == 0);
  CHECK(wrong_round_trip == 0);
  CHECK(wrong_rounding == 0);
}

template <class T>
void check_samples(format f) {
  test::for_seeds(1, [&](test::generator& g) {
    int wrong = 0;
    for (int i = 0; i < 1000000; ++i)
      wrong += !rounds_right<T>(bit_copy<float>(static_cast<std::uint32_t>(g.next())), f);
    CHECK(wrong == 0);
  });
}

}  // namespace

TEST_CASE("fp16 converts exactly, for every bit pattern and every rounding boundary") {
  check_format<fp16>(half_format);
  check_samples<fp16>(half_format);
}

TEST_CASE("bf16 converts exactly, for every bit pattern and every rounding boundary") {
  check_format<bf16>(brain_format);
  check_samples<bf16>(brain_format);
}

TEST_CASE("FP8 converts exactly, for every bit pattern and every rounding boundary") {
  check_format<fp8_e4m3>(e4m3_format);
  check_samples<fp8_e4m3>(e4m3_format);
  check_format<fp8_e5m2>(e5m2_format);
  check_samples<fp8_e5m2>(e5m2_format);
}

TEST_CASE("FP8 keeps signs and NaN, and saturates") {
  float const inf = std::numeric_limits<float>::infinity();
  float const nan = std::numeric_limits<float>::quiet_NaN();
  CHECK(to_e4m3(-0.0F).bits == 0x80);
  CHECK(to_e5m2(-0.0F).bits == 0x80);
  CHECK(to_float(to_e4m3(464.0F)) == 448);
  CHECK(to_float(to_e4m3(-inf)) == -448);
  CHECK(to_float(to_e5m2(inf)) == 57344);
  CHECK(to_float(fp8_e5m2{0x7c}) == inf);
  CHECK(to_float(to_e4m3(0x1p-9F)) == 0x1p-9F);
  CHECK(to_float(to_e4m3(0x1p-10F)) == 0);
  for (float const x : {nan, -nan, bit_copy<float>(0x7f800001u)}) {
    CHECK(std::isnan(to_float(to_e4m3(x))));
    CHECK(std::isnan(to_float(to_e5m2(x))));
  }
}

TEST_CASE("16-bit conversions keep signs, infinities and NaN") {
  float const inf = std::numeric_limits<float>::infinity();
  float const nan = std::numeric_limits<float>::quiet_NaN();
  CHECK(to_fp16(-0.0F).bits == 0x8000);
  CHECK(to_bf16(-0.0F).bits == 0x8000);
  CHECK(to_float(to_fp16(65519.0F)) == 65504.0F);
  CHECK(to_float(to_fp16(65520.0F)) == inf);
  CHECK(to_float(to_fp16(-1e30F)) == -inf);
  CHECK(to_float(to_bf16(std::numeric_limits<float>::max())) == inf);
  CHECK(to_float(to_fp16(0x1p-24F)) == 0x1p-24F);
  CHECK(to_float(to_fp16(0x1p-25F)) == 0);
  CHECK(to_float(to_fp16(0x1.8p-25F)) == 0x1p-24F);
  CHECK(std::isnan(to_float(to_fp16(nan))));
  CHECK(std::isnan(to_float(to_bf16(nan))));
  // A NaN whose upper payload bits are zero must not become an infinity.
  CHECK(std::isnan(to_float(to_bf16(bit_copy<float>(0x7f800001u)))));
  CHECK(std::isnan(to_float(to_fp16(bit_copy<float>(0xff800001u)))));
}

TEST_CASE("dtype names, sizes and the map from C++ types") {
  CHECK(dtype_bytes(dtype::f32) == 4);
  CHECK(dtype_bytes(dtype::f16) == 2);
  CHECK(dtype_bytes(dtype::bf16) == 2);
  CHECK(dtype_bytes(dtype::e4m3) == 1);
  CHECK(dtype_bytes(dtype::e5m2) == 1);
  CHECK(dtype_bytes(dtype::opaque) == 1);
  CHECK(std::string(to_string(dtype::f32)) == "f32");
  CHECK(std::string(to_string(dtype::e5m2)) == "e5m2");
  CHECK(std::string(to_string(dtype::bf16)) == "bf16");
  CHECK(std::string(to_string(dtype::opaque)) == "opaque");
  STATIC_REQUIRE(dtype_of<float>::value == dtype::f32);
  STATIC_REQUIRE(dtype_of<fp16>::value == dtype::f16);
  STATIC_REQUIRE(dtype_of<bf16>::value == dtype::bf16);
  STATIC_REQUIRE(dtype_of<fp8_e4m3>::value == dtype::e4m3);
  STATIC_REQUIRE(dtype_of<fp8_e5m2>::value == dtype::e5m2);
  STATIC_REQUIRE(dtype_of<std::byte>::value == dtype::opaque);
  STATIC_REQUIRE(sizeof(fp16) == 2);
  STATIC_REQUIRE(sizeof(bf16) == 2);
}

TEST_CASE("the group is the number of query heads per KV head") {
  cache_shape s;
  s.n_q_heads = 12;
  s.n_kv_heads = 3;
  CHECK(s.group() == 4);
  cache_shape t = s;
  CHECK(s == t);
  t.dim_v = 1;
  CHECK(!(s == t));
}
