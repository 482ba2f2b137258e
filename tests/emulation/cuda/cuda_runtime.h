// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// Stands in for the CUDA Toolkit's header, so that a host compiler builds the CUDA backend and the op
/// tests run its kernels without a device. Threads of a block are fibers that change places where they
/// meet; blocks run one after another. It knows what our kernels use, and refuses what they must not:
/// a barrier that some thread misses, a warp operation in part of a warp. Shared memory starts poisoned,
/// and the order of threads between barriers is drawn anew each time, so that a missing barrier shows.
/// Together with race_check.cpp a missing barrier is reported whatever the order, and so are threads that
/// meet from several places of the code; with the address sanitizer shared memory ends where the launch
/// says. Not a model of time.
#pragma once

#include <algorithm>
#include <atomic>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <tuple>
#include <type_traits>

#define KVKEEP_EMULATION
#define __global__
#define __device__
#define __host__
#define __shared__
#define __forceinline__ inline
#define __launch_bounds__(...)

// -- vector types -----------------------------------------------------------------------------------
struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned a = 1, unsigned b = 1, unsigned c = 1) : x(a), y(b), z(c) {}
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
constexpr float2 make_float2(float x, float y) { return {x, y}; }
constexpr float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
constexpr uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
constexpr uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

/// Where the running fiber stands: changed at every switch.
inline uint3 threadIdx{}, blockIdx{};
inline dim3 blockDim, gridDim;

// -- the fibers -------------------------------------------------------------------------------------
namespace emulation {

inline constexpr unsigned warp_size = 32, all_lanes = 0xffffffffu;

/// How a kernel was started.
struct started {
  char const* kernel;  ///< its name, for messages
  dim3 grid, block;
  std::size_t shared_bytes;
  bool overlapped;  ///< perhaps before those in front have ended
};
/// Runs `body` once per thread of one block after another.
void run_grid(started const& how, std::function<void()> const& body);
/// Every thread of an overlapped kernel calls these, one after the other, before it touches memory.
void let_next_start();
void wait_for_previous();
/// Says where the running thread stands, and ends the program.
[[noreturn]] void fail(char const* what);

/// Barriers that a thread has passed, and whether it has come to its kernel and waited for those in front.
struct sync_count {
  unsigned block = 0, warp = 0;
  bool entered = false, previous = false;
};
/// The running thread's place in time, for whoever watches its accesses (race_check.cpp).
struct place_in_time {
  bool running = false, overlapped = false;
  unsigned launch = 0, block = 0;  ///< how many have been started
  unsigned thread = 0;             ///< in its block
  sync_count syncs;
  void const* stack = nullptr;
  std::size_t stack_bytes = 0;
  std::function<void()> const* body = nullptr;  ///< of run_grid, which lies on the host's stack
  char const* kernel = "";
};
inline place_in_time standing;

/// Where in the code the running thread is, calls included: the same number for the same place. There in a
/// program that checks it (race_check.cpp).
[[gnu::weak, gnu::noinline]] std::uint64_t place_in_code();

/// Waits until every thread of the block has come. @return for each thread the number of those that
/// brought `true`  @param anywhere  whether they may come from several places of the code
int block_barrier(bool value, bool anywhere = false);
/// Waits for the warp, exchanging 8 bytes per lane. @return 32 values, valid until the next call
std::uint64_t const* warp_exchange(std::uint64_t value, unsigned mask, char const* what);
/// The same, and what lanes have written before it may be read after it: an exchange alone promises
/// nothing of memory.
void warp_barrier(unsigned mask);

/// Makes the thread's writes, and those that it has seen, visible to who sees what it writes from now on; and
/// the other way round, after a count.
void fence();
/// The block is counted among those that have come to a ticket.
void count_block(void const* ticket);
/// Whether a block came to a ticket before the running one, with fences between.
bool has_seen(unsigned block);

/// Copies that have been started and not been waited for (cp.async).
void start_copy(void* to, void const* from, std::size_t bytes, std::size_t zeros);
void end_copy_group();
void wait_copy_groups(int pending);

/// Calls into the runtime since the program started, by kind.
struct calls {
  long launches = 0;  ///< of kernels, and recordings of them
  long settings = 0;  ///< cudaFuncSetAttribute, cudaFuncGetAttributes
  long others = 0;    ///< memory, streams, devices, graphs; not what makes streams wait for each other
};
calls& count() noexcept;

template <class T>
std::uint64_t pack(T x) noexcept {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable_v<T>);
  std::uint64_t r = 0;
  std::memcpy(&r, &x, sizeof x);
  return r;
}
template <class T>
T unpack(std::uint64_t x) noexcept {
  T r;
  std::memcpy(&r, &x, sizeof r);
  return r;
}
inline unsigned linear_thread() noexcept {
  return threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
}
inline unsigned lane() noexcept { return linear_thread() % warp_size; }
/// f over what the warp's lanes bring.
template <class T, class F>
T reduce_lanes(T x, unsigned mask, char const* what, F const& f) {
  std::uint64_t const* const all = warp_exchange(pack(x), mask, what);
  T r = unpack<T>(all[0]);
  for (unsigned l = 1; l < 32; ++l) r = f(r, unpack<T>(all[l]));
  return r;
}

}  // namespace emulation

// -- barriers and warp operations -------------------------------------------------------------------
inline void __syncthreads() { emulation::block_barrier(false); }
inline int __syncthreads_count(int x) { return emulation::block_barrier(x != 0); }
inline int __syncthreads_or(int x) { return emulation::block_barrier(x != 0) != 0; }
inline int __syncthreads_and(int x) { return emulation::block_barrier(x == 0) == 0; }
inline void __syncwarp(unsigned mask = emulation::all_lanes) { emulation::warp_barrier(mask); }
template <class T>
T __shfl_sync(unsigned mask, T x, int from, int width = 32) {
  unsigned const l = emulation::lane(), w = static_cast<unsigned>(width);
  return emulation::unpack<T>(emulation::warp_exchange(
      emulation::pack(x), mask, "__shfl_sync")[l / w * w + static_cast<unsigned>(from) % w]);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T x, int bits, int = 32) {
  unsigned const l = emulation::lane();
  return emulation::unpack<T>(emulation::warp_exchange(
      emulation::pack(x), mask, "__shfl_xor_sync")[l ^ static_cast<unsigned>(bits)]);
}
template <class T>
T __shfl_up_sync(unsigned mask, T x, unsigned by, int = 32) {
  unsigned const l = emulation::lane();
  return emulation::unpack<T>(
      emulation::warp_exchange(emulation::pack(x), mask, "__shfl_up_sync")[l >= by ? l - by : l]);
}
template <class T>
T __shfl_down_sync(unsigned mask, T x, unsigned by, int = 32) {
  unsigned const l = emulation::lane();
  return emulation::unpack<T>(emulation::warp_exchange(
      emulation::pack(x), mask, "__shfl_down_sync")[l + by < 32 ? l + by : l]);
}
inline unsigned __ballot_sync(unsigned mask, int x) {
  std::uint64_t const* const all = emulation::warp_exchange(x != 0 ? 1 : 0, mask, "__ballot_sync");
  unsigned r = 0;
  for (unsigned l = 0; l < 32; ++l) r |= static_cast<unsigned>(all[l]) << l;
  return r;
}
inline int __reduce_add_sync(unsigned mask, int x) {
  return emulation::reduce_lanes(x, mask, "__reduce_add_sync", [](int a, int b) {
    return static_cast<int>(static_cast<unsigned>(a) + static_cast<unsigned>(b));
  });
}
inline int __reduce_max_sync(unsigned mask, int x) {
  return emulation::reduce_lanes(x, mask, "__reduce_max_sync",
                                 [](int a, int b) { return std::max(a, b); });
}
template <class T>
requires std::is_same_v<T, int> || std::is_same_v<T, unsigned> T __reduce_min_sync(unsigned mask,
                                                                                   T x) {
  return emulation::reduce_lanes(x, mask, "__reduce_min_sync",
                                 [](T a, T b) { return std::min(a, b); });
}
inline int __any_sync(unsigned mask, int x) { return __ballot_sync(mask, x) != 0; }
inline int __all_sync(unsigned mask, int x) {
  return __ballot_sync(mask, x) == emulation::all_lanes;
}

// -- scalar functions -------------------------------------------------------------------------------
inline int __popc(unsigned x) { return std::popcount(x); }
inline int __clz(int x) { return std::countl_zero(static_cast<unsigned>(x)); }
inline int __ffs(int x) { return x == 0 ? 0 : std::countr_zero(static_cast<unsigned>(x)) + 1; }
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline int __float_as_int(float x) { return std::bit_cast<int>(x); }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline float __int_as_float(int x) { return std::bit_cast<float>(x); }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float a) { return std::sqrt(a); }
inline float __expf(float x) { return std::exp(x); }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline int min(int a, int b) { return b < a ? b : a; }
inline int max(int a, int b) { return a < b ? b : a; }
inline unsigned min(unsigned a, unsigned b) { return b < a ? b : a; }
inline unsigned max(unsigned a, unsigned b) { return a < b ? b : a; }
inline long long min(long long a, long long b) { return b < a ? b : a; }
inline long long max(long long a, long long b) { return a < b ? b : a; }
inline float min(float a, float b) { return std::fmin(a, b); }
inline float max(float a, float b) { return std::fmax(a, b); }
template <class T>
T __ldg(T const* p) {
  return *p;
}

// Of memory they promise nothing but their own word.
template <class T>
T atomicAdd(T* p, T x) {
  return std::atomic_ref<T>(*p).fetch_add(x, std::memory_order_relaxed);
}
template <class T>
T atomicExch(T* p, T x) {
  return std::atomic_ref<T>(*p).exchange(x, std::memory_order_relaxed);
}

inline void __threadfence() { emulation::fence(); }
inline unsigned atomicInc(unsigned* p, unsigned last) {
  emulation::count_block(p);
  std::atomic_ref<unsigned> const count(*p);
  unsigned const was = count.fetch_add(1, std::memory_order_relaxed);
  if (was >= last) count.exchange(0, std::memory_order_relaxed);
  return was;
}

// -- runtime ----------------------------------------------------------------------------------------
enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorMemoryAllocation = 2,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorStreamCaptureUnsupported = 900,
  cudaErrorStreamCaptureInvalidated = 901,
  cudaErrorStreamCaptureUnjoined = 904,
  cudaErrorStreamCaptureIsolation = 905,
  cudaErrorStreamCaptureImplicit = 906
};
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrComputeCapabilityMinor,
  cudaDevAttrConcurrentManagedAccess
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
using cudaStream_t = struct emulated_stream*;
using cudaEvent_t = struct emulated_event*;
namespace emulation {
/// The stream puts its work off, mostly until somebody waits for it.
void dawdle(cudaStream_t stream);
/// Kernels that it has been given.
long launches(cudaStream_t stream) noexcept;
}  // namespace emulation
enum cudaStreamCaptureMode {
  cudaStreamCaptureModeGlobal,
  cudaStreamCaptureModeThreadLocal,
  cudaStreamCaptureModeRelaxed
};
using cudaGraph_t = struct emulated_graph*;
using cudaGraphExec_t = struct emulated_graph_exec*;
enum cudaLaunchAttributeID { cudaLaunchAttributeProgrammaticStreamSerialization = 6 };
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    int programmaticStreamSerializationAllowed;
  } val;
};
struct cudaFuncAttributes {
  int ptxVersion;
};
struct cudaLaunchConfig_t {
  dim3 gridDim;
  dim3 blockDim;
  std::size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

char const* cudaGetErrorString(cudaError_t e);
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaGetDeviceCount(int* devices);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr what, int device);
cudaError_t cudaMallocManaged(void** p, std::size_t bytes);
cudaError_t cudaFree(void* p);
cudaError_t cudaStreamCreate(cudaStream_t* stream);
cudaError_t cudaStreamDestroy(cudaStream_t stream);
cudaError_t cudaStreamSynchronize(cudaStream_t stream);
enum { cudaEventDisableTiming = 2 };
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned flags);
cudaError_t cudaEventDestroy(cudaEvent_t event);
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream);
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned flags);
cudaError_t cudaGetLastError();
cudaError_t cudaMemsetAsync(void* p, int value, std::size_t bytes, cudaStream_t stream);
/// Kernels launched from here on are recorded with copies of their arguments instead of run. Any other
/// call but cudaFuncSetAttribute and those of events spoils the recording: stricter than a device, which allows some.
/// A stream that waits for the captured one is captured with it, and has to be waited for before the end. Replays run
/// what streams have recorded in any order that events allow.
cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode mode);
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph);
cudaError_t cudaGraphInstantiate(cudaGraphExec_t* exec, cudaGraph_t graph,
                                 unsigned long long flags = 0);
cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t stream);
cudaError_t cudaGraphDestroy(cudaGraph_t graph);
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec);
cudaError_t emulated_check(cudaLaunchConfig_t const& c);
/// Runs `work`, or records it where the stream is being captured, or puts it off where the stream dawdles.
cudaError_t emulated_launch(cudaStream_t stream, std::function<void()> work);

template <class K>
cudaError_t cudaFuncSetAttribute(K*, cudaFuncAttribute, int) {
  ++emulation::count().settings;
  return cudaSuccess;
}

template <class K>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* a, K*) {
  ++emulation::count().settings;
  *a = {90};
  return cudaSuccess;
}

template <class... P, class... A>
cudaError_t cudaLaunchKernelEx(cudaLaunchConfig_t const* c, void (*kernel)(P...), A&&... args) {
  if (cudaError_t const e = emulated_check(*c); e != cudaSuccess) return e;
  bool const overlapped = c->numAttrs > 0 &&
                          c->attrs->id == cudaLaunchAttributeProgrammaticStreamSerialization &&
                          c->attrs->val.programmaticStreamSerializationAllowed != 0;
  emulation::started const how{__PRETTY_FUNCTION__, c->gridDim, c->blockDim, c->dynamicSmemBytes,
                               overlapped};
  return emulated_launch(c->stream, [how, kernel,
                                     copies = std::tuple<P...>(static_cast<P>(args)...)] {
    emulation::run_grid(how, [&] { std::apply([&](auto const&... p) { kernel(p...); }, copies); });
  });
}
