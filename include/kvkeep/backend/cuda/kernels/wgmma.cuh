// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// Hopper's products of a warpgroup (four warps, the first one's number a multiple of four), which run beside
/// what its threads do until they wait. Code for sm_90a alone has them; other device code traps, and no host
/// code chooses it (warpgroups_multiply in window_plan.hpp).
/// Facts from the PTX manual: "Asynchronous Warpgroup Level Matrix Instructions", "Async Proxy".
#pragma once

#include "block.cuh"

namespace kvkeep::cuda {

inline constexpr index_t group_rows = 64;     ///< rows of a warpgroup's product
inline constexpr index_t group_columns = 64;  ///< columns of ours

/// 64 x 64 products of a warpgroup. Warp w of it has rows 16 w to 16 w + 15; its lane 4 r + q holds rows r
/// ([e][0], [e][1]) and r + 8 ([e][2], [e][3]) at columns 8 e + 2 q and 8 e + 2 q + 1: as of 8 mma.sync.
using group_products = float[group_columns / 8][4];

/// Address in shared memory, as descriptors count.
__device__ inline unsigned shared_address(void const* p) {
  return static_cast<unsigned>(__cvta_generic_to_shared(p));
}

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define KVKEEP_SM90A_ASM(...) asm volatile(__VA_ARGS__)
#else
#define KVKEEP_SM90A_ASM(...) __trap()
#endif

// The 32 accumulators, in the text (their numbers) and as operands.
#define KVKEEP_SUMS_TEXT                                                              \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, " \
  "%18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}"
#define KVKEEP_SUMS_OF_8(e) "+f"(z[e][0]), "+f"(z[e][1]), "+f"(z[e][2]), "+f"(z[e][3])
#define KVKEEP_SUMS                                                                   \
  KVKEEP_SUMS_OF_8(0), KVKEEP_SUMS_OF_8(1), KVKEEP_SUMS_OF_8(2), KVKEEP_SUMS_OF_8(3), \
      KVKEEP_SUMS_OF_8(4), KVKEEP_SUMS_OF_8(5), KVKEEP_SUMS_OF_8(6), KVKEEP_SUMS_OF_8(7)

// z = a * b (+ z if `add`) over 16 elements: a from registers or by descriptor, b by descriptor.
#define KVKEEP_DEFINE_PRODUCTS(type, name)                                               \
  __device__ inline void start_products(type, group_products& z, unsigned const(&a)[4],  \
                                        unsigned long long b, bool add) {                \
    KVKEEP_SM90A_ASM(                                                                    \
        "{\n.reg .pred p;\nsetp.ne.b32 p, %37, 0;\n"                                     \
        "wgmma.mma_async.sync.aligned.m64n64k16.f32." name "." name " " KVKEEP_SUMS_TEXT \
        ", {%32, %33, %34, %35}, %36, p, 1, 1, 0;\n}\n"                                  \
        : KVKEEP_SUMS                                                                    \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add ? 1 : 0));         \
  }                                                                                      \
  __device__ inline void start_products(type, group_products& z, unsigned long long a,   \
                                        unsigned long long b, bool add) {                \
    KVKEEP_SM90A_ASM(                                                                    \
        "{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n"                                     \
        "wgmma.mma_async.sync.aligned.m64n64k16.f32." name "." name " " KVKEEP_SUMS_TEXT \
        ", %32, %33, p, 1, 1, 0, 0;\n}\n"                                                \
        : KVKEEP_SUMS                                                                    \
        : "l"(a), "l"(b), "r"(add ? 1 : 0));                                             \
  }

/// Start products that products_end and products_wait deal with. Of `a`, rows as in group_products: a[0] row r
/// and a[1] row r + 8 at elements 2 q, 2 q + 1; a[2] and a[3] the same rows, 8 elements further. Until the wait
/// nobody touches z, a, or the shared memory. All threads of the warpgroup; products_begin goes before.
/// @param b  of 64 rows, which are the columns  @param add  to what z is; else z is overwritten
KVKEEP_DEFINE_PRODUCTS(bf16, "bf16")
KVKEEP_DEFINE_PRODUCTS(fp16, "f16")

/// Before the first products, and wherever this thread has touched their registers since.
__device__ inline void products_begin() {
  KVKEEP_SM90A_ASM("wgmma.fence.sync.aligned;" ::: "memory");
}
/// Ends a group of products.
__device__ inline void products_end() {
  KVKEEP_SM90A_ASM("wgmma.commit_group.sync.aligned;" ::: "memory");
}
/// Waits for all groups but the last `Pending`; then z, which is one of the others', may be used.
template <int Pending>
__device__ void products_wait([[maybe_unused]] group_products& z) {
  KVKEEP_SM90A_ASM("wgmma.wait_group.sync.aligned %0;" ::"n"(Pending) : "memory");
  KVKEEP_SM90A_ASM("" : KVKEEP_SUMS);  // no use of z moves in front of this
}

/// Stores what products will read.
__device__ inline void store_16(uint4* to, uint4 const& value) { *to = value; }
/// What this thread has written to shared memory, or copied there and waited for, becomes visible to products.
/// A barrier has to follow where other threads start them.
__device__ inline void writes_to_products() {
  KVKEEP_SM90A_ASM("fence.proxy.async.shared::cta;" ::: "memory");
}

/// A barrier of all threads of the block that may stand in more than one place: warps meet wherever each is.
__device__ inline void block_meets() {
  asm volatile("barrier.sync 1, %0;" ::"r"(threads_of_block()) : "memory");
}

#undef KVKEEP_DEFINE_PRODUCTS
#undef KVKEEP_SUMS
#undef KVKEEP_SUMS_OF_8
#undef KVKEEP_SUMS_TEXT
#undef KVKEEP_SM90A_ASM

}  // namespace kvkeep::cuda
