// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// What kernels share: shared memory, reductions and scans over a block.
/// Rules: one-dimensional blocks of whole warps; shared memory is dynamic; warp operations by all lanes.
#pragma once

#include <cuda_runtime.h>

#include <limits>
#include <type_traits>
#include <utility>

#include "../../../core/types.hpp"

/// Before a loop: how often its body shall be in the code.
#ifdef __CUDACC__
#define KVKEEP_PRAGMA(x) _Pragma(#x)
#define KVKEEP_UNROLL(n) KVKEEP_PRAGMA(unroll n)
#else
#define KVKEEP_UNROLL(n)
#endif

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

/// What is read at once.
struct alignas(16) four_floats {
  float x[4];
};

/// What a block works on: entry and KV head, or an entry with all of its heads as head 0.
struct block_head {
  index_t entry, head;
  index_t place;     ///< its number among those that blocks work on,
  index_t n_places;  ///< and how many there are

  /// Of a head_grid.
  __device__ explicit block_head(index_t n_heads)
      : entry(static_cast<index_t>(blockIdx.x) / n_heads),
        head(static_cast<index_t>(blockIdx.x) % n_heads),
        place(static_cast<index_t>(blockIdx.x)),
        n_places(static_cast<index_t>(gridDim.x)) {}
  __device__ block_head(index_t e, index_t h, index_t p, index_t n)
      : entry(e), head(h), place(p), n_places(n) {}
  /// The entry that this head is one of `n_heads` of.
  __device__ block_head whole_entry(index_t n_heads) const {
    return {entry, 0, entry, n_places / n_heads};
  }
};

/// Of the blocks that share a ticket, `n` of them: whether this is the last one to come. It may read then what the
/// others have written before. By all threads. @param ticket  0 before the first one comes, and after the last
__device__ inline bool last_to_come(unsigned* ticket, index_t n) {
  __syncthreads();  // of what the block has written
  bool last = false;
  if (thread_of_block() == 0) {
    __threadfence();
    unsigned const end = static_cast<unsigned>(n) - 1;
    last = atomicInc(ticket, end) == end;
    __threadfence();
  }
  return __syncthreads_or(last ? 1 : 0) != 0;
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

/// What reductions reduce by; `none<T>` changes nothing.
struct add {
  template <class T>
  static constexpr T none = T{};
  template <class T>
  __device__ T operator()(T a, T b) const {
    return a + b;
  }
};
struct larger {
  template <class T>
  static constexpr T none = std::numeric_limits<T>::lowest();
  template <class T>
  __device__ T operator()(T a, T b) const {
    return a < b ? b : a;
  }
};
struct smaller {
  template <class T>
  static constexpr T none = std::numeric_limits<T>::max();
  template <class T>
  __device__ T operator()(T a, T b) const {
    return b < a ? b : a;
  }
};

/// f over the warp, the same value in every lane; a fixed order, so floats give the same bits each time.
template <class T, class F>
__device__ T warp_reduce(T x, F f) {
  for (int step = warp_size / 2; step > 0; step /= 2) x = f(x, __shfl_xor_sync(all_lanes, x, step));
  return x;
}
/// By one instruction,
__device__ inline int warp_reduce(int x, add) { return __reduce_add_sync(all_lanes, x); }
__device__ inline int warp_reduce(int x, larger) { return __reduce_max_sync(all_lanes, x); }
__device__ inline int warp_reduce(int x, smaller) { return __reduce_min_sync(all_lanes, x); }
/// and by two: of the least upper halves the least lower half.
__device__ inline unsigned long long warp_reduce(unsigned long long x, smaller) {
  unsigned const upper = static_cast<unsigned>(x >> 32);
  unsigned const least = __reduce_min_sync(all_lanes, upper);
  unsigned const lower = upper == least ? static_cast<unsigned>(x) : 0xffffffffu;
  return static_cast<unsigned long long>(least) << 32 | __reduce_min_sync(all_lanes, lower);
}

/// First half of a reduction over the block: between it and the second there is a barrier.
/// @param box [warps] shared
template <class T, class F>
__device__ void leave_for_block(T x, T* box, F f) {
  x = warp_reduce(x, f);
  if (lane_of_warp() == 0) box[warp_of_block()] = x;
}
/// Second half: every thread gets the result.
template <class T, class F>
__device__ T take_of_block(T const* box, F f) {
  if constexpr (std::is_integral_v<T>) {
    T r = F::template none<T>;
    if (lane_of_warp() < warps_of_block()) r = box[lane_of_warp()];
    return warp_reduce(r, f);
  } else {
    T r = box[0];
    for (int w = 1; w < warps_of_block(); ++w) r = f(r, box[w]);
    return r;
  }
}

/// f over the block in a fixed order; every thread gets the result. @param box [warps] shared
template <class T, class F>
__device__ T block_reduce(T x, T* box, F f) {
  __syncthreads();  // the box may still be read for an earlier reduction
  leave_for_block(x, box, f);
  __syncthreads();
  return take_of_block(box, f);
}

/// Sums of x[0], .. x[Live - 1] over the lanes that differ in the bits Step, Step / 2, .. Last, in that
/// order. At each bit a lane gives away half of the numbers, so it ends with its own share of them: with
/// those that its bits, the highest first, point to. The last number is not halved but doubled.
template <int Step, int Last, int Live, class T, int N>
__device__ void share_sums(T (&x)[N]) {
  if constexpr (Step < Last) {
    return;
  } else if constexpr (Live == 1) {
    x[0] += __shfl_xor_sync(all_lanes, x[0], Step);
    share_sums<Step / 2, Last, 1>(x);
  } else {
    constexpr int half = Live / 2;
    bool const upper = (lane_of_warp() & Step) != 0;
    for (int i = 0; i < half; ++i) {
      T const give = upper ? x[i] : x[i + half];
      T const keep = upper ? x[i + half] : x[i];
      x[i] = keep + __shfl_xor_sync(all_lanes, give, Step);
    }
    share_sums<Step / 2, Last, half>(x);
  }
}

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

/// Number of set bits below the lane's.
__device__ inline unsigned rank_in(unsigned set) {
  return static_cast<unsigned>(__popc(set & ((1u << lane_of_warp()) - 1)));
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
  r.before += static_cast<int>(rank_in(set));
  return r;
}

/// use(g, load(g)) for the query heads of a group, in order. Loads come four at a time, so that no more of them
/// wait for others than must.
template <class Load, class Use>
__device__ void each_query_head(index_t group, Load const& load, Use const& use) {
  constexpr int at_once = 4;
  for (index_t first = 0; first < group; first += at_once) {
    decltype(load(first)) loaded[at_once];
    unrolled<at_once>([&](int i) { loaded[i] = load(min(first + i, group - 1)); });
    unrolled<at_once>([&](int i) {
      if (first + i < group) use(first + i, loaded[i]);
    });
  }
}

}  // namespace kvkeep::cuda
