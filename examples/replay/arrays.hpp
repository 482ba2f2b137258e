// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// Inputs checked against the extents that a case names, outputs made from rows of integers.
#pragma once

#include <algorithm>
#include <span>

#include "replay.hpp"

namespace kvkeep::replay {

using extents = std::vector<std::int64_t>;

inline std::string to_string(extents const& shape) {
  std::string s = "[";
  for (std::size_t i = 0; i < shape.size(); ++i) s += (i ? ", " : "") + std::to_string(shape[i]);
  return s + "]";
}

/// inputs.NAME, which must have these extents and this element type.
inline npy_array const& checked_input(recorded_case const& c, char const* name,
                                      extents const& shape, bool is_float = true) {
  npy_array const& a = c.input(name);
  std::string const field = std::string("inputs.") + name;
  if (a.is_float != is_float)
    c.fail(field + ".dtype", is_float ? "int32, expected float32" : "float32, expected int32");
  if (a.shape != shape)
    c.fail(field + ".shape",
           to_string(a.shape) + ", expected " + to_string(shape) + " by shape and params");
  return a;
}

inline float const* floats_of(recorded_case const& c, char const* name, extents const& shape) {
  return checked_input(c, name, shape).f32.data();
}

/// An input of two axes `[rows, n]` with any n >= 1.
inline npy_array const& checked_table(recorded_case const& c, char const* name, index_t rows,
                                      bool is_float) {
  npy_array const& a = c.input(name);
  std::int64_t const n = a.shape.size() == 2 ? a.shape[1] : 0;
  if (n < 1)
    c.fail(std::string("inputs.") + name + ".shape",
           to_string(a.shape) + ", expected two axes without a zero extent");
  return checked_input(c, name, {rows, n}, is_float);
}

inline bool has_input(recorded_case const& c, char const* name) { return c.inputs.count(name) > 0; }
inline bool wants(recorded_case const& c, char const* name) {
  return c.output_info.count(name) > 0;
}

inline npy_array float_array(extents shape, std::vector<float> values) {
  return {std::move(shape), true, std::move(values), {}};
}
inline npy_array int_array(extents shape, std::vector<index_t> values) {
  return {std::move(shape), false, {}, std::move(values)};
}

/// Rows padded with -1 to the longest, as `[leading..., longest]`.
inline npy_array padded(extents leading, int_rows const& rows) {
  std::size_t width = 0;
  for (auto const& r : rows) width = std::max(width, r.size());
  std::vector<index_t> values;
  values.reserve(width * rows.size());
  for (auto const& r : rows) {
    values.insert(values.end(), r.begin(), r.end());
    values.resize(values.size() + width - r.size(), -1);
  }
  leading.push_back(static_cast<std::int64_t>(width));
  return int_array(std::move(leading), std::move(values));
}

/// Lengths of rows as `[leading...]`.
inline npy_array lengths(extents leading, int_rows const& rows) {
  std::vector<index_t> values;
  for (auto const& r : rows) values.push_back(static_cast<index_t>(r.size()));
  return int_array(std::move(leading), std::move(values));
}

/// Widens the last axis with padding to the width that the case names; nothing else is changed.
template <class T>
void widen(std::vector<T>& values, std::size_t width, std::size_t to, T padding) {
  std::vector<T> wide;
  wide.reserve(values.size() / width * to);
  for (std::size_t at = 0; at < values.size(); at += width) {
    wide.insert(wide.end(), values.begin() + static_cast<std::ptrdiff_t>(at),
                values.begin() + static_cast<std::ptrdiff_t>(at + width));
    wide.resize(wide.size() + to - width, padding);
  }
  values = std::move(wide);
}

inline void widen(npy_array& a, extents const& declared) {
  if (a.shape.size() != declared.size() || a.shape.empty()) return;
  bool const leading = std::equal(a.shape.begin(), a.shape.end() - 1, declared.begin());
  std::int64_t const width = a.shape.back(), to = declared.back();
  if (!leading || to <= width || width == 0) return;
  if (a.is_float)
    widen(a.f32, uz(width), uz(to), 0.0F);
  else
    widen(a.i32, uz(width), uz(to), -1);
  a.shape.back() = to;
}

}  // namespace kvkeep::replay
