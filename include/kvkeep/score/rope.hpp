// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// Rotary position embedding: undone for queries of known positions, averaged over positions to come.
#pragma once

#include <cmath>
#include <string>

#include "../op/query_moments.hpp"
#include "scorer.hpp"

namespace kvkeep {

/// How a model rotates queries and keys by their position: pair i of a row's first `dims` features by the angle
/// position * frequency(i), frequency(i) = theta^(-2 i / dims).
struct rope {
  double theta = 10000;
  index_t dims = 0;          ///< rotated features; 0: all of them
  bool interleaved = false;  ///< pair i is features 2i and 2i + 1, not i and i + dims / 2
  /// [dims / 2] radians per position, at most 100, in the backend's memory, for models that scale them (Llama 3, YaRN):
  /// instead of theta's. Outlives whoever uses it. A key of configurations knows that there are some, not which.
  float const* frequencies = nullptr;

  KVKEEP_COLD void check(cache_shape const& s) const {
    KVKEEP_EXPECTS(theta >= 1 && theta <= 1e12, "rope.theta", theta, "1..1e12");
    KVKEEP_EXPECTS(dims >= 0 && dims <= s.dim_k && dims % 2 == 0, "rope.dims", dims,
                   "even, 0 (all) .. dim_k = " + std::to_string(s.dim_k));
    KVKEEP_EXPECTS(dims > 0 || s.dim_k % 2 == 0, "shape.dim_k", s.dim_k,
                   "even, where all features are rotated in pairs");
  }
};

namespace detail {
inline namespace KVKEEP_CPU_ISA {  // of the CPU backend's functors

/// Cosine and sine of `turns` full turns, |turns| < 2^31, to about 1e-13. (The compiler's own take memory on a
/// device, for angles that are large.)
KVKEEP_HD inline void turn(double turns, double& cosine, double& sine) noexcept {
  constexpr double tau = 6.283185307179586476925;
  double const down = turns < 0 ? -0.5 : 0.5;
  auto const quarter = static_cast<long long>(turns * 4 + down);
  double const x = (turns - static_cast<double>(quarter) * 0.25) * tau, y = x * x;
  // Taylor's series up to |x| = pi / 4
  double const s =
      x * (1 + y * (-1.0 / 6 +
                    y * (1.0 / 120 +
                         y * (-1.0 / 5040 + y * (1.0 / 362880 + y * (-1.0 / 39916800 +
                                                                     y * (1.0 / 6227020800)))))));
  double const c =
      1 + y * (-1.0 / 2 +
               y * (1.0 / 24 + y * (-1.0 / 720 +
                                    y * (1.0 / 40320 +
                                         y * (-1.0 / 3628800 +
                                              y * (1.0 / 479001600 + y * (-1.0 / 87178291200)))))));
  bool const odd = quarter % 2 != 0, flip_c = ((quarter + 1) & 2) != 0, flip_s = (quarter & 2) != 0;
  double const a = odd ? s : c, b = odd ? c : s;
  cosine = flip_c ? -a : a;
  sine = flip_s ? -b : b;
}

/// A rope for rows of `dim_k` features, as device code reads it.
struct rope_pairs : turned_pairs {
  double ratio = 1;  ///< frequency(i + 1) / frequency(i)
  float const* frequencies = nullptr;

  rope_pairs() = default;
  rope_pairs(rope const& r, index_t dim_k)
      : turned_pairs{r.dims > 0 ? r.dims : dim_k, r.interleaved},
        ratio(std::pow(r.theta, -2.0 / dims)),
        frequencies(r.frequencies) {}

  /// Turns that a pair makes from one position to the next.
  KVKEEP_HD double turns(index_t pair) const noexcept {
    constexpr double per_radian = 0.159154943091895335769;
    if (frequencies != nullptr) return frequencies[pair] * per_radian;
    double power = 1, base = ratio;
    for (index_t n = pair; n > 0; n /= 2, base *= base)
      if (n % 2 != 0) power *= base;
    return power * per_radian;
  }
};

/// Mean cosine and sine of every pair over the next positions; index: entry * pairs + pair.
template <class Space>
struct mean_turns {
  rope_pairs rope;
  batch_ref<Space> batch;
  index_t const* seen;  ///< [id]
  index_t ahead;        ///< positions, from `seen` on
  float* out;           ///< [entry, pair, 2]

  KVKEEP_HD void operator()(index_t i) const noexcept {
    index_t const entry = i / rope.pairs();
    double const step = rope.turns(i % rope.pairs()), half = step / 2;
    double cosine = 1, sine = 0, above = 0, below = 0, rest = 0;
    turn(half * ahead, rest, above);
    turn(half, rest, below);
    // A sum of vectors that turn by equal steps points where the middle one does.
    turn(step * seen[batch.id_of(entry)] + half * (ahead - 1), cosine, sine);
    double const length = below == 0 ? 1 : above / (below * ahead);
    out[2 * i] = static_cast<float>(cosine * length);
    out[2 * i + 1] = static_cast<float>(sine * length);
  }
};

/// Cosine and sine of every pair at the positions of query rows; index: (entry * rows + row) * pairs + pair.
template <class Space>
struct row_turns {
  rope_pairs rope;
  tensor_ref<index_t const, 2, Space> position;  ///< [entry, row]
  float* out;                                    ///< [entry, row, 2, pair]

  KVKEEP_HD void operator()(index_t i) const noexcept {
    index_t const pair = i % rope.pairs(), at = i / rope.pairs(), rows = position.extent[1];
    double cosine = 1, sine = 0;
    index_t const p = position(at / rows, at % rows);
    turn(rope.turns(pair) * (p > 0 ? p : 0), cosine, sine);
    float* const row = out + static_cast<offset_t>(at) * rope.dims + pair;
    row[0] = static_cast<float>(cosine);
    row[rope.pairs()] = static_cast<float>(sine);
  }
};

}  // namespace KVKEEP_CPU_ISA
}  // namespace detail
}  // namespace kvkeep
