// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// exp and tanh on vectors, and the last step from a dot product to a logit.
#pragma once

#include <cfloat>

#include "../simd.hpp"

namespace kvkeep::cpu {
inline namespace KVKEEP_CPU_ISA {

/// e^x with a relative error below 3e-7 on [-87.33, 88.37]; 0 below that range and for NaN,
/// constant above it. exp(0) is exactly 1.
inline vf exp(vf x) noexcept {
  vf const lowest = splat(-87.336f);  // results stay normal numbers
  vi const live = at_least(x, lowest);
  x = max(min(x, splat(88.37f)), lowest);
  vi const n = round_to_int(x * splat(1.44269504f));
  vf const nf = convert(n);
  // ln 2 in two parts, the first with few bits: the product with n is exact also without a fused
  // step.
  vf const r = fnma(nf, splat(-2.12194440e-4f), fnma(nf, splat(0.693359375f), x));
  // Minimax fit of (e^r - 1 - r) / r^2 on |r| <= ln(2) / 2.
  vf p = fma(splat(0.00831247773f), r, splat(0.0418905504f));
  p = fma(p, r, splat(0.166671157f));
  p = fma(p, r, splat(0.499992281f));
  p = fma(p, r * r, r) + splat(1.0f);
  vf const power = float_of_bits(shift_left<23>(n + splat(std::int32_t{127})));
  return float_of_bits(bits_of(p * power) & live);
}

/// The same function for one number.
inline float exp(float x) noexcept { return first_lane(exp(splat(x))); }

/// tanh with a relative error below 4e-7; for finite arguments.
inline vf tanh(vf x) noexcept {
  vi const sign = bits_of(x) & splat(std::int32_t{INT32_MIN});
  vf const a = float_of_bits(bits_of(x) ^ sign);
  vf const u = x * x;
  // Minimax fit of (tanh(x) / x - 1) / x^2, because 1 - 2 / (e^2x + 1) cancels for small x.
  vf p = fma(splat(-0.00566078955f), u, splat(0.0206020083f));
  p = fma(p, u, splat(-0.0537292287f));
  p = fma(p, u, splat(0.133313283f));
  p = fma(p, u, splat(-0.333332777f));
  vf const small = fma(p * u, a, a);
  vf const t = exp(min(a + a, splat(40.0f)));
  vf const large = splat(1.0f) - splat(2.0f) / (t + splat(1.0f));
  vf const r = select(at_least(a, splat(0.625f)), large, small);
  return float_of_bits(bits_of(r) | sign);
}

/// What turns q . k into a logit: z = scale * (q . k), then z = softcap * tanh(z / softcap) if
/// softcap > 0.
struct logit_form {
  float scale = 1;
  float softcap = 0;  ///< 0: none
};

/// NaN becomes -FLT_MAX, infinities the largest finite numbers. Integer test: safe under fast-math.
inline vf sanitise(vf z) noexcept {
  vi const magnitude = bits_of(z) & splat(std::int32_t{0x7fffffff});
  vi const nan = greater(magnitude, splat(std::int32_t{0x7f800000}));
  z = max(min(z, splat(FLT_MAX)), splat(-FLT_MAX));
  return select(nan, splat(-FLT_MAX), z);
}

/// A logit z = dot * scale under a cap. @param clean sanitise(z)
[[gnu::noinline]] inline vf cap_logit(vf z, vf clean, float softcap) noexcept {
  vi const magnitude = bits_of(z) & splat(std::int32_t{0x7fffffff});
  vi const nan = greater(magnitude, splat(std::int32_t{0x7f800000}));
  // The quotient is clamped because a small cap may overflow it.
  vf const x = max(min(clean / splat(softcap), splat(30.0f)), splat(-30.0f));
  return select(nan, clean, splat(softcap) * tanh(x));
}

inline vf finish_logit(vf dot, logit_form const& form) noexcept {
  vf const z = dot * splat(form.scale);
  vf const clean = sanitise(z);
  return form.softcap > 0 ? cap_logit(z, clean, form.softcap) : clean;
}

/// Dot products to logits in place.
/// @param z [n] floats, host
/// Cost: 8 bytes and about 6 operations (softcap: 50) per element.
inline void finish_logits(float* z, index_t n, logit_form const& form) noexcept {
  index_t j = 0;
  for (; j + lanes <= n; j += lanes) store(z + j, finish_logit(load(z + j), form));
  if (j < n) store_part(z + j, finish_logit(load_part(z + j, n - j), form), n - j);
}

}  // namespace KVKEEP_CPU_ISA
}  // namespace kvkeep::cpu
