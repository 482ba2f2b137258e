// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// The main function of all device tests: exits 77 (skipped, for ctest) where no device can be used. With
/// a device every `new` of the program gives managed memory, so that the arrays of tests written for the
/// host are arrays that kernels read.
#define CATCH_CONFIG_RUNNER
#include "catch.hpp"

#include <cuda_runtime_api.h>

#include <bit>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <new>

namespace {

/// Pieces of one managed arena in lists by size, a power of two; plain memory before it is open, and when
/// it is used up.
class managed_heap {
 public:
  bool open(std::size_t bytes) {
    void* p = nullptr;
    if (cudaMallocManaged(&p, bytes) != cudaSuccess) return false;
    next_ = begin_ = static_cast<char*>(p);
    end_ = begin_ + bytes;
    return true;
  }
  void* take(std::size_t n, std::size_t alignment) {
    std::lock_guard const hold(mutex_);
    std::size_t const size = std::bit_ceil(n < smallest ? smallest : n < alignment ? alignment : n);
    auto& list = free_[static_cast<std::size_t>(std::countr_zero(size))];
    if (list != nullptr) {
      node* const p = list;
      list = p->next;
      return p;
    }
    // Sizes are powers of two and so is every place where one of them starts, up to a page.
    std::size_t const step = size < 4096 ? size : 4096;
    auto const gap = static_cast<std::size_t>(-(next_ - begin_)) % step;
    if (begin_ != nullptr && size + gap <= static_cast<std::size_t>(end_ - next_)) {
      char* const p = next_ + gap;
      next_ = p + size;
      return p;
    }
    return std::aligned_alloc(alignment < smallest ? smallest : alignment, size);
  }
  void give(void* p, std::size_t n, std::size_t alignment) {
    if (p < begin_ || p >= end_) return std::free(p);
    std::lock_guard const hold(mutex_);
    std::size_t const size = std::bit_ceil(n < smallest ? smallest : n < alignment ? alignment : n);
    auto& list = free_[static_cast<std::size_t>(std::countr_zero(size))];
    list = new (p) node{list};
  }

 private:
  static constexpr std::size_t smallest = 64;
  struct node {
    node* next;
  };

  std::mutex mutex_;
  char *begin_ = nullptr, *next_ = nullptr, *end_ = nullptr;
  node* free_[64]{};
};

// Outlives every static object that still frees memory.
managed_heap& heap() {
  alignas(managed_heap) static std::byte room[sizeof(managed_heap)];
  static managed_heap* const instance = ::new (room) managed_heap;
  return *instance;
}

}  // namespace

// The size lies before each piece, because not every delete knows it.
void* operator new(std::size_t n, std::align_val_t a) {
  std::size_t const before = static_cast<std::size_t>(a) < 64 ? 64 : static_cast<std::size_t>(a);
  auto* const p = static_cast<char*>(heap().take(n + before, before));
  if (p == nullptr) throw std::bad_alloc();
  reinterpret_cast<std::size_t*>(p + before)[-1] = n + before;
  reinterpret_cast<std::size_t*>(p + before)[-2] = before;
  return p + before;
}
void* operator new(std::size_t n) { return ::operator new (n, std::align_val_t{64}); }
void operator delete(void* p) noexcept {
  if (p == nullptr) return;
  auto const* const words = static_cast<std::size_t*>(p);
  heap().give(static_cast<char*>(p) - words[-2], words[-1], words[-2]);
}
void operator delete(void* p, std::size_t) noexcept { ::operator delete(p); }
void operator delete(void* p, std::align_val_t) noexcept { ::operator delete(p); }
void operator delete(void* p, std::size_t, std::align_val_t) noexcept { ::operator delete(p); }

int main(int argc, char** argv) {
  int devices = 0, managed = 0;
  cudaError_t error = cudaGetDeviceCount(&devices);
  if (error == cudaSuccess && devices > 0)
    error = cudaDeviceGetAttribute(&managed, cudaDevAttrConcurrentManagedAccess, 0);
  if (error != cudaSuccess || managed == 0) {
    std::fprintf(stderr, "skipped: %s\n",
                 error != cudaSuccess ? cudaGetErrorString(error)
                                      : "host and device cannot share managed memory at once");
    return 77;
  }
  if (!heap().open(std::size_t{4} << 30)) {
    std::fprintf(stderr, "no managed memory for the tests\n");
    return 1;
  }
  int const failed = Catch::Session().run(argc, argv);
  return failed == 0 ? 0 : 1;  // never 77 by chance
}
