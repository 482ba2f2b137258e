// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// The device behind the benchmarks: memory, recorded work and its time, by the CUDA runtime.
/// device_emulated.hpp has the same names.
#pragma once

#include <cuda_runtime.h>

#include <new>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace bench {

inline constexpr bool on_a_device = true;

/// @throws std::runtime_error
inline void must(cudaError_t e, char const* what) {
  if (e != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(e));
}
/// So that a failed row's error is not taken for one of the next (one that broke the device comes back).
inline void forget_errors() { cudaGetLastError(); }

/// @return why there is none, or an empty string
inline std::string missing_device() {
  int n = 0;
  cudaError_t const e = cudaGetDeviceCount(&n);
  if (e != cudaSuccess) return cudaGetErrorString(e);
  return n == 0 ? "no device" : "";
}

struct device_facts {
  std::string name;
  double l2_bytes = 0;
  int driver = 0, runtime = 0;
};
inline device_facts facts_of_device() {
  device_facts f;
  int device = 0;
  cudaDeviceProp p{};
  must(cudaGetDevice(&device), "cudaGetDevice");
  must(cudaGetDeviceProperties(&p, device), "cudaGetDeviceProperties");
  must(cudaDriverGetVersion(&f.driver), "cudaDriverGetVersion");
  must(cudaRuntimeGetVersion(&f.runtime), "cudaRuntimeGetVersion");
  f.name = p.name;
  f.l2_bytes = p.l2CacheSize;
  return f;
}

inline cudaStream_t new_stream() {
  cudaStream_t s = nullptr;
  must(cudaStreamCreateWithFlags(&s, cudaStreamNonBlocking), "cudaStreamCreateWithFlags");
  return s;
}
inline void wait_for(cudaStream_t s) { must(cudaStreamSynchronize(s), "the device's work"); }

/// @throws std::bad_alloc if the device has no room
inline void* take_memory(std::size_t bytes) {
  void* p = nullptr;
  if (cudaMalloc(&p, bytes) == cudaSuccess) return p;
  cudaGetLastError();
  throw std::bad_alloc();
}
inline void give_memory(void* p) { cudaFree(p); }
inline void fill_memory(void* p, int byte, std::size_t bytes) {
  must(cudaMemset(p, byte, bytes), "cudaMemset");
  must(cudaDeviceSynchronize(), "cudaMemset");
}
inline void copy_to_host(void* to, void const* from, std::size_t bytes) {
  must(cudaDeviceSynchronize(), "the device's work");
  must(cudaMemcpy(to, from, bytes, cudaMemcpyDeviceToHost), "cudaMemcpy");
}

/// What `enqueue()` puts on the stream, captured as a graph: nothing runs until `replay`.
class recording {
 public:
  template <class F>
  recording(cudaStream_t s, F&& enqueue) : stream_(s) {
    // Relaxed: the first launch of a kernel loads its code.
    must(cudaStreamBeginCapture(s, cudaStreamCaptureModeRelaxed), "cudaStreamBeginCapture");
    try {
      enqueue();
      must(cudaStreamEndCapture(s, &graph_), "cudaStreamEndCapture");
      must(cudaGraphInstantiate(&program_, graph_, 0), "cudaGraphInstantiate");
      must(cudaGraphUpload(program_, s), "cudaGraphUpload");
    } catch (...) {
      if (graph_ == nullptr) cudaStreamEndCapture(s, &graph_);
      destroy();
      throw;
    }
  }
  recording(recording const&) = delete;
  recording& operator=(recording const&) = delete;
  ~recording() { destroy(); }

  void replay() const { must(cudaGraphLaunch(program_, stream_), "cudaGraphLaunch"); }
  cudaStream_t stream() const { return stream_; }
  /// Kernels and copies in it.
  std::size_t launches() const {
    std::size_t n = 0, work = 0;
    must(cudaGraphGetNodes(graph_, nullptr, &n), "cudaGraphGetNodes");
    std::vector<cudaGraphNode_t> nodes(n);
    must(cudaGraphGetNodes(graph_, nodes.data(), &n), "cudaGraphGetNodes");
    for (cudaGraphNode_t node : nodes) {
      cudaGraphNodeType type{};
      must(cudaGraphNodeGetType(node, &type), "cudaGraphNodeGetType");
      work += type != cudaGraphNodeTypeEmpty;
    }
    return work;
  }

 private:
  void destroy() {
    if (program_ != nullptr) cudaGraphExecDestroy(program_);
    if (graph_ != nullptr) cudaGraphDestroy(graph_);
  }

  cudaStream_t stream_;
  cudaGraph_t graph_ = nullptr;
  cudaGraphExec_t program_ = nullptr;
};

/// Pairs of events around works of a stream; read when all is done, so that the host runs ahead.
class stopwatch {
 public:
  stopwatch(cudaStream_t s, std::size_t n) : stream_(s), events_(2 * n) {
    for (auto& e : events_) must(cudaEventCreate(&e), "cudaEventCreate");
  }
  stopwatch(stopwatch const&) = delete;
  stopwatch& operator=(stopwatch const&) = delete;
  ~stopwatch() {
    for (auto e : events_) cudaEventDestroy(e);
  }

  void start(std::size_t i) { must(cudaEventRecord(events_[2 * i], stream_), "cudaEventRecord"); }
  void stop(std::size_t i) {
    must(cudaEventRecord(events_[2 * i + 1], stream_), "cudaEventRecord");
  }
  /// Waits. @return seconds of each work
  std::vector<double> seconds() const {
    wait_for(stream_);
    std::vector<double> t;
    for (std::size_t i = 0; i < events_.size(); i += 2) {
      float ms = 0;
      must(cudaEventElapsedTime(&ms, events_[i], events_[i + 1]), "cudaEventElapsedTime");
      t.push_back(1e-3 * static_cast<double>(ms));
    }
    return t;
  }

 private:
  cudaStream_t stream_;
  std::vector<cudaEvent_t> events_;
};

}  // namespace bench
