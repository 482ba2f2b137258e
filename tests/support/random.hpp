// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// Seeded generators, equal on every platform, and the loop of property tests that names its seed.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <numbers>
#include <numeric>
#include <utility>
#include <vector>

#include <kvkeep/core/types.hpp>

#include "catch.hpp"

namespace kvkeep::test {

/// SplitMix64. The distributions are written here because those of the standard library differ.
class generator {
 public:
  /// Scrambled: states of neighbours would be one step apart, and their streams the same but for the first number.
  explicit generator(std::uint64_t seed) : state_(seed) { state_ = next(); }

  std::uint64_t next() {
    std::uint64_t z = state_ += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }
  /// In [low, high], both included.
  index_t integer(index_t low, index_t high) {
    auto const width = static_cast<std::uint64_t>(static_cast<std::int64_t>(high) - low + 1);
    return static_cast<index_t>(low + static_cast<std::int64_t>(next() % width));
  }
  /// In [low, high).
  float uniform(float low = 0, float high = 1) {
    return low + (high - low) * static_cast<float>(next() >> 40) * 0x1p-24F;
  }
  float normal() {
    double const radius =
        std::sqrt(-2 * std::log((static_cast<double>(next() >> 11) + 1) * 0x1p-53));
    double const angle = 2 * std::numbers::pi * static_cast<double>(next() >> 11) * 0x1p-53;
    return static_cast<float>(radius * std::cos(angle));
  }
  bool chance(float probability) { return uniform() < probability; }
  /// One of the elements.
  template <class C>
  auto const& one_of(C const& c) {
    return c[static_cast<std::size_t>(integer(0, static_cast<index_t>(std::size(c)) - 1))];
  }
  template <class T>
  void shuffle(std::vector<T>& x) {
    for (std::size_t i = x.size(); i > 1; --i) std::swap(x[i - 1], x[next() % i]);
  }
  /// A random order of first .. first + n - 1.
  std::vector<index_t> permutation(index_t n, index_t first = 0) {
    std::vector<index_t> p(static_cast<std::size_t>(n));
    std::iota(p.begin(), p.end(), first);
    shuffle(p);
    return p;
  }
  /// `n` different numbers of 0 .. range - 1, in random order.
  std::vector<index_t> choose(index_t n, index_t range) {
    std::vector<index_t> p = permutation(range);
    p.resize(static_cast<std::size_t>(n));
    return p;
  }
  std::vector<float> normals(std::size_t n, float scale = 1) {
    std::vector<float> x(n);
    for (float& e : x) e = scale * normal();
    return x;
  }

 private:
  std::uint64_t state_;
};

/// Calls `f(generator&)` for `n` seeds and prints the seed of a failure. The environment variable
/// KVKEEP_SEED moves the first seed, so that a failure can be run first and new ones can be looked
/// for.
template <class F>
void for_seeds(int n, F&& f) {
  char const* const text = std::getenv("KVKEEP_SEED");
  std::uint64_t const first = text ? std::strtoull(text, nullptr, 10) : 1;
  for (int i = 0; i < n; ++i) {
    std::uint64_t const seed = first + static_cast<std::uint64_t>(i);
    INFO("seed " << seed);
    generator g(seed);
    f(g);
  }
}

}  // namespace kvkeep::test
