// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// The features of a row, one after another or shared by the threads that work on it.
#pragma once

#include "rows.cuh"

namespace kvkeep::cuda {

template <class T, class F>
__device__ void for_features_of(T const* row, feature_map const& map, index_t dim, index_t first,
                                index_t step, F const& f) {
  if (map.contiguous(dim)) {
    KVKEEP_UNROLL(2) for (index_t d = first; d < dim; d += step) f(d, to_float(row[d]));
  } else {  // dividing by the map's extents is much code, and rare
    KVKEEP_UNROLL(1) for (index_t d = first; d < dim; d += step) f(d, to_float(row[map(d)]));
  }
}

/// f(d, value) for the features first, first + step, ... of a row. Precondition: not opaque.
template <class F>
__device__ void for_features(plane_ref<device_space> const& p, std::byte const* row, index_t first,
                             index_t step, F const& f) {
  switch (p.type) {
    case dtype::f16:
      return for_features_of(reinterpret_cast<fp16 const*>(row), p.features, p.dim, first, step, f);
    case dtype::bf16:
      return for_features_of(reinterpret_cast<bf16 const*>(row), p.features, p.dim, first, step, f);
    case dtype::e4m3:
      return for_features_of(reinterpret_cast<fp8_e4m3 const*>(row), p.features, p.dim, first, step,
                             f);
    case dtype::e5m2:
      return for_features_of(reinterpret_cast<fp8_e5m2 const*>(row), p.features, p.dim, first, step,
                             f);
    default:
      return for_features_of(reinterpret_cast<float const*>(row), p.features, p.dim, first, step,
                             f);
  }
}

/// f(d, row) for the `Dims` features of a stage and `n` rows. A warp takes 16 features of two rows, whole sectors of
/// 16-bit ones, which lie in 16 banks where rows follow each other and features are 4 more than a multiple of 32 apart.
template <index_t Dims, class F>
__device__ void each_staged(index_t n, F const& f) {
  constexpr index_t some = 16, parts = Dims / some;
  for (index_t x = thread_of_block(); x < n * Dims; x += threads_of_block()) {
    index_t const pair = x / (2 * some);
    f(pair % parts * some + x % some, pair / parts * 2 + x / some % 2);
  }
}

}  // namespace kvkeep::cuda
