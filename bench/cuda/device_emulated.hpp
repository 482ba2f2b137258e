// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// Stands in for device_cuda.hpp where kernels run on fibers (tests/emulation): the driver's logic can be
/// tested, its figures mean nothing. A recording keeps the function and calls it; time is the host's.
#pragma once

#include <cuda_runtime.h>

#include <chrono>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <new>
#include <string>
#include <utility>
#include <vector>

namespace bench {

inline constexpr bool on_a_device = false;

inline std::string missing_device() { return ""; }
inline void forget_errors() {}

struct device_facts {
  std::string name;
  double l2_bytes = 0;
  int driver = 0, runtime = 0;
};
inline device_facts facts_of_device() { return {"emulation", 1 << 20, 0, 0}; }

inline cudaStream_t new_stream() { return nullptr; }
inline void wait_for(cudaStream_t) {}

inline void* take_memory(std::size_t bytes) {
  return ::operator new (bytes, std::align_val_t{256});
}
inline void give_memory(void* p) { ::operator delete (p, std::align_val_t{256}); }
inline void fill_memory(void* p, int byte, std::size_t bytes) { std::memset(p, byte, bytes); }
inline void copy_to_host(void* to, void const* from, std::size_t bytes) {
  std::memcpy(to, from, bytes);
}

/// Unlike a captured graph it asks for the launches' arguments anew: `enqueue` is called at each replay.
class recording {
 public:
  template <class F>
  recording(cudaStream_t s, F&& enqueue) : stream_(s), enqueue_(std::forward<F>(enqueue)) {}

  void replay() const {
    long const before = emulation::count().launches;
    enqueue_();
    launches_ = static_cast<std::size_t>(emulation::count().launches - before);
  }
  cudaStream_t stream() const { return stream_; }
  std::size_t launches() const { return launches_; }

 private:
  cudaStream_t stream_;
  std::function<void()> enqueue_;
  mutable std::size_t launches_ = 0;
};

class stopwatch {
 public:
  stopwatch(cudaStream_t, std::size_t n) : begin_(n), end_(n) {}

  void start(std::size_t i) { begin_[i] = clock::now(); }
  void stop(std::size_t i) { end_[i] = clock::now(); }
  std::vector<double> seconds() const {
    std::vector<double> t;
    for (std::size_t i = 0; i < begin_.size(); ++i)
      t.push_back(std::chrono::duration<double>(end_[i] - begin_[i]).count());
    return t;
  }

 private:
  using clock = std::chrono::steady_clock;
  std::vector<clock::time_point> begin_, end_;
};

}  // namespace bench
