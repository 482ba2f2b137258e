// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// The vectors of simd.hpp as loops over eight elements, for compilers that do not target AVX2.
/// They vectorise them with what they have.
#pragma once

#include <cstdint>
#include <cstring>

#include "../../core/types.hpp"

namespace kvkeep::cpu {
inline namespace isa_generic {

/// 8 floats
struct vf {
  float v[8];
};
/// 8 integers; as a mask every lane is 0 or -1
struct vi {
  std::int32_t v[8];
};

/// Lane i of the result is f(i).
template <class V, class F>
inline V each(F f) noexcept {
  V r;
  for (int i = 0; i < 8; ++i) r.v[i] = f(i);
  return r;
}

inline vf splat(float x) noexcept {
  return each<vf>([=](int) { return x; });
}
inline vi splat(std::int32_t x) noexcept {
  return each<vi>([=](int) { return x; });
}
template <class T>
inline vf load(T const* p) noexcept {
  return each<vf>([=](int i) { return to_float(p[i]); });
}
inline vi load(std::int32_t const* p) noexcept {
  return each<vi>([=](int i) { return p[i]; });
}
inline void store(float* p, vf const& a) noexcept { std::memcpy(p, a.v, sizeof a.v); }
inline void store(std::int32_t* p, vi const& a) noexcept { std::memcpy(p, a.v, sizeof a.v); }

#define KVKEEP_LANEWISE(name, V, R, expression)    \
  inline R name(V const& p, V const& q) noexcept { \
    return each<R>([&](int i) {                    \
      auto const a = p.v[i], b = q.v[i];           \
      return expression;                           \
    });                                            \
  }
KVKEEP_LANEWISE(operator+, vf, vf, a + b)
KVKEEP_LANEWISE(operator-, vf, vf, a - b)
KVKEEP_LANEWISE(operator*, vf, vf, a* b)
KVKEEP_LANEWISE(operator/, vf, vf, a / b)
KVKEEP_LANEWISE(max, vf, vf, a > b ? a : b)
KVKEEP_LANEWISE(min, vf, vf, a < b ? a : b)
KVKEEP_LANEWISE(at_least, vf, vi, -static_cast<std::int32_t>(a >= b))
KVKEEP_LANEWISE(operator+, vi, vi, static_cast<std::int32_t>(unsigned(a) + unsigned(b)))
KVKEEP_LANEWISE(operator-, vi, vi, static_cast<std::int32_t>(unsigned(a) - unsigned(b)))
KVKEEP_LANEWISE(operator&, vi, vi, a& b)
KVKEEP_LANEWISE(operator|, vi, vi, a | b)
KVKEEP_LANEWISE(operator^, vi, vi, a ^ b)
KVKEEP_LANEWISE(max, vi, vi, a > b ? a : b)
KVKEEP_LANEWISE(min, vi, vi, a < b ? a : b)
KVKEEP_LANEWISE(greater, vi, vi, -static_cast<std::int32_t>(a > b))
KVKEEP_LANEWISE(equal, vi, vi, -static_cast<std::int32_t>(a == b))
#undef KVKEEP_LANEWISE

// Two roundings without a fused instruction; std::fma would be a library call per lane.
inline vf fma(vf const& a, vf const& b, vf const& c) noexcept { return a * b + c; }
inline vf fnma(vf const& a, vf const& b, vf const& c) noexcept { return c - a * b; }
inline vf sqrt(vf const& a) noexcept {
  return each<vf>([&](int i) { return __builtin_sqrtf(a.v[i]); });
}
template <int N>
inline vi shift_left(vi const& a) noexcept {
  return each<vi>([&](int i) { return static_cast<std::int32_t>(unsigned(a.v[i]) << N); });
}
template <int N>
inline vi shift_right(vi const& a) noexcept {
  return each<vi>([&](int i) { return a.v[i] >> N; });
}
inline vi bits_of(vf const& a) noexcept { return bit_copy<vi>(a); }
inline vf float_of_bits(vi const& a) noexcept { return bit_copy<vf>(a); }
inline vi round_to_int(vf const& a) noexcept {
  return each<vi>(
      [&](int i) { return static_cast<std::int32_t>(a.v[i] + (a.v[i] < 0 ? -0.5f : 0.5f)); });
}
inline vf convert(vi const& a) noexcept {
  return each<vf>([&](int i) { return static_cast<float>(a.v[i]); });
}
inline vi select(vi const& m, vi const& a, vi const& b) noexcept {
  return each<vi>([&](int i) { return (a.v[i] & m.v[i]) | (b.v[i] & ~m.v[i]); });
}
inline vf select(vi const& m, vf const& a, vf const& b) noexcept {
  return float_of_bits(select(m, bits_of(a), bits_of(b)));
}
inline unsigned lane_bits(vi const& m) noexcept {
  unsigned r = 0;
  for (int i = 0; i < 8; ++i) r |= (unsigned(m.v[i]) >> 31) << i;
  return r;
}
inline vi lane_mask(unsigned bits) noexcept {
  return each<vi>([=](int i) { return -static_cast<std::int32_t>((bits >> i) & 1u); });
}
inline vi load_bytes(std::uint8_t const* p) noexcept {
  return each<vi>([=](int i) { return static_cast<std::int32_t>(p[i]); });
}
inline vf const& held(vf const& a) noexcept { return a; }
inline void prefetch(void const*) noexcept {}

inline void transpose8(vf (&r)[8]) noexcept {
  for (int i = 0; i < 8; ++i)
    for (int j = 0; j < i; ++j) {
      float const t = r[i].v[j];
      r[i].v[j] = r[j].v[i];
      r[j].v[i] = t;
    }
}

}  // namespace isa_generic
}  // namespace kvkeep::cpu
