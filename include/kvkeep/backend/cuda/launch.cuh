// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// Starting kernels: grids, the runtime's answers as status, and checks that every op shares.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include <kvkeep/backend/cuda/kernels/ptx.cuh>

#include "context.cuh"
#include "kernels/stages.cuh"
#include "plan.hpp"

namespace kvkeep::cuda {

/// Most shared memory that a launch gets without asking for more.
inline constexpr std::size_t plain_shared_bytes = 48 * 1024;

/// A kernel is a struct: its members are the parameters, `operator()` is what each thread does, and
/// `most_threads` and `blocks_per_sm` bound the registers. (A `__global__` function that is no template
/// cannot be in a header that two files include.)
template <class K>
__global__ void __launch_bounds__(K::most_threads, K::blocks_per_sm) start(K const kernel) {
  let_next_start();
  wait_for_previous();
  kernel();
}

/// Does nothing: what it was compiled for is what the others were.
struct empty_kernel {
  static constexpr int most_threads = warp_size, blocks_per_sm = 1;
  __device__ void operator()() const {}
};

/// Lets the context's kernels be placed while those in front of them still run (programmatic dependent
/// launch): each waits on the device until they have ended and their writes are there, so that only the time
/// between two kernels changes. An engine that starts its own kernels behind ours in this way waits there
/// likewise before it reads what ours write. Set-up. All units that start kernels, kvkeep::cuda_ops among them, have to
/// be compiled for the same architectures: older code does not wait.
/// @return unsupported, and nothing changes, if the device or the program's code is older than sm_90
inline status allow_overlap(context& c) noexcept {
  cudaFuncAttributes code{};
  if (cudaFuncGetAttributes(&code, start<empty_kernel>) != cudaSuccess)
    return status::backend_error;
  if (c.capability < 90 || code.ptxVersion < 90) return status::unsupported;
  c.overlap = true;
  return status::ok;
}

/// Starts a kernel on the context's stream. A grid without blocks starts nothing.
/// @param shared dynamic shared memory in bytes
/// @return unsupported where the device has no such grid or not as much shared memory
template <class K>
status launch(context const& c, grid const& g, std::size_t shared, K const& kernel) noexcept {
  static_assert(std::is_trivially_copyable_v<K> && sizeof(K) <= 4096);
  if (g.x == 0 || g.y == 0) return status::ok;
  if (!g.fits() || g.threads > K::most_threads || shared > static_cast<std::size_t>(c.shared_bytes))
    return status::unsupported;
  if (!c.starts) return status::ok;
  // The limit belongs to the kernel, which others may be starting at the same time: it never falls.
  if (shared > plain_shared_bytes &&
      cudaFuncSetAttribute(start<K>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                           static_cast<int>(c.shared_bytes)) != cudaSuccess)
    return status::backend_error;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(g.x), static_cast<unsigned>(g.y));
  config.blockDim = dim3(static_cast<unsigned>(g.threads));
  config.dynamicSmemBytes = shared;
  config.stream = c.stream;
  cudaLaunchAttribute overlap{};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  config.attrs = &overlap;
  config.numAttrs = c.overlap ? 1 : 0;
  if (cudaLaunchKernelEx(&config, start<K>, kernel) == cudaSuccess) return status::ok;
  (void)cudaGetLastError();  // the status says it: the caller's next check shall not find it again
  return status::backend_error;
}

/// Shared memory of stages one after another.
template <class First, class... Rest>
std::size_t most_shared(sequence<First, Rest...> const& stages) noexcept {
  if constexpr (sizeof...(Rest) == 0)
    return stages.first.shared_bytes();
  else
    return std::max(stages.first.shared_bytes(), most_shared(stages.rest));
}

/// The context of an op's launches: while the op measures, they only say whether they fit.
inline context launching(context const& c, workspace const& ws) noexcept {
  context r = c;
  r.starts = !ws.measuring();
  return r;
}

/// An op as a stage: what `stage_of(context, op, workspace)` gives, the scratch taken.
template <class Stage>
struct planned {
  using stage_type = Stage;
  status result = status::ok;  ///< of the checks
  Stage stage{};
};

/// Starts a kernel of stages: a block per head, or two.
template <class Kernel>
status launch_heads(context const& c, index_t n_entries, index_t n_heads, index_t max_slots,
                    std::size_t shared, Kernel const& kernel) noexcept {
  int const of_head = kernel.blocks();
  offset_t const blocks = static_cast<offset_t>(n_entries) * n_heads * of_head;
  int const threads =
      std::min(head_threads(max_slots, blocks, c.n_sm, kernel.threads_per_sm), kernel.most_threads);
  return launch(c, head_grid(n_entries, n_heads, of_head, threads), shared, kernel);
}
template <class... Stages>
status launch_stages(context const& c, index_t n_entries, index_t n_heads, index_t max_slots,
                     sequence<Stages...> const& stages) noexcept {
  return launch_heads(c, n_entries, n_heads, max_slots, most_shared(stages),
                      head_kernel<Stages...>{stages, n_heads});
}

/// Runs an op that is one stage and nothing else.
template <class Op>
status run_stage(context const& c, Op const& o, index_t n_entries, index_t n_heads,
                 index_t max_slots, workspace& ws) noexcept {
  workspace::frame const frame(ws);
  auto const p = stage_of(c, o, ws);
  if (p.result != status::ok) return p.result;
  if (!ws.ok()) return status::workspace_too_small;
  return launch_stages(launching(c, ws), n_entries, n_heads, max_slots, make_sequence(p.stage));
}

/// An array that is given, or will be: while a session measures, its own arrays have no memory yet.
template <class T, int R, class S>
bool asked(tensor_ref<T, R, S> const& t) noexcept {
  return t.data != nullptr || t.extent[0] > 0;
}

/// Whether device code can reach the rows: no layout behind host functions, no opaque elements.
inline bool movable(plane_ref<device_space> const& p) noexcept {
  return p.layout.kind != layout_kind::custom;
}
inline bool readable(plane_ref<device_space> const& p) noexcept {
  return movable(p) && p.type != dtype::opaque;
}

/// Which heads' rows start at multiples of 16 bytes. Where it is only some, the device looks.
enum class alignment : std::uint8_t { none, some, all };

inline alignment alignment_of(plane_ref<device_space> const& p) noexcept {
  any_layout const& l = p.layout;
  // Strides within a head, and between heads, whose lowest bit tells where these may begin.
  auto const of = [&](offset_t within, offset_t between) {
    offset_t const size = dtype_bytes(p.type), bits = between * size | 16, unit = bits & -bits;
    bool const none = within * size % 16 != 0 ||
                      reinterpret_cast<std::uintptr_t>(p.data) % static_cast<unsigned>(unit) != 0;
    return none ? alignment::none : unit == 16 ? alignment::all : alignment::some;
  };
  switch (l.kind) {
    case layout_kind::paged:
      return of(l.paged.block_stride | l.paged.slot_stride, l.paged.head_stride);
    case layout_kind::ragged:
      return of(l.ragged.slot_stride, 1);
    case layout_kind::strided:
      return of(l.strided.slot_stride, l.strided.seq_stride | l.strided.head_stride);
    case layout_kind::custom:
      break;
  }
  return alignment::none;
}

}  // namespace kvkeep::cuda
