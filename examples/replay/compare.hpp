// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// Agreement of an output with the recorded one: integers exactly, floats within a tolerance.
#pragma once

#include <cmath>

#include "arrays.hpp"

namespace kvkeep::replay {

struct tolerance {
  double relative = 2e-4;
  double absolute = 1e-6;
};

inline tolerance tolerance_of(std::string const& output) {
  tolerance t;
  if (output.rfind("attn_out", 0) == 0) t.absolute = 2e-5;
  return t;
}

namespace detail {

/// Index of flat element `at`, as in "[0, 1, 5]".
inline std::string index_of(extents const& shape, std::size_t at) {
  extents index(shape.size());
  for (std::size_t axis = shape.size(); axis-- > 0;) {
    index[axis] = static_cast<std::int64_t>(at % uz(shape[axis]));
    at /= uz(shape[axis]);
  }
  return to_string(index);
}

inline bool close(float mine, float expected, tolerance t) {
  if (std::isnan(mine) || std::isnan(expected)) return std::isnan(mine) && std::isnan(expected);
  if (mine == expected) return true;
  double const x = mine, y = expected;
  return std::abs(x - y) <= t.absolute + t.relative * std::abs(y);
}

template <class T>
std::string text(T x) {
  return nlohmann::json(x).dump();
}

}  // namespace detail

/// Empty when `mine` agrees with `expected`, else why not.
inline std::string difference(std::string const& name, npy_array const& mine,
                              npy_array const& expected) {
  if (mine.is_float != expected.is_float) return name + ": dtype differs";
  if (mine.shape != expected.shape)
    return name + ": shape " + to_string(mine.shape) + ", expected " + to_string(expected.shape);
  tolerance const t = tolerance_of(name);
  std::size_t bad = 0, first = 0;
  for (std::size_t i = 0; i < mine.size(); ++i) {
    bool const same = mine.is_float ? detail::close(mine.f32[i], expected.f32[i], t)
                                    : mine.i32[i] == expected.i32[i];
    if (!same && bad++ == 0) first = i;
  }
  if (bad == 0) return {};
  auto const at_first = [&](npy_array const& a) {
    return a.is_float ? detail::text(a.f32[first]) : detail::text(a.i32[first]);
  };
  return name + ": " + std::to_string(bad) + " of " + std::to_string(mine.size()) +
         " elements differ, first at " + detail::index_of(mine.shape, first) + ": " +
         at_first(mine) + ", expected " + at_first(expected);
}

}  // namespace kvkeep::replay
