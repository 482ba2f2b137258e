// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// Random inputs: numbers, scores, caches in every layout. Benchmarks rotate many of them, so that
/// neither caches nor the branch predictor learn one.
#pragma once

#include <algorithm>
#include <cmath>
#include <numeric>
#include <string>
#include <vector>

#include "support.hpp"

namespace bench {

/// splitmix64: small, fast, the same everywhere.
struct random_bits {
  std::uint64_t state = 1;

  std::uint64_t operator()() {
    std::uint64_t z = state += 0x9e3779b97f4a7c15ULL;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ULL;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebULL;
    return z ^ (z >> 31);
  }
  index_t below(index_t n) {
    return static_cast<index_t>(((*this)() >> 32) * static_cast<std::uint64_t>(n) >> 32);
  }
  /// In [0, 1).
  float uniform() { return static_cast<float>((*this)() >> 40) * 0x1p-24F; }
  /// About normal: the sum of four bytes, mean 0, deviation 1.
  float normal() {
    std::uint64_t const r = (*this)();
    auto const sum = (r & 255) + (r >> 8 & 255) + (r >> 16 & 255) + (r >> 24 & 255);
    return (static_cast<float>(sum) - 510.0F) * (1.0F / 147.8F);
  }
};

template <class T>
T from_float(float x) {
  if constexpr (std::is_same_v<T, bf16>)
    return to_bf16(x);
  else if constexpr (std::is_same_v<T, fp16>)
    return to_fp16(x);
  else
    return x;
}

template <class T>
std::vector<T> random_rows(std::size_t n, random_bits& r) {
  std::vector<T> v(n);
  for (T& x : v) x = from_float<T>(r.normal());
  return v;
}

inline float random_score(scores d, random_bits& r) {
  switch (d) {
    case scores::uniform:
      return r.uniform();
    case scores::heavy_tailed:
      return std::exp(2.0F * r.normal() - 9.0F);
    case scores::few_values:
      return static_cast<float>(r.below(16));
    case scores::mostly_zero:
      return std::max(0.0F, r.normal() - 1.5F);
    case scores::all_equal:
      break;
  }
  return 1;
}

/// Calls f(T{}) with the element type.
template <class F>
decltype(auto) with_type(dtype t, F&& f) {
  if (t == dtype::bf16) return f(bf16{});
  if (t == dtype::f16) return f(fp16{});
  return f(float{});
}

/// K and V of one layer with random contents, in any of the layouts.
struct layer_cache {
  std::vector<std::byte> k, v;
  std::vector<index_t> table, capacity;
  std::vector<offset_t> base;
  kv_ref<> view;

  template <class T>
  layer_cache(T, cache_shape const& shape, layout where, random_bits& r) {
    cache_shape s = shape;
    constexpr index_t block = 16;
    if (where == layout::paged) s.max_slots = (s.max_slots + block - 1) / block * block;
    std::size_t const n = product(s.n_seq, s.n_kv_heads, s.max_slots, s.dim_k);
    for (auto* plane : {&k, &v}) {
      plane->resize(n * sizeof(T));
      T* const rows = reinterpret_cast<T*>(plane->data());
      for (std::size_t i = 0; i < n; ++i) rows[i] = from_float<T>(r.normal());
    }
    view = place(reinterpret_cast<T*>(k.data()), reinterpret_cast<T*>(v.data()), s, where, r);
    view.shape.max_slots = shape.max_slots;
  }
  layer_cache(layer_cache&&) = default;  // the view's pointers follow the vectors

 private:
  template <class T>
  kv_ref<> place(T* kp, T* vp, cache_shape const& s, layout where, random_bits& r) {
    if (where == layout::paged) {
      index_t const blocks = s.max_slots / 16;
      table.resize(static_cast<std::size_t>(s.n_seq * blocks));
      std::iota(table.begin(), table.end(), 0);
      for (index_t i = static_cast<index_t>(table.size()) - 1; i > 0; --i)
        std::swap(table[static_cast<std::size_t>(i)],
                  table[static_cast<std::size_t>(r.below(i + 1))]);
      page_geometry g;
      g.block_size = 16;
      g.n_blocks = s.n_seq * blocks;
      g.table = table.data();
      g.blocks_per_table = blocks;
      return paged_view(kp, vp, s, g);
    }
    if (where == layout::ragged) {
      for (index_t i = 0; i < s.n_seq * s.n_kv_heads; ++i) {
        base.push_back(static_cast<offset_t>(i) * s.max_slots * s.dim_k);
        capacity.push_back(s.max_slots);
      }
      return ragged_view(kp, vp, s, base.data(), base.data(), capacity.data());
    }
    return contiguous_view(kp, vp, s, where == layout::hnd ? axis_order::hnd : axis_order::nhd);
  }
};

/// Lengths, positions and per-slot rows of one layer; all slots in use, in position order.
struct layer_slots {
  std::vector<index_t> lengths, positions;
  slot_state<> view;

  layer_slots(index_t n_seq, index_t heads, index_t slots)
      : lengths(static_cast<std::size_t>(n_seq * heads), slots),
        positions(lengths.size() * static_cast<std::size_t>(slots)) {
    for (std::size_t i = 0; i < positions.size(); ++i)
      positions[i] = static_cast<index_t>(i % static_cast<std::size_t>(slots));
    view.lengths = row_major(lengths.data(), n_seq, heads);
    view.positions = row_major(positions.data(), n_seq, heads, slots);
  }
};

/// Scratch for an op: measured with the op itself.
template <class Op>
std::vector<std::byte> scratch_for(cpu::context& ctx, Op const& o) {
  workspace measure;
  expect(run(ctx, o, measure), "measuring");
  return std::vector<std::byte>(measure.peak() + workspace::alignment);
}

inline cache_shape shape_of(point const& p, index_t slots) {
  return {p.batch, p.kv_heads * p.group, p.kv_heads, p.dim, p.dim, slots};
}

}  // namespace bench
