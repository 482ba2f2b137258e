// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// Eight-lane vectors of the CPU backend: the only file with vector types. AVX2, FMA and F16C where the compiler
/// targets them (and AVX-512 for pairs of them), else the loops of simd_plain.hpp. Loads and stores need no alignment.
/// Horizontal operations use one fixed tree, so a result does not depend on who asks for it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "../../core/config.hpp"
#include "../../core/types.hpp"

#if KVKEEP_CPU_AVX2
#include <immintrin.h>
#else
#include "simd_plain.hpp"
#endif

/// In front of a short loop over an array of vectors: the array must live in registers, also at
/// -O2.
#if defined(__GNUC__) && !defined(__clang__) && !defined(__CUDACC__)
#define KVKEEP_CPU_UNROLL _Pragma("GCC unroll 16")
#else
#define KVKEEP_CPU_UNROLL
#endif

namespace kvkeep::cpu {
inline namespace KVKEEP_CPU_ISA {

inline constexpr index_t lanes = 8;  ///< floats per vector

#if KVKEEP_CPU_AVX2

/// 8 floats
struct vf {
  __m256 v;
};
/// 8 integers; as a mask every lane is 0 or -1
struct vi {
  __m256i v;
};

inline vf splat(float x) noexcept { return {_mm256_set1_ps(x)}; }
inline vi splat(std::int32_t x) noexcept { return {_mm256_set1_epi32(x)}; }
inline vf load(float const* p) noexcept { return {_mm256_loadu_ps(p)}; }
inline vi load(std::int32_t const* p) noexcept {
  return {_mm256_loadu_si256(reinterpret_cast<__m256i const*>(p))};
}
inline void store(float* p, vf a) noexcept { _mm256_storeu_ps(p, a.v); }
inline void store(std::int32_t* p, vi a) noexcept {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), a.v);
}
inline vf load(fp16 const* p) noexcept {
  return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<__m128i const*>(p)))};
}
inline vf load(bf16 const* p) noexcept {
  __m128i const h = _mm_loadu_si128(reinterpret_cast<__m128i const*>(p));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16))};
}
/// Eight bytes as 16-bit numbers.
inline __m128i load_narrow(void const* p) noexcept {
  return _mm_cvtepu8_epi16(_mm_loadl_epi64(static_cast<__m128i const*>(p)));
}
inline vf load(fp8_e5m2 const* p) noexcept {
  return {_mm256_cvtph_ps(_mm_slli_epi16(load_narrow(p), 8))};
}
/// By fp16: the exponent there says 2^8 less, for subnormal numbers too. NaN is set apart.
inline vf load(fp8_e4m3 const* p) noexcept {
  __m128i const x = load_narrow(p), body = _mm_and_si128(x, _mm_set1_epi16(0x7f));
  __m128i const sign = _mm_slli_epi16(_mm_xor_si128(x, body), 8);
  __m128i const nan = _mm_cmpeq_epi16(body, _mm_set1_epi16(0x7f));
  __m128i const half =
      _mm_or_si128(_mm_slli_epi16(body, 7), _mm_and_si128(nan, _mm_set1_epi16(0x7e00)));
  return {_mm256_mul_ps(_mm256_cvtph_ps(_mm_or_si128(half, sign)), _mm256_set1_ps(256))};
}

inline vf operator+(vf a, vf b) noexcept { return {_mm256_add_ps(a.v, b.v)}; }
inline vf operator-(vf a, vf b) noexcept { return {_mm256_sub_ps(a.v, b.v)}; }
inline vf operator*(vf a, vf b) noexcept { return {_mm256_mul_ps(a.v, b.v)}; }
inline vf operator/(vf a, vf b) noexcept { return {_mm256_div_ps(a.v, b.v)}; }
/// a * b + c
inline vf fma(vf a, vf b, vf c) noexcept { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
/// c - a * b
inline vf fnma(vf a, vf b, vf c) noexcept { return {_mm256_fnmadd_ps(a.v, b.v, c.v)}; }
inline vf max(vf a, vf b) noexcept { return {_mm256_max_ps(a.v, b.v)}; }
inline vf min(vf a, vf b) noexcept { return {_mm256_min_ps(a.v, b.v)}; }
inline vf sqrt(vf a) noexcept { return {_mm256_sqrt_ps(a.v)}; }

inline vi operator+(vi a, vi b) noexcept { return {_mm256_add_epi32(a.v, b.v)}; }
inline vi operator&(vi a, vi b) noexcept { return {_mm256_and_si256(a.v, b.v)}; }
inline vi operator|(vi a, vi b) noexcept { return {_mm256_or_si256(a.v, b.v)}; }
inline vi operator^(vi a, vi b) noexcept { return {_mm256_xor_si256(a.v, b.v)}; }
inline vi operator-(vi a, vi b) noexcept { return {_mm256_sub_epi32(a.v, b.v)}; }
inline vi min(vi a, vi b) noexcept { return {_mm256_min_epi32(a.v, b.v)}; }
inline vi max(vi a, vi b) noexcept { return {_mm256_max_epi32(a.v, b.v)}; }
template <int N>
inline vi shift_left(vi a) noexcept {
  vi r;  // nvcc cannot read a braced intrinsic in a template
  r.v = _mm256_slli_epi32(a.v, N);
  return r;
}
/// Arithmetic: the sign fills in.
template <int N>
inline vi shift_right(vi a) noexcept {
  vi r;
  r.v = _mm256_srai_epi32(a.v, N);
  return r;
}
inline vi greater(vi a, vi b) noexcept { return {_mm256_cmpgt_epi32(a.v, b.v)}; }
inline vi equal(vi a, vi b) noexcept { return {_mm256_cmpeq_epi32(a.v, b.v)}; }
/// a >= b, false for NaN.
inline vi at_least(vf a, vf b) noexcept {
  return {_mm256_castps_si256(_mm256_cmp_ps(a.v, b.v, _CMP_GE_OQ))};
}

inline vi bits_of(vf a) noexcept { return {_mm256_castps_si256(a.v)}; }
inline vf float_of_bits(vi a) noexcept { return {_mm256_castsi256_ps(a.v)}; }
/// Nearest integer; the argument must be in range.
inline vi round_to_int(vf a) noexcept { return {_mm256_cvtps_epi32(a.v)}; }
inline vf convert(vi a) noexcept { return {_mm256_cvtepi32_ps(a.v)}; }
/// m ? a : b
inline vf select(vi m, vf a, vf b) noexcept {
  return {_mm256_blendv_ps(b.v, a.v, _mm256_castsi256_ps(m.v))};
}
inline vi select(vi m, vi a, vi b) noexcept { return {_mm256_blendv_epi8(b.v, a.v, m.v)}; }
/// Bit i is set where lane i of the mask is.
inline unsigned lane_bits(vi m) noexcept {
  return static_cast<unsigned>(_mm256_movemask_ps(_mm256_castsi256_ps(m.v)));
}
/// The mask whose lane i is bit i of `bits`.
inline vi lane_mask(unsigned bits) noexcept {
  vi const bit{_mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128)};
  return equal(splat(static_cast<std::int32_t>(bits)) & bit, bit);
}
/// Eight bytes as lanes, zero-extended.
inline vi load_bytes(std::uint8_t const* p) noexcept {
  return {_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<__m128i const*>(p)))};
}
/// Keeps a loaded value in its register; compilers would repeat the load in each multiply-add.
inline vf held(vf a) noexcept {
  __asm__("" : "+x"(a.v));
  return a;
}
inline void prefetch(void const* p) noexcept {
  _mm_prefetch(static_cast<char const*>(p), _MM_HINT_T0);
}

/// Transposes the 8x8 matrix whose rows are r[0..7].
inline void transpose8(vf (&r)[8]) noexcept {
  __m256 t[8], u[8];
  KVKEEP_CPU_UNROLL
  for (int i = 0; i < 4; ++i) {
    t[2 * i] = _mm256_unpacklo_ps(r[2 * i].v, r[2 * i + 1].v);
    t[2 * i + 1] = _mm256_unpackhi_ps(r[2 * i].v, r[2 * i + 1].v);
  }
  KVKEEP_CPU_UNROLL
  for (int i = 0; i < 2; ++i) {
    u[4 * i] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0x44);
    u[4 * i + 1] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0xee);
    u[4 * i + 2] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0x44);
    u[4 * i + 3] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0xee);
  }
  KVKEEP_CPU_UNROLL
  for (int i = 0; i < 4; ++i) {
    r[i].v = _mm256_permute2f128_ps(u[i], u[i + 4], 0x20);
    r[i + 4].v = _mm256_permute2f128_ps(u[i], u[i + 4], 0x31);
  }
}

#endif

#if KVKEEP_CPU_AVX512

/// 16 floats, for sums of products alone: there every lane is a sum of its own, so that their number does
/// not show in the results.
struct wf {
  __m512 v;
};
inline wf splat_wide(float x) noexcept { return {_mm512_set1_ps(x)}; }
inline wf load_wide(float const* p) noexcept { return {_mm512_loadu_ps(p)}; }
inline wf fma(wf a, wf b, wf c) noexcept { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
template <int Half>
inline vf half_of(wf a) noexcept {  // with a mask: without, g++ 12 warns of its own headers
  return {_mm256_castpd_ps(_mm512_maskz_extractf64x4_pd(0xff, _mm512_castps_pd(a.v), Half))};
}

#else

struct wf {
  vf low, high;
};
inline wf splat_wide(float x) noexcept { return {splat(x), splat(x)}; }
inline wf load_wide(float const* p) noexcept { return {load(p), load(p + lanes)}; }
inline wf fma(wf a, wf b, wf c) noexcept {
  return {fma(a.low, b.low, c.low), fma(a.high, b.high, c.high)};
}
template <int Half>
inline vf half_of(wf a) noexcept {
  return Half == 0 ? a.low : a.high;
}

#endif

/// The first `n` < 8 elements; the other lanes are zero.
template <class T>
[[gnu::noinline]] auto load_part(T const* p, index_t n) noexcept {
  T part[8] = {};
  std::memcpy(part, p, static_cast<std::size_t>(n) * sizeof(T));
  return load(part);
}
template <class T, class V>
[[gnu::noinline]] void store_part(T* p, V const& a, index_t n) noexcept {
  T part[8];
  store(part, a);
  std::memcpy(p, part, static_cast<std::size_t>(n) * sizeof(T));
}
/// Up to 8 elements: a full vector, or the first `n` of one.
template <class T>
inline auto load_some(T const* p, index_t n) noexcept {
  return n >= lanes ? load(p) : load_part(p, n);
}
template <class T, class V>
inline void store_some(T* p, V const& a, index_t n) noexcept {
  n >= lanes ? store(p, a) : store_part(p, a, n);
}

/// Lane i of the result is the sum of the lanes of r[i]: (0+1)+(2+3) + (4+5)+(6+7) by pairs of
/// columns.
inline vf sum_each(vf (&r)[8]) noexcept {
  transpose8(r);
  return ((r[0] + r[1]) + (r[2] + r[3])) + ((r[4] + r[5]) + (r[6] + r[7]));
}
inline vf max_each(vf (&r)[8]) noexcept {
  transpose8(r);
  return max(max(max(r[0], r[1]), max(r[2], r[3])), max(max(r[4], r[5]), max(r[6], r[7])));
}
/// Sum and maximum of the lanes, in the same order as `sum_each`.
inline float sum_lanes(vf a) noexcept {
  float t[8];
  store(t, a);
  return ((t[0] + t[1]) + (t[2] + t[3])) + ((t[4] + t[5]) + (t[6] + t[7]));
}
inline float max_lanes(vf a) noexcept {
  float t[8];
  store(t, a);
  for (int i = 1; i < 8; ++i) t[0] = t[i] > t[0] ? t[i] : t[0];
  return t[0];
}
inline float first_lane(vf a) noexcept {
  float t[8];
  store(t, a);
  return t[0];
}

}  // namespace KVKEEP_CPU_ISA
}  // namespace kvkeep::cpu
