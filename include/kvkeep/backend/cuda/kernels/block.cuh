// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// What kernels share: shared memory, reductions and scans over a block.
/// Rules: one-dimensional blocks of whole warps; shared memory is dynamic; warp operations by all lanes.
#pragma once

#include <cuda_runtime.h>

#include <utility>

#include "../../../core/types.hpp"

namespace kvkeep::cuda {

inline constexpr unsigned all_lanes = 0xffffffffu;
inline constexpr int warp_size = 32;
inline constexpr float largest_float = 3.402823466e+38f;
inline constexpr float least_normal_float = 1.17549435e-38f;

/// The block's dynamic shared memory.
extern __shared__ uint4 shared_words[];

/// Hands out pieces of the block's shared memory, 16-byte aligned, in the order of the calls.
class shared_pieces {
 public:
  template <class T>
  __device__ T* take(offset_t n) {
    T* const r = reinterpret_cast<T*>(reinterpret_cast<char*>(shared_words) + at_);
    at_ += (n * static_cast<offset_t>(sizeof(T)) + 15) / 16 * 16;
    return r;
  }
  /// Bytes that `take<T>(n)` uses, for the launch.
  template <class T>
  static constexpr std::size_t bytes(offset_t n) {
    return static_cast<std::size_t>((n * static_cast<offset_t>(sizeof(T)) + 15) / 16 * 16);
  }

 private:
  offset_t at_ = 0;
};

__device__ inline int thread_of_block() { return static_cast<int>(threadIdx.x); }
__device__ inline int threads_of_block() { return static_cast<int>(blockDim.x); }
__device__ inline int lane_of_warp() { return static_cast<int>(threadIdx.x % warp_size); }
__device__ inline int warp_of_block() { return static_cast<int>(threadIdx.x / warp_size); }
__device__ inline int warps_of_block() { return static_cast<int>(blockDim.x / warp_size); }

/// Entry and KV head of a block of a head_grid.
struct block_head {
  index_t entry, head;
  __device__ explicit block_head(index_t n_heads)
      : entry(static_cast<index_t>(blockIdx.x) / n_heads),
        head(static_cast<index_t>(blockIdx.x) % n_heads) {}
};

/// f over the warp, the same value in every lane; a fixed order, so floats give the same bits each time.
template <class T, class F>
__device__ T warp_reduce(T x, F f) {
  for (int step = warp_size / 2; step > 0; step /= 2) x = f(x, __shfl_xor_sync(all_lanes, x, step));
  return x;
}

/// f over the block in a fixed order; every thread gets the result. @param box [warps] shared
template <class T, class F>
__device__ T block_reduce(T x, T* box, F f) {
  x = warp_reduce(x, f);
  __syncthreads();  // the box may still be read for an earlier reduction
  if (lane_of_warp() == 0) box[warp_of_block()] = x;
  __syncthreads();
  T r = box[0];
  for (int w = 1; w < warps_of_block(); ++w) r = f(r, box[w]);
  return r;
}

/// Calls f(0) .. f(N - 1), one after another in the code, so that arrays they index stay in registers.
template <class F, int... I>
__device__ void unrolled(F const& f, std::integer_sequence<int, I...>) {
  (f(I), ...);
}
template <int N, class F>
__device__ void unrolled(F const& f) {
  unrolled(f, std::make_integer_sequence<int, N>{});
}

struct add {
  template <class T>
  __device__ T operator()(T a, T b) const {
    return a + b;
  }
};
struct larger {
  template <class T>
  __device__ T operator()(T a, T b) const {
    return a < b ? b : a;
  }
};
struct smaller {
  template <class T>
  __device__ T operator()(T a, T b) const {
    return b < a ? b : a;
  }
};

/// Sum of the values of lower threads of the block, and of all. Integers. @param box [warps] shared
template <class T>
struct prefix_sum {
  T before{};
  T total{};
};
template <class T>
__device__ prefix_sum<T> sum_before(T own, T* box) {
  T sum = own;
  for (int step = 1; step < warp_size; step *= 2) {
    T const below = __shfl_up_sync(all_lanes, sum, static_cast<unsigned>(step));
    if (lane_of_warp() >= step) sum += below;
  }
  __syncthreads();  // the box may still be read for an earlier sum
  if (lane_of_warp() == warp_size - 1) box[warp_of_block()] = sum;
  __syncthreads();
  prefix_sum<T> r{sum - own, T{}};
  for (int w = 0; w < warps_of_block(); ++w) {
    if (w < warp_of_block()) r.before += box[w];
    r.total += box[w];
  }
  return r;
}

/// Number of set flags in lower threads of the block, and in all of it. @param box [warps + 1] shared
struct flag_rank {
  int before = 0;
  int total = 0;
};
__device__ inline flag_rank rank_flags(bool flag, int* box) {
  unsigned const set = __ballot_sync(all_lanes, flag);
  __syncthreads();
  if (lane_of_warp() == 0) box[warp_of_block()] = __popc(set);
  __syncthreads();
  flag_rank r;
  for (int w = 0; w < warps_of_block(); ++w) {
    if (w < warp_of_block()) r.before += box[w];
    r.total += box[w];
  }
  r.before += __popc(set & ((1u << lane_of_warp()) - 1));
  return r;
}

}  // namespace kvkeep::cuda
