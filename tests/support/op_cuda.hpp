// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// Op tests on the CUDA backend. The tests' arrays are memory that a device reads too: in emulation all
/// is, on a device the tests' allocator gives managed memory (gpu_main.cpp). So an op over host memory
/// is taken for one over device memory, bit by bit.
#pragma once

#include <bit>

#include <kvkeep/cuda.cuh>

namespace kvkeep::test {

using op_context = cuda::context;

inline op_context& one_thread() {
  static op_context ctx(nullptr);
  return ctx;
}
inline op_context& two_threads() { return one_thread(); }

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

/// Enqueues and waits.
template <class Op>
status call(op_context& ctx, Op const& op, workspace& ws) {
  status const result = enqueue(ctx, on_device(op), ws);
  if (cudaStreamSynchronize(ctx.stream) != cudaSuccess) return status::backend_error;
  return result;
}

}  // namespace kvkeep::test
