// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// One arena for state and scratch. The code that uses the memory also measures it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "types.hpp"

namespace kvkeep {

/// Number of elements of an array with these extents.
template <class... E>
constexpr std::size_t product(E... extents) noexcept {
  return (static_cast<std::size_t>(extents) * ... * std::size_t{1});
}

/// Hands out 64-byte aligned pieces of one block, last in first out. A default-constructed workspace
/// measures: `take` returns null and only counts, and operations return before they touch memory. Run
/// once to measure, allocate `peak()` bytes, run again to place.
class workspace {
 public:
  static constexpr std::size_t alignment = 64;

  workspace() = default;
  /// @param block memory in the backend's space, aligned to 64 bytes (a smaller alignment costs
  ///   up to 63 bytes of its size)
  explicit workspace(std::span<std::byte> block) noexcept : measuring_(false) {
    auto const address = reinterpret_cast<std::uintptr_t>(block.data());
    std::size_t const skip = (alignment - address % alignment) % alignment;
    if (skip <= block.size()) {
      base_ = block.data() + skip;
      size_ = block.size() - skip;
    }
  }

  /// `n` uninitialised elements, or null while measuring or when the block is used up (see `ok`).
  template <class T>
  T* take(std::size_t n) noexcept {
    static_assert(alignof(T) <= alignment);
    std::size_t const bytes = (n * sizeof(T) + alignment - 1) / alignment * alignment;
    std::size_t const at = used_;
    used_ += bytes;
    if (used_ > peak_) peak_ = used_;
    if (measuring_) return nullptr;
    if (used_ > size_) {
      ok_ = false;
      return nullptr;
    }
    return reinterpret_cast<T*>(base_ + at);
  }

  bool measuring() const noexcept { return measuring_; }
  /// False after a `take` that did not fit.
  bool ok() const noexcept { return ok_; }
  std::size_t used() const noexcept { return used_; }
  std::size_t peak() const noexcept { return peak_; }

  /// Returns everything taken during its life.
  class frame {
   public:
    explicit frame(workspace& w) noexcept : w_(w), mark_(w.used_), ok_(w.ok_) {}
    frame(frame const&) = delete;
    frame& operator=(frame const&) = delete;
    ~frame() {
      w_.used_ = mark_;
      w_.ok_ = ok_;
    }

   private:
    workspace& w_;
    std::size_t mark_;
    bool ok_;
  };

 private:
  std::byte* base_ = nullptr;
  std::size_t size_ = 0;
  std::size_t used_ = 0;
  std::size_t peak_ = 0;
  bool measuring_ = true;
  bool ok_ = true;
};

}  // namespace kvkeep
