// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// Instructions that CUDA C++ has no name for.
#pragma once

#include "fp8.cuh"

namespace kvkeep::cuda {

/// c += a * b for 16 x 8 of c, over 16 elements. Lane l = 4 r + q holds of a the rows r and r + 8 (a0, a2
/// and a1, a3) at 2 q, 2 q + 1 (a0, a1) and 8 more (a2, a3); of b column r at the same places (b0, b1);
/// of c rows r (c[0], c[1]) and r + 8 (c[2], c[3]) at columns 2 q, 2 q + 1.
__device__ inline void mma(bf16, float (&c)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3,
                           unsigned b0, unsigned b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
__device__ inline void mma(fp16, float (&c)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3,
                           unsigned b0, unsigned b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

/// x. The compiler does not know that: it computes anew what follows from the result, rather than keep in
/// registers until here what it has computed from x.
__device__ inline int forgotten(int x) {
  asm volatile("" : "+r"(x));
  return x;
}
__device__ inline block_head forgotten(block_head const& x) {
  return {forgotten(x.entry), forgotten(x.head), x.place, x.n_places};
}

/// 2^x to 2 units in the last place, 0 where the result is no normal number.
__device__ inline float fast_exp2(float x) {
  float r;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
}
/// 1 / x to 1 unit in the last place.
__device__ inline float fast_inverse(float x) {
  float r;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
}

/// 16 aligned bytes of device memory that nobody writes while the kernel runs, but perhaps the one before it, whose end
/// this one has waited for: so not through the read-only path (__ldg), of which nothing promises that it sees them.
/// Volatile: else the compiler takes it for a function of the address, and may move it out of loops, in front of the
/// condition that there is something to read, or in front of that wait.
__device__ inline uint4 read_16(void const* from) {
  uint4 r;
  asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(r.x), "=r"(r.y), "=r"(r.z), "=r"(r.w)
               : "l"(from));
  return r;
}
/// The same with 8 bytes.
__device__ inline uint2 read_8(void const* from) {
  uint2 r;
  asm volatile("ld.global.v2.u32 {%0, %1}, [%2];" : "=r"(r.x), "=r"(r.y) : "l"(from));
  return r;
}
/// Starts copying 16 bytes from device to shared memory, both aligned, or zeros if not `wanted`.
__device__ inline void copy_16(void* to, void const* from, bool wanted) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(
                   static_cast<unsigned>(__cvta_generic_to_shared(to))),
               "l"(from), "r"(wanted ? 16 : 0)
               : "memory");
}
/// The same of 4 bytes.
__device__ inline void copy_4(void* to, void const* from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(
                   static_cast<unsigned>(__cvta_generic_to_shared(to))),
               "l"(from)
               : "memory");
}
/// Ends a group of copies.
__device__ inline void copies_end() { asm volatile("cp.async.commit_group;" ::: "memory"); }
/// Waits for all of this thread's groups but the last `Pending`.
template <int Pending>
__device__ void copies_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
}

/// Lets the next kernel of the stream be placed as soon as all blocks of this one are (sm_90 and newer).
__device__ inline void let_next_start() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
/// Waits until the kernels that this one was placed before the end of have ended (sm_90 and newer).
__device__ inline void wait_for_previous() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

/// One instruction, where to_float takes several.
__device__ inline float fast_float(fp16 x) {
  float r;
  asm("cvt.f32.f16 %0, %1;" : "=f"(r) : "h"(x.bits));
  return r;
}
/// The e4m3 numbers of a word (an instruction for two of them from sm_89 on).
__device__ inline void floats_of_e4m3(unsigned word, float (&x)[4]) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
  unsigned low, high;
  asm("{ .reg .b16 l, h; mov.b32 {l, h}, %2; cvt.rn.f16x2.e4m3x2 %0, l; cvt.rn.f16x2.e4m3x2 %1, h; "
      "}"
      : "=r"(low), "=r"(high)
      : "r"(word));
  constexpr float unit = 1;
#else
  unsigned const low = low_halves(word, true), high = high_halves(word, true);
  constexpr float unit = 256;
#endif
  x[0] = fast_float(fp16{static_cast<std::uint16_t>(low & 0xffffu)}) * unit;
  x[1] = fast_float(fp16{static_cast<std::uint16_t>(low >> 16)}) * unit;
  x[2] = fast_float(fp16{static_cast<std::uint16_t>(high & 0xffffu)}) * unit;
  x[3] = fast_float(fp16{static_cast<std::uint16_t>(high >> 16)}) * unit;
}

}  // namespace kvkeep::cuda
