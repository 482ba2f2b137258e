// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// The engine side of the examples on CUDA: memory, streams, graphs.
#pragma once

#include <kvkeep/cuda.cuh>

#include <cstdio>
#include <cstdlib>
#include <vector>

namespace toy {

/// Examples stop at the first call of the runtime that fails.
inline void expect(cudaError_t e, char const* what) {
  if (e == cudaSuccess) return;
  std::fprintf(stderr, "%s failed\n", what);
  std::exit(1);
}

/// Whether there is a device; says so if there is none.
inline bool has_device() {
  int devices = 0;
  if (cudaGetDeviceCount(&devices) == cudaSuccess && devices > 0) return true;
  std::puts("SKIPPED: no CUDA device");
  return false;
}

/// Memory that both sides reach, because the toy model runs on the host. An engine brings its own.
class managed_memory {
 public:
  managed_memory() = default;
  managed_memory(managed_memory const&) = delete;
  managed_memory& operator=(managed_memory const&) = delete;
  ~managed_memory() {
    for (void* const p : all_) cudaFree(p);
  }
  template <class T>
  T* take(std::size_t n) {
    void* p = nullptr;
    expect(cudaMallocManaged(&p, n * sizeof(T)), "cudaMallocManaged");
    all_.push_back(p);
    return static_cast<T*>(p);
  }

 private:
  std::vector<void*> all_;
};

/// A stream, and an event by which another one can wait for it.
inline kvkeep::cuda::context new_context() {
  cudaStream_t stream = nullptr;
  cudaEvent_t mark = nullptr;
  expect(cudaStreamCreate(&stream), "cudaStreamCreate");
  expect(cudaEventCreateWithFlags(&mark, cudaEventDisableTiming), "cudaEventCreateWithFlags");
  return kvkeep::cuda::context(stream, mark);
}
inline void destroy(kvkeep::cuda::context const& c) {
  cudaEventDestroy(c.mark);
  cudaStreamDestroy(c.stream);
}

/// What `enqueue()` enqueues, to be launched again and again.
template <class F>
cudaGraphExec_t record(cudaStream_t stream, F&& enqueue) {
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t exec = nullptr;
  // Relaxed: the first launch of a kernel loads its code.
  expect(cudaStreamBeginCapture(stream, cudaStreamCaptureModeRelaxed), "cudaStreamBeginCapture");
  enqueue();
  expect(cudaStreamEndCapture(stream, &graph), "cudaStreamEndCapture");
  expect(cudaGraphInstantiate(&exec, graph, 0), "cudaGraphInstantiate");
  cudaGraphDestroy(graph);
  return exec;
}

/// Launches and waits: what the toy model writes next must not change under a kernel.
inline void launch(cudaGraphExec_t graph, cudaStream_t stream) {
  expect(cudaGraphLaunch(graph, stream), "cudaGraphLaunch");
  expect(cudaStreamSynchronize(stream), "cudaStreamSynchronize");
}

}  // namespace toy
