// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// Integer types, memory spaces, element types and their exact conversions.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "config.hpp"

namespace kvkeep {

using index_t = std::int32_t;   ///< slots, counts, positions, head numbers
using offset_t = std::int64_t;  ///< strides and offsets, in elements (bytes for opaque rows)

/// Memory that the host can read. Memory spaces are part of a view's type.
struct host_space {};
/// Memory that only a device can read.
struct device_space {};

template <class S>
concept memory_space = std::is_same_v<S, host_space> || std::is_same_v<S, device_space>;

/// IEEE binary16, storage only.
struct fp16 {
  std::uint16_t bits;
};
/// Upper half of an IEEE binary32, storage only.
struct bf16 {
  std::uint16_t bits;
};

/// 8 bits as in FP8 caches: sign, 4 bits of exponent (bias 7), 3 of mantissa; no infinities, the largest number is 448.
/// Micikevicius et al., arXiv 2209.05433. Storage only; a scale of the plane is the engine's (see kv_ref).
struct fp8_e4m3 {
  std::uint8_t bits;
};
/// 5 bits of exponent, 2 of mantissa: the upper half of an IEEE binary16. Storage only.
struct fp8_e5m2 {
  std::uint8_t bits;
};

/// Element type of a plane (K or V). `opaque` rows are moved bytewise and read through a row_reader.
enum class dtype : std::uint8_t { f32, f16, bf16, e4m3, e5m2, opaque };

KVKEEP_HD constexpr index_t dtype_bytes(dtype t) noexcept {
  return t == dtype::f32 ? 4 : t == dtype::f16 || t == dtype::bf16 ? 2 : 1;
}

constexpr char const* to_string(dtype t) noexcept {
  constexpr char const* names[] = {"f32", "f16", "bf16", "e4m3", "e5m2", "opaque"};
  return names[static_cast<int>(t)];
}

template <class T>
struct dtype_of;
template <>
struct dtype_of<float> : std::integral_constant<dtype, dtype::f32> {};
template <>
struct dtype_of<fp16> : std::integral_constant<dtype, dtype::f16> {};
template <>
struct dtype_of<bf16> : std::integral_constant<dtype, dtype::bf16> {};
template <>
struct dtype_of<fp8_e4m3> : std::integral_constant<dtype, dtype::e4m3> {};
template <>
struct dtype_of<fp8_e5m2> : std::integral_constant<dtype, dtype::e5m2> {};
template <>
struct dtype_of<std::byte> : std::integral_constant<dtype, dtype::opaque> {};

template <class To, class From>
KVKEEP_HD inline To bit_copy(From const& x) noexcept {
  static_assert(sizeof(To) == sizeof(From));
  To r;
  std::memcpy(&r, &x, sizeof r);
  return r;
}

KVKEEP_HD inline float to_float(float x) noexcept { return x; }

KVKEEP_HD inline float to_float(bf16 x) noexcept {
  return bit_copy<float>(static_cast<std::uint32_t>(x.bits) << 16);
}

KVKEEP_HD inline float to_float(fp16 x) noexcept {
  std::uint32_t const sign = static_cast<std::uint32_t>(x.bits & 0x8000u) << 16;
  std::uint32_t const body = x.bits & 0x7fffu;
  if (body >= 0x7c00u) return bit_copy<float>(sign | 0x7f800000u | ((body & 0x3ffu) << 13));
  // Scaling by 2^112 moves the exponent bias and makes subnormals exact at once.
  float const magnitude = bit_copy<float>(body << 13) * bit_copy<float>(0x77800000u);
  return bit_copy<float>(sign | bit_copy<std::uint32_t>(magnitude));
}

KVKEEP_HD inline float to_float(fp8_e4m3 x) noexcept {
  std::uint32_t const sign = static_cast<std::uint32_t>(x.bits & 0x80u) << 24;
  std::uint32_t const body = x.bits & 0x7fu;
  if (body == 0x7fu) return bit_copy<float>(sign | 0x7fc00000u);
  // As for fp16, by 2^120.
  float const magnitude = bit_copy<float>(body << 20) * bit_copy<float>(0x7b800000u);
  return bit_copy<float>(sign | bit_copy<std::uint32_t>(magnitude));
}

KVKEEP_HD inline float to_float(fp8_e5m2 x) noexcept {
  return to_float(fp16{static_cast<std::uint16_t>(x.bits << 8)});
}

/// Round to nearest even; NaN stays NaN.
KVKEEP_HD inline bf16 to_bf16(float x) noexcept {
  std::uint32_t const u = bit_copy<std::uint32_t>(x);
  if ((u & 0x7fffffffu) > 0x7f800000u) return {static_cast<std::uint16_t>((u >> 16) | 0x40u)};
  return {static_cast<std::uint16_t>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16)};
}

/// Round to nearest even; overflow gives infinity, NaN stays NaN.
KVKEEP_HD inline fp16 to_fp16(float x) noexcept {
  std::uint32_t const u = bit_copy<std::uint32_t>(x);
  std::uint32_t const sign = (u >> 16) & 0x8000u;
  std::uint32_t const a = u & 0x7fffffffu;
  if (a > 0x7f800000u) return {static_cast<std::uint16_t>(sign | 0x7e00u)};
  if (a >= 0x477ff000u) return {static_cast<std::uint16_t>(sign | 0x7c00u)};
  if (a < 0x38800000u) {
    // Adding 0.5 aligns the subnormal's last bit with that of a float in [0.5, 1).
    float const r = bit_copy<float>(a) + 0.5f;
    return {static_cast<std::uint16_t>(sign | (bit_copy<std::uint32_t>(r) - 0x3f000000u))};
  }
  std::uint32_t const r = a + 0xfffu + ((a >> 13) & 1u) - 0x38000000u;
  return {static_cast<std::uint16_t>(sign | (r >> 13))};
}

namespace detail {

struct fp8_format {
  int dropped;            ///< bits of a float's mantissa that it lacks
  std::uint32_t offset;   ///< difference of the exponents' biases, as bits of a float
  std::uint32_t aligned;  ///< bits of the float whose last bit is worth the smallest number
  std::uint32_t largest;  ///< bits of the largest number
};

KVKEEP_HD inline std::uint8_t to_fp8(float x, fp8_format const& f) noexcept {
  std::uint32_t const u = bit_copy<std::uint32_t>(x), a = u & 0x7fffffffu;
  std::uint32_t r = 0x7fu;
  if (a < f.offset + (1u << 23))
    r = bit_copy<std::uint32_t>(bit_copy<float>(a) + bit_copy<float>(f.aligned)) - f.aligned;
  else if (a <= 0x7f800000u)
    r = (a - f.offset + (1u << (f.dropped - 1)) - 1 + ((a >> f.dropped) & 1u)) >> f.dropped;
  if (a <= 0x7f800000u && r > f.largest) r = f.largest;
  return static_cast<std::uint8_t>(((u >> 24) & 0x80u) | r);
}

}  // namespace detail

/// Round to nearest even; what is larger than 448, infinities too, becomes that; NaN stays NaN.
KVKEEP_HD inline fp8_e4m3 to_e4m3(float x) noexcept {
  return {detail::to_fp8(x, {20, 120u << 23, 0x46800000u, 0x7eu})};
}
/// The same, up to 57344.
KVKEEP_HD inline fp8_e5m2 to_e5m2(float x) noexcept {
  return {detail::to_fp8(x, {21, 112u << 23, 0x43000000u, 0x7bu})};
}

/// Sizes of one layer's cache. All counts; `max_slots` bounds every length.
struct cache_shape {
  index_t n_seq = 0;  ///< rows of the cache (sequences it can hold)
  index_t n_q_heads =
      0;  ///< query heads, a multiple of n_kv_heads; head h reads KV head h / group()
  index_t n_kv_heads = 0;  ///< KV heads
  index_t dim_k = 0;       ///< features of a key row
  index_t dim_v = 0;       ///< features of a value row
  index_t max_slots = 0;   ///< slots per sequence and KV head

  KVKEEP_HD constexpr index_t group() const noexcept { return n_q_heads / n_kv_heads; }
  friend bool operator==(cache_shape const&, cache_shape const&) = default;
};

}  // namespace kvkeep
