// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// Stands in for the library's header of the same name, found first by the include path: the same
/// functions in C++, by the fragment layouts that the PTX manual gives.
#pragma once

#include <kvkeep/core/types.hpp>

#include <kvkeep/backend/cuda/kernels/fp8.cuh>

#include <cuda_runtime.h>

namespace emulation {

/// Follow the copies for products of warpgroups (warpgroups.cpp).
void note_copy(void const* to);
void note_copies_end();
void note_copies_wait(int pending);

}  // namespace emulation

namespace kvkeep::cuda {

extern uint4 shared_words[];

template <class T>
T forgotten(T const& x) {
  return x;
}

/// Operands of a warp's last two products: a lane may be one ahead of the others.
struct emulated_operands {
  struct {
    unsigned a[4], b[2];
  } lane[2][32];
};
inline emulated_operands emulated_warps[32];
inline unsigned emulated_turn[1024];

/// Not watched: the operands stand for registers.
template <class T>
__attribute__((no_sanitize("thread"))) void mma(T, float (&c)[4], unsigned a0, unsigned a1,
                                                unsigned a2, unsigned a3, unsigned b0,
                                                unsigned b1) {
  unsigned const thread = emulation::linear_thread(), lane = thread % 32;
  auto& operands = emulated_warps[thread / 32].lane[emulated_turn[thread]++ % 2];
  operands[lane] = {{a0, a1, a2, a3}, {b0, b1}};
  emulation::warp_exchange(0, emulation::all_lanes, "mma");
  auto const value = [](unsigned word, unsigned k) {
    T x;
    x.bits = static_cast<std::uint16_t>(word >> 16 * (k % 2));
    return static_cast<double>(to_float(x));
  };
  for (unsigned i = 0; i < 4; ++i) {
    unsigned const row = lane / 4, column = lane % 4 * 2 + i % 2;
    double sum = static_cast<double>(c[i]);
    for (unsigned k = 0; k < 16; ++k) {
      unsigned const quad = k % 8 / 2, upper = k / 8;
      sum += value(operands[4 * row + quad].a[2 * upper + i / 2], k) *
             value(operands[4 * column + quad].b[upper], k);
    }
    c[i] = static_cast<float>(sum);
  }
}

inline float fast_exp2(float x) { return x < -126.0f ? 0.0f : std::exp2(x); }
inline float fast_inverse(float x) { return 1 / x; }

inline uint4 read_16(void const* from) {
  if (reinterpret_cast<std::uintptr_t>(from) % 16 != 0)
    emulation::fail("reads 16 bytes that are not aligned");
  return *static_cast<uint4 const*>(from);
}
inline uint2 read_8(void const* from) {
  if (reinterpret_cast<std::uintptr_t>(from) % 8 != 0)
    emulation::fail("reads 8 bytes that are not aligned");
  return *static_cast<uint2 const*>(from);
}
inline void copy_16(void* to, void const* from, bool wanted) {
  emulation::start_copy(to, from, wanted ? 16 : 0, wanted ? 0 : 16);
  emulation::note_copy(to);
}
inline void copy_4(void* to, void const* from) { emulation::start_copy(to, from, 4, 0); }
inline void copies_end() {
  emulation::end_copy_group();
  emulation::note_copies_end();
}
template <int Pending>
void copies_wait() {
  emulation::wait_copy_groups(Pending);
  emulation::note_copies_wait(Pending);
}

inline void let_next_start() { emulation::let_next_start(); }
inline void wait_for_previous() { emulation::wait_for_previous(); }

inline float fast_float(fp16 x) { return to_float(x); }
/// As before sm_89.
inline void floats_of_e4m3(unsigned word, float (&x)[4]) {
  unsigned const halves[] = {low_halves(word, true), high_halves(word, true)};
  for (int i = 0; i < 4; ++i)
    x[i] = 256 * to_float(fp16{static_cast<std::uint16_t>(halves[i / 2] >> i % 2 * 16)});
}

}  // namespace kvkeep::cuda
