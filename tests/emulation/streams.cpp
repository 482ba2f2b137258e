// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// Streams, events and graphs of the emulated runtime (see cuda_runtime.h beside this). A stream does its work when
/// it gets it, unless it dawdles.
#include <cstdlib>
#include <cstring>
#include <deque>
#include <memory>
#include <random>
#include <vector>

#include <cuda_runtime.h>

namespace {

/// What a stream does next: a kernel, or wait until another one has done so many things.
template <class Stream>
struct item {
  std::function<void()> work;
  Stream behind{};
  std::size_t mark = 0;
};
/// A stream's part of a graph, which waits for other parts by their number.
using part = std::vector<item<std::size_t>>;

std::minstd_rand& order() {
  static std::minstd_rand instance{1};
  return instance;
}

}  // namespace

struct emulated_stream {
  std::deque<item<cudaStream_t>> items;  ///< still to be done
  std::size_t given = 0;                 ///< things, those that are done included
  long launches = 0;
  bool dawdles = false;

  std::size_t done() const { return given - items.size(); }
  void give(item<cudaStream_t> next) {
    items.push_back(std::move(next));
    ++given;
    if (!dawdles || order()() % 8 == 0) run_until(given);
  }
  void run_until(std::size_t mark) {
    while (done() < mark) {
      item<cudaStream_t> const next = std::move(items.front());
      if (next.behind != nullptr)
        next.behind->run_until(next.mark);
      else
        next.work();
      items.pop_front();
    }
  }
};
struct emulated_event {
  cudaStream_t stream = nullptr;
  std::size_t mark = 0;
  unsigned long capture = 0;  ///< that it was recorded in; 0: none
};
struct emulated_graph {
  std::vector<part> parts;
};
struct emulated_graph_exec {
  std::vector<part> parts;
};

namespace {

/// What is being captured: by streams, the one that began first.
struct capture {
  unsigned long number = 0;
  std::vector<cudaStream_t> streams;  ///< none: nothing is
  std::vector<part> parts;
  bool spoilt = false;

  bool active() const { return !streams.empty(); }
  std::size_t find(cudaStream_t s) const {
    return static_cast<std::size_t>(std::find(streams.begin(), streams.end(), s) - streams.begin());
  }
  bool has(cudaStream_t s) const { return find(s) < streams.size(); }
  void add(cudaStream_t s) {
    streams.push_back(s);
    parts.emplace_back();
  }
  /// Whether the first stream waits for all that another has recorded.
  bool joined(std::size_t other) const {
    for (auto const& i : parts[0])
      if (i.work == nullptr && i.behind == other && i.mark == parts[other].size()) return true;
    return other == 0 || parts[other].empty();
  }
};
capture& captured() {
  static capture instance;
  return instance;
}

cudaStream_t or_default(cudaStream_t s) {
  static emulated_stream null;
  return s != nullptr ? s : &null;
}

/// A call that must not come between the kernels of a step.
cudaError_t other_call() {
  ++emulation::count().others;
  if (!captured().active()) return cudaSuccess;
  captured().spoilt = true;
  return cudaErrorStreamCaptureUnsupported;
}

/// Runs all parts, each in its order, turn and turn about as they wait for each other.
void run_parts(std::vector<part> const& parts) {
  std::vector<std::size_t> done(parts.size());
  auto const ready = [&](std::size_t p) {
    if (done[p] == parts[p].size()) return false;
    auto const& next = parts[p][done[p]];
    return next.work != nullptr || done[next.behind] >= next.mark;
  };
  for (;;) {
    std::vector<std::size_t> can;
    for (std::size_t p = 0; p < parts.size(); ++p)
      if (ready(p)) can.push_back(p);
    if (can.empty()) break;
    std::size_t const p = can[order()() % can.size()];
    if (auto const& work = parts[p][done[p]].work; work != nullptr) work();
    ++done[p];
  }
  for (std::size_t p = 0; p < parts.size(); ++p)
    if (done[p] < parts[p].size()) emulation::fail("streams of a graph wait for each other");
}

}  // namespace

void emulation::dawdle(cudaStream_t stream) { stream->dawdles = true; }
long emulation::launches(cudaStream_t stream) noexcept { return stream->launches; }

char const* cudaGetErrorString(cudaError_t e) { return e == cudaSuccess ? "no error" : "refused"; }
cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return other_call();
}
cudaError_t cudaGetDeviceCount(int* devices) {
  *devices = 1;
  return other_call();
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr what, int) {
  switch (what) {
    case cudaDevAttrMultiProcessorCount:
      *value = 132;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = 227 * 1024;
      break;
    case cudaDevAttrComputeCapabilityMajor:
      *value = 9;
      break;
    case cudaDevAttrComputeCapabilityMinor:
      *value = 0;
      break;
    case cudaDevAttrConcurrentManagedAccess:
      *value = 1;
      break;
  }
  return other_call();
}
cudaError_t cudaMallocManaged(void** p, std::size_t bytes) {
  if (cudaError_t const e = other_call(); e != cudaSuccess) return e;
  *p = std::aligned_alloc(256, (bytes + 255) / 256 * 256);
  return *p != nullptr ? cudaSuccess : cudaErrorMemoryAllocation;
}
cudaError_t cudaFree(void* p) {
  std::free(p);
  return other_call();
}
cudaError_t cudaStreamCreate(cudaStream_t* stream) {
  if (cudaError_t const e = other_call(); e != cudaSuccess) return e;
  *stream = new emulated_stream;
  return cudaSuccess;
}
cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  stream->run_until(stream->given);
  delete stream;
  return other_call();
}
cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  if (cudaError_t const e = other_call(); e != cudaSuccess) return e;
  or_default(stream)->run_until(or_default(stream)->given);
  return cudaSuccess;
}
cudaError_t cudaGetLastError() { return cudaSuccess; }
cudaError_t cudaMemsetAsync(void* p, int value, std::size_t bytes, cudaStream_t stream) {
  if (cudaError_t const e = cudaStreamSynchronize(stream); e != cudaSuccess) return e;
  std::memset(p, value, bytes);
  return cudaSuccess;
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  if (cudaError_t const e = other_call(); e != cudaSuccess) return e;
  *event = new emulated_event;
  return cudaSuccess;
}
cudaError_t cudaEventDestroy(cudaEvent_t event) {
  delete event;
  return other_call();
}
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  capture const& c = captured();
  if (stream == nullptr && c.active()) return cudaErrorStreamCaptureImplicit;
  stream = or_default(stream);
  *event = c.has(stream) ? emulated_event{stream, c.parts[c.find(stream)].size(), c.number}
                         : emulated_event{stream, stream->given, 0};
  return cudaSuccess;
}
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
  stream = or_default(stream);
  capture& c = captured();
  if (event->stream == nullptr) return cudaSuccess;  // never recorded
  if (event->capture == 0 && !c.has(stream)) {
    stream->give({nullptr, event->stream, event->mark});
    return cudaSuccess;
  }
  if (!c.active() || event->capture != c.number) {
    c.spoilt = true;
    return cudaErrorStreamCaptureIsolation;
  }
  if (!c.has(stream)) c.add(stream);
  c.parts[c.find(stream)].push_back({nullptr, c.find(event->stream), event->mark});
  return cudaSuccess;
}

cudaError_t emulated_launch(cudaStream_t stream, std::function<void()> work) {
  ++emulation::count().launches;
  ++or_default(stream)->launches;
  capture& c = captured();
  if (!c.active()) {
    or_default(stream)->give({std::move(work)});
    return cudaSuccess;
  }
  if (c.has(stream)) {
    c.parts[c.find(stream)].push_back({std::move(work)});
    return cudaSuccess;
  }
  // The null stream waits for all others, and so would have to wait for what never runs.
  c.spoilt = true;
  return cudaErrorStreamCaptureImplicit;
}
cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode) {
  if (cudaError_t const e = other_call(); e != cudaSuccess) return e;
  if (stream == nullptr) return cudaErrorStreamCaptureUnsupported;
  capture& c = captured();
  c = {c.number + 1, {}, {}, false};
  c.add(stream);
  return cudaSuccess;
}
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
  *graph = nullptr;
  capture& c = captured();
  if (!c.active() || c.streams[0] != stream) return cudaErrorInvalidValue;
  bool joined = true;
  for (std::size_t s = 0; s < c.streams.size(); ++s) joined = joined && c.joined(s);
  std::vector<part> parts = std::move(c.parts);
  c.streams.clear();
  c.parts.clear();
  other_call();
  if (c.spoilt) return cudaErrorStreamCaptureInvalidated;
  if (!joined) return cudaErrorStreamCaptureUnjoined;
  *graph = new emulated_graph{std::move(parts)};
  return cudaSuccess;
}
cudaError_t cudaGraphInstantiate(cudaGraphExec_t* exec, cudaGraph_t graph, unsigned long long) {
  if (cudaError_t const e = other_call(); e != cudaSuccess) return e;
  *exec = new emulated_graph_exec{graph->parts};
  return cudaSuccess;
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t stream) {
  if (cudaError_t const e = cudaStreamSynchronize(stream); e != cudaSuccess) return e;
  run_parts(exec->parts);
  return cudaSuccess;
}
cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  delete graph;
  return other_call();
}
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec) {
  delete exec;
  return other_call();
}
/// The limits of a launch on a device.
cudaError_t emulated_check(cudaLaunchConfig_t const& c) {
  unsigned long const threads =
      static_cast<unsigned long>(c.blockDim.x) * c.blockDim.y * c.blockDim.z;
  bool const fits = threads >= 1 && threads <= 1024 && c.gridDim.x >= 1 &&
                    c.gridDim.x <= 2147483647 && c.gridDim.y >= 1 && c.gridDim.y <= 65535 &&
                    c.gridDim.z >= 1 && c.gridDim.z <= 65535 && c.dynamicSmemBytes <= 227 * 1024;
  return fits ? cudaSuccess : cudaErrorInvalidConfiguration;
}
