// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// Op tests on the CUDA backend. The tests' arrays are memory that a device reads too: in emulation all
/// is, on a device the tests' allocator gives managed memory (gpu_main.cpp). So an op over host memory
/// is taken for one over device memory, bit by bit.
#pragma once

#include <bit>
#include <cstdlib>
#include <stdexcept>

#include <kvkeep/cuda.cuh>

namespace kvkeep::test {

using op_context = cuda::context;

/// On a stream of its own: the null stream cannot be captured. Kernels overlap where KVKEEP_TEST_OVERLAP is
/// set, and in emulation, which refuses those that touch memory too early.
inline op_context make_context() {
  cudaStream_t s = nullptr;
  cudaEvent_t mark = nullptr;
  if (cudaStreamCreate(&s) != cudaSuccess) throw std::runtime_error("no stream");
  if (cudaEventCreateWithFlags(&mark, cudaEventDisableTiming) != cudaSuccess)
    throw std::runtime_error("no event");
  op_context ctx(s, mark);
#ifdef KVKEEP_EMULATION
  bool const overlap = true;
#else
  bool const overlap = std::getenv("KVKEEP_TEST_OVERLAP") != nullptr;
#endif
  if (overlap && cuda::allow_overlap(ctx) != status::ok) throw std::runtime_error("no overlap");
  return ctx;
}
/// It outlives the tests.
inline op_context& one_thread() {
  static op_context ctx = make_context();
  return ctx;
}
/// Of a device with one multiprocessor: blocks have more to do, and no result depends on it.
inline op_context& two_threads() {
  static op_context ctx = [] {
    op_context small = one_thread();
    small.n_sm = 1;
    return small;
  }();
  return ctx;
}
/// From its first use on both are late in emulation: whoever does not wait for them finds nothing done.
inline op_context& other_context() {
  static op_context ctx = [] {
    op_context other = make_context();
#ifdef KVKEEP_EMULATION
    for (op_context const* c : {&one_thread(), &other}) emulation::dawdle(c->stream);
#endif
    return other;
  }();
  return ctx;
}

template <template <class> class Op>
Op<device_space> on_device(Op<host_space> const& op) {
  return std::bit_cast<Op<device_space>>(op);
}
template <template <class, class> class Op, class Fn>
Op<Fn, device_space> on_device(Op<Fn, host_space> const& op) {
  return std::bit_cast<Op<Fn, device_space>>(op);
}

template <class... Ops>
auto on_device(op::head_chain<host_space, Ops...> const& chain) {
  return std::bit_cast<
      op::head_chain<device_space, decltype(on_device(std::declval<Ops const&>()))...>>(chain);
}
template <class Heads, class Entries>
auto on_device(op::joined_chain<host_space, Heads, Entries> const& chain) {
  return op::join_chains(on_device(chain.heads), on_device(chain.entries), chain.tickets);
}

/// What is put on a context's stream while it lives until `end`, recorded as a graph instead of run. A
/// runtime call that allocates, waits or copies to the host in between spoils it.
class recording {
 public:
  explicit recording(op_context& ctx) : stream_(ctx.stream) {
    open_ = cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal) == cudaSuccess;
  }
  recording(recording const&) = delete;
  recording& operator=(recording const&) = delete;
  ~recording() {
    end();
    if (exec_ != nullptr) cudaGraphExecDestroy(exec_);
  }
  /// Whether all of it can be replayed.
  bool end() {
    if (!open_) return exec_ != nullptr;
    open_ = false;
    cudaGraph_t graph = nullptr;
    if (cudaStreamEndCapture(stream_, &graph) != cudaSuccess) return false;
    bool const good = cudaGraphInstantiate(&exec_, graph, 0) == cudaSuccess;
    cudaGraphDestroy(graph);
    return good;
  }
  /// Runs the recorded kernels and waits.
  bool replay() {
    return exec_ != nullptr && cudaGraphLaunch(exec_, stream_) == cudaSuccess &&
           cudaStreamSynchronize(stream_) == cudaSuccess;
  }

 private:
  cudaStream_t stream_;
  bool open_ = false;
  cudaGraphExec_t exec_ = nullptr;
};

/// Kernels started so far, where that can be known.
inline long started_kernels() {
#ifdef KVKEEP_EMULATION
  return emulation::count().launches;
#else
  return 0;
#endif
}

/// Enqueues and waits.
/// (A recording must not wait: it calls `enqueue` itself.)
template <class Op>
status call(op_context& ctx, Op const& op, workspace& ws) {
  status const result = enqueue(ctx, on_device(op), ws);
  if (cudaStreamSynchronize(ctx.stream) != cudaSuccess) return status::backend_error;
  return result;
}

}  // namespace kvkeep::test
