// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// The CUDA backend's context: the caller's stream, and what set-up has learned of its device.
#pragma once

#include <cuda_runtime.h>

#include "../../op/backend.hpp"

/// Programs that link the library kvkeep::cuda_ops (src/) define KVKEEP_CUDA_COMPILED: ops that are no templates are
/// then declared only, and units compile faster.
#if defined(KVKEEP_CUDA_COMPILED)
#define KVKEEP_CUDA_OP
#else
#define KVKEEP_CUDA_OP inline
#endif

namespace kvkeep::cuda {

/// Ops are enqueued on the caller's stream: no allocation, no synchronisation, nothing read back. The
/// constructor reads the current device's properties, which is set-up; `enqueue` calls the runtime for
/// launches, and to let a kernel have more than 48 KiB of shared memory: neither hinders the capture of a
/// graph. But the first launch of a kernel loads its code, unless CUDA_MODULE_LOADING is EAGER: what is captured has
/// run once before, or the capture's mode is relaxed. The device that was current then has to be so in every call.
struct context {
  /// @param m  an event of the caller's, without timing, where others shall wait for this context (`follow`)
  explicit context(cudaStream_t s, cudaEvent_t m = nullptr) : stream(s), mark(m) {
    int device = 0;
    bool good = cudaGetDevice(&device) == cudaSuccess;
    auto const read = [&](cudaDeviceAttr what, int& value) {
      good = good && cudaDeviceGetAttribute(&value, what, device) == cudaSuccess;
    };
    int major = 0, minor = 0;
    read(cudaDevAttrMultiProcessorCount, n_sm);
    read(cudaDevAttrMaxSharedMemoryPerBlockOptin, shared_bytes);
    read(cudaDevAttrComputeCapabilityMajor, major);
    read(cudaDevAttrComputeCapabilityMinor, minor);
    if (!good) fail_setup("no CUDA device answers");
    capability = 10 * major + minor;
    KVKEEP_EXPECTS(capability >= 80, "compute capability", capability, ">= 80");
  }

  cudaStream_t stream;
  cudaEvent_t mark;
  int n_sm = 0;          ///< multiprocessors
  int shared_bytes = 0;  ///< shared memory that one block may use
  int capability = 0;    ///< 80, 90, ...
  bool overlap = false;  ///< kernels may be placed before those in front end (allow_overlap)
  bool starts = true;    ///< kernels; else a launch only says whether it fits (an op that measures)
};

/// What is enqueued in `later` from now on waits for all that has been in `earlier`. Not on the host, and in a graph
/// that is being captured it is an edge: the capture of `earlier` goes on in `later` (which may not be captured alone).
/// @return bad_argument if `earlier` has no mark
inline status follow(context& later, context& earlier) noexcept {
  if (earlier.mark == nullptr) return status::bad_argument;
  bool const good = cudaEventRecord(earlier.mark, earlier.stream) == cudaSuccess &&
                    cudaStreamWaitEvent(later.stream, earlier.mark, 0) == cudaSuccess;
  return good ? status::ok : status::backend_error;
}

}  // namespace kvkeep::cuda

template <>
struct kvkeep::backend_traits<kvkeep::cuda::context> {
  using space = kvkeep::device_space;
  static constexpr char const* name = "cuda";
};
