// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// What the benchmarks of all backends share: rows of Google Benchmark, their names, quantiles.
#pragma once

#include <benchmark/benchmark.h>

#include <algorithm>
#include <set>
#include <stdexcept>
#include <string>
#include <vector>

#include <kvkeep/core/status.hpp>

#include "axes.hpp"

namespace bench {

using namespace kvkeep;

/// @throws std::runtime_error
inline void expect(status s, char const* what) {
  if (s != status::ok) throw std::runtime_error(std::string(what) + ": " + kvkeep::to_string(s));
}

inline double quantile(std::vector<double> v, double q) {
  if (v.empty()) return 0;
  auto const at = static_cast<std::ptrdiff_t>(q * static_cast<double>(v.size() - 1));
  std::nth_element(v.begin(), v.begin() + at, v.end());
  return v[static_cast<std::size_t>(at)];
}

/// Registers a row of `samples` samples; f(state) fills it. Rows that several axes share are taken
/// once. Google Benchmark's own time is that of `ours` alone. The number is fixed: a search for it
/// would make the inputs anew each time.
template <class F>
void add_row(std::string const& name, int samples, F f) {
  static std::set<std::string> known;
  if (!known.insert(name).second) return;
  benchmark::RegisterBenchmark(name.c_str(), f)
      ->UseManualTime()
      ->Unit(benchmark::kMicrosecond)
      ->Iterations(samples);
}

inline std::string named(char const* key, index_t value) {
  std::string s = "/";  // piece by piece: g++ 12 warns of a sum of these without cause
  s += key;
  s += ':';
  return s += std::to_string(value);
}

}  // namespace bench
