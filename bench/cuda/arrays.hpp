// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// Arrays on the device: rotated, filled, poisoned, checked, and seen from the host.
#pragma once

#include <memory>
#include <span>
#include <vector>

#include <kvkeep/backend/cuda/slots.cuh>
#include <kvkeep/view/kv_view.hpp>

#if defined(KVKEEP_BENCH_EMULATED)
#include "device_emulated.hpp"
#else
#include "device_cuda.hpp"
#endif

#include "../rows.hpp"

namespace bench {

/// Elements of the device, `per_set` for each set of inputs.
template <class T>
class rotated {
 public:
  rotated() = default;
  rotated(std::size_t sets, std::size_t per_set)
      : memory_(static_cast<T*>(take_memory(std::max<std::size_t>(sets * per_set, 1) * sizeof(T)))),
        sets_(sets),
        per_set_(per_set) {}

  /// What all calls share is one set.
  T* at(std::size_t set) const { return memory_.get() + set % sets_ * per_set_; }
  T* data() const { return memory_.get(); }
  std::size_t per_set() const { return per_set_; }
  std::size_t size() const { return sets_ * per_set_; }

  /// Every byte 0xff: no number among floats, -1 among integers.
  void poison() const {
    if (size() > 0) fill_memory(data(), 0xff, size() * sizeof(T));
  }
  std::vector<T> download(std::size_t set) const {
    std::vector<T> to(per_set_);
    if (per_set_ > 0) copy_to_host(to.data(), at(set), per_set_ * sizeof(T));
    return to;
  }
  std::vector<T> download() const {
    std::vector<T> to(size());
    if (size() > 0) copy_to_host(to.data(), data(), size() * sizeof(T));
    return to;
  }

 private:
  struct giver {
    void operator()(T* p) const { give_memory(p); }
  };
  std::unique_ptr<T, giver> memory_;
  std::size_t sets_ = 1, per_set_ = 0;
};

/// Whether no element is poison any more.
template <class T>
bool written(rotated<T> const& a) {
  static_assert(sizeof(T) == 4);
  std::vector<T> const all = a.download();
  return std::none_of(all.begin(), all.end(),
                      [](T const& x) { return bit_copy<std::uint32_t>(x) == 0xffffffffu; });
}

/// Where an op finds its arrays: on the device, one set of them.
struct on_device {
  using space = device_space;
  std::size_t set = 0;
  template <class T>
  T* operator()(rotated<T> const& a) const {
    return a.at(set);
  }
};

/// ... or in copies of the first set on the host, for the CPU backend.
class on_host {
 public:
  using space = host_space;
  template <class T>
  T* operator()(rotated<T> const& a) const {
    auto copy = std::make_shared<std::vector<T>>(a.download(0));
    copies_.push_back(copy);
    return copy->data();
  }

 private:
  mutable std::vector<std::shared_ptr<void>> copies_;
};

// -- contents -----------------------------------------------------------------------------------------

/// splitmix64 of a number.
KVKEEP_HD inline std::uint64_t scrambled(std::uint64_t x) {
  std::uint64_t z = (x + 1) * 0x9e3779b97f4a7c15ULL;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ULL;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebULL;
  return z ^ (z >> 31);
}
/// About normal: the sum of four bytes, mean 0, deviation 1.
KVKEEP_HD inline float normal(std::uint64_t bits) {
  std::uint64_t const sum =
      (bits & 255) + (bits >> 8 & 255) + (bits >> 16 & 255) + (bits >> 24 & 255);
  return (static_cast<float>(sum) - 510.0F) * (1.0F / 147.8F);
}
KVKEEP_HD inline void store(float* to, float x) { *to = x; }
KVKEEP_HD inline void store(bf16* to, float x) { *to = to_bf16(x); }
KVKEEP_HD inline void store(fp16* to, float x) { *to = to_fp16(x); }
KVKEEP_HD inline void store(fp8_e4m3* to, float x) { *to = to_e4m3(x); }

/// Element types of the rows' caches.
inline constexpr dtype cache_types[] = {dtype::f32, dtype::f16, dtype::bf16, dtype::e4m3};
/// f(T{}) with one of them.
template <class F>
auto with_type(dtype t, F const& f) {
  return t == dtype::f32    ? f(float{})
         : t == dtype::f16  ? f(fp16{})
         : t == dtype::e4m3 ? f(fp8_e4m3{})
                            : f(bf16{});
}

template <class T>
struct normal_numbers {
  T* to;
  std::uint64_t seed;
  KVKEEP_HD void operator()(index_t i) const {
    store(to + i, normal(scrambled(seed + static_cast<std::uint64_t>(i))));
  }
};
/// The same numbers in fp32, as far as a T holds them: queries of an engine that computes in T.
template <class T>
struct rounded_numbers {
  float* to;
  std::uint64_t seed;
  KVKEEP_HD void operator()(index_t i) const {
    T x;
    normal_numbers<T>{&x, seed + static_cast<std::uint64_t>(i)}(0);
    to[i] = to_float(x);
  }
};
/// to[i] = first + i % modulus
struct counted {
  index_t* to;
  index_t first, modulus;
  KVKEEP_HD void operator()(index_t i) const { to[i] = first + i % modulus; }
};
struct constant {
  float* to;
  float value;
  KVKEEP_HD void operator()(index_t i) const { to[i] = value; }
};
/// The axes' distributions of scores, by formulas of one draw each.
struct score_numbers {
  float* to;
  scores kind;
  std::uint64_t seed;
  KVKEEP_HD void operator()(index_t i) const {
    std::uint64_t const bits = scrambled(seed + static_cast<std::uint64_t>(i));
    auto const unit = static_cast<float>(bits >> 40) * 0x1p-24F;
    switch (kind) {
      case scores::uniform:
        to[i] = unit;
        break;
      case scores::heavy_tailed:
        to[i] = 1.234e-4F / ((1.0F - unit) * (1.0F - unit));
        break;
      case scores::few_values:
        to[i] = static_cast<float>(bits >> 60);
        break;
      case scores::mostly_zero:
        to[i] = normal(bits) > 1.5F ? normal(bits) - 1.5F : 0.0F;
        break;
      case scores::all_equal:
        to[i] = 1;
    }
  }
};

/// fn(i) for all i < n, now.
template <class Fn>
void fill(cuda::context& c, std::size_t n, Fn const& fn) {
  workspace none(std::span<std::byte>{});
  expect(enqueue(c, op::for_each<Fn, device_space>{static_cast<index_t>(n), fn}, none), "fill");
  wait_for(c.stream);
}
/// Random elements of a type. Seeds differ from array to array.
inline void fill_random(cuda::context& c, void* to, dtype type, std::size_t n, std::uint64_t seed) {
  constexpr std::size_t piece = std::size_t{1} << 28;  // indices of a fill have 31 bits
  auto* const bytes = static_cast<std::byte*>(to);
  std::size_t const size = static_cast<std::size_t>(dtype_bytes(type));
  for (std::size_t at = 0; at < n; at += piece) {
    void* const from = bytes + at * size;
    std::size_t const part = std::min(piece, n - at);
    std::uint64_t const first = scrambled(seed) + at;
    with_type(type, [&]<class T>(T) {
      fill(c, part, normal_numbers<T>{static_cast<T*>(from), first});
    });
  }
}
/// Random queries beside keys of a type (FP8: of bf16).
inline void fill_queries(cuda::context& c, rotated<float> const& a, dtype type,
                         std::uint64_t seed) {
  std::uint64_t const first = scrambled(seed);
  if (type == dtype::f16)
    fill(c, a.size(), rounded_numbers<fp16>{a.data(), first});
  else if (type != dtype::f32)
    fill(c, a.size(), rounded_numbers<bf16>{a.data(), first});
  else
    fill_random(c, a.data(), dtype::f32, a.size(), seed);
}

// -- shapes -------------------------------------------------------------------------------------------

inline cache_shape shape_of(point const& p, index_t slots) {
  return {p.batch, p.kv_heads * p.group, p.kv_heads, p.dim, p.dim, slots};
}
inline std::size_t plane_bytes(point const& p, index_t slots) {
  return product(p.batch, p.kv_heads, slots, p.dim) * static_cast<std::size_t>(dtype_bytes(p.type));
}

/// A contiguous cache in either memory. @param v null: keys alone
template <class Space>
kv_ref<Space> cache_view(point const& p, index_t slots, std::byte* k, std::byte* v) {
  cache_shape const s = shape_of(p, slots);
  return with_type(p.type, [&]<class T>(T) {
    return contiguous_view<Space>(reinterpret_cast<T*>(k), reinterpret_cast<T*>(v), s).ref();
  });
}

inline std::string shape_name(point const& p) {
  std::string s;
  if (p.batch != 1) s += named("B", p.batch);
  return s + "/" + kvkeep::to_string(p.type);
}

}  // namespace bench
