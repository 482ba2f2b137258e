// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// The main function of all device tests: exits 77 (skipped, for ctest) where no device can be used. With
/// a device every `new` of the program gives managed memory, so that the arrays of tests written for the
/// host are arrays that kernels read. They are pieces of one arena, so that compute-sanitizer's memcheck cannot see
/// a kernel leave one for another: with KVKEEP_TEST_MEMORY=apart each is an allocation of its own, of its own size.
#define CATCH_CONFIG_RUNNER
#include "catch.hpp"

#include <cuda_runtime_api.h>

#include <bit>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <new>
#include <string_view>

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

/// Managed allocations, each for arrays of one size: given back, it waits for the next of them.
class apart_heap {
 public:
  void open() { open_ = true; }
  /// @return null where it is not open. Ends the program without memory: kernels would get what they cannot read.
  void* take(std::size_t n) {
    // The runtime may call `new` itself, and a graph may be recorded meanwhile, which this must not spoil.
    thread_local bool inside = false;
    if (!open_ || inside) return nullptr;
    void* p = waiting(n);
    if (p != nullptr) return p;
    inside = true;
    cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
    cudaThreadExchangeStreamCaptureMode(&mode);
    if (cudaMallocManaged(&p, n) != cudaSuccess) {
      std::fputs("no managed memory is left for the tests\n", stderr);
      std::_Exit(1);
    }
    cudaThreadExchangeStreamCaptureMode(&mode);
    inside = false;
    return p;
  }
  void give(void* p, std::size_t n) {
    std::lock_guard const hold(mutex_);
    node*& list = list_of(n);
    list = new (p) node{list, n};
  }

 private:
  static constexpr std::size_t n_lists = 1024;
  struct node {
    node* next;
    std::size_t size;
  };
  node*& list_of(std::size_t n) { return lists_[n % n_lists]; }
  void* waiting(std::size_t n) {
    std::lock_guard const hold(mutex_);
    for (node** at = &list_of(n); *at != nullptr; at = &(*at)->next) {
      if ((*at)->size != n) continue;
      node* const p = *at;
      *at = p->next;
      return p;
    }
    return nullptr;
  }

  std::mutex mutex_;
  bool open_ = false;
  node* lists_[n_lists]{};
};

// Outlives every static object that still frees memory.
template <class Heap>
Heap& lasting() {
  alignas(Heap) static std::byte room[sizeof(Heap)];
  static Heap* const instance = ::new (room) Heap;
  return *instance;
}
managed_heap& heap() { return lasting<managed_heap>(); }
apart_heap& apart() { return lasting<apart_heap>(); }

}  // namespace

// Before each piece lie its size, because not every delete knows it, and where it came from.
void* operator new(std::size_t n, std::align_val_t a) {
  std::size_t const before = static_cast<std::size_t>(a) < 64 ? 64 : static_cast<std::size_t>(a);
  auto* p = static_cast<char*>(apart().take(n + before));
  bool const is_apart = p != nullptr;
  if (!is_apart) p = static_cast<char*>(heap().take(n + before, before));
  if (p == nullptr) throw std::bad_alloc();
  auto* const words = reinterpret_cast<std::size_t*>(p + before);
  words[-1] = n + before;
  words[-2] = before;
  words[-3] = is_apart;
  return p + before;
}
void* operator new(std::size_t n) { return ::operator new (n, std::align_val_t{64}); }
void operator delete(void* p) noexcept {
  if (p == nullptr) return;
  auto const* const words = static_cast<std::size_t*>(p);
  char* const first = static_cast<char*>(p) - words[-2];
  words[-3] != 0 ? apart().give(first, words[-1]) : heap().give(first, words[-1], words[-2]);
}
void operator delete(void* p, std::size_t) noexcept { ::operator delete(p); }
void operator delete(void* p, std::align_val_t) noexcept { ::operator delete(p); }
void operator delete(void* p, std::size_t, std::align_val_t) noexcept { ::operator delete(p); }

int main(int argc, char** argv) {
  // A graph may be recorded before its kernels have run: their code is there.
  setenv("CUDA_MODULE_LOADING", "EAGER", 0);
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
  char const* const memory = std::getenv("KVKEEP_TEST_MEMORY");
  if (memory != nullptr && std::string_view(memory) == "apart") {
    apart().open();
  } else if (!heap().open(std::size_t{4} << 30)) {
    std::fprintf(stderr, "no managed memory for the tests\n");
    return 1;
  }
  int const failed = Catch::Session().run(argc, argv);
  return failed == 0 ? 0 : 1;  // never 77 by chance
}
