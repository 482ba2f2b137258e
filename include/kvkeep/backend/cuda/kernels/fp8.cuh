// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// FP8 numbers as fp16 ones, two in a word, by integer arithmetic.
#pragma once

#include "block.cuh"

namespace kvkeep::cuda {

/// Two bytes in the upper halves of 16-bit numbers are e5m2 as they are. e4m3 has a bit less of exponent: shifted by
/// one it is 2^8 smaller, and its NaN is one of fp16 only when it is made so.
__device__ inline unsigned halves_of(unsigned spread, bool e4m3) {
  if (!e4m3) return spread;
  unsigned const body = (spread & 0x7f007f00u) >> 1;
  unsigned const nan = (body + 0x00800080u) >> 14 & 0x00010001u;
  return (spread & 0x80008000u) | body | nan * 0x7e00u;
}
/// Bytes 0 and 1 of a word.
__device__ inline unsigned low_halves(unsigned word, bool e4m3) {
  return halves_of((word & 0xffu) << 8 | (word & 0xff00u) << 16, e4m3);
}
/// Bytes 2 and 3.
__device__ inline unsigned high_halves(unsigned word, bool e4m3) {
  return halves_of((word >> 8 & 0xff00u) | (word & 0xff000000u), e4m3);
}

}  // namespace kvkeep::cuda
