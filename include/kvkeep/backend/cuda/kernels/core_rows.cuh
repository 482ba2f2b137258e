// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// Rows of 16-bit numbers in shared memory, where a warpgroup's products read them. Threads copy them there
/// piece by piece, whatever the layout of keys: a tensor map would need a call of the driver for every layer
/// at set-up and boxes of one shape, and what it saves is not what bounds these kernels.
#pragma once

#include <kvkeep/backend/cuda/kernels/wgmma.cuh>

#include "fragments.cuh"

namespace kvkeep::cuda {

/// Of `Blocks` times 32 features. Eight rows of one piece (16 bytes) are a core matrix of 128 bytes; pieces
/// of eight rows follow each other, then the next eight rows.
template <int Blocks>
struct core_rows {
  static constexpr index_t pieces = Blocks * 4;
  static constexpr index_t products = Blocks * 2;  ///< of 16 elements, that a row takes

  /// Row and piece of the i-th place. Eight threads in a row take as many rows, and so all banks.
  __device__ static index_t row(index_t i) { return i / (8 * pieces) * 8 + i % 8; }
  __device__ static index_t piece(index_t i) { return i / 8 % pieces; }

  /// Starts copying `n` rows of keys, from slot `from`; behind `end` come zeros. The part of thread `thread`
  /// of `threads`. Keys that are no whole pieces are gathered at once. @param seen(row, slot) once per row
  template <class T, class F>
  __device__ static void copy_keys(key_pieces<T> const& keys, index_t from, index_t end, index_t n,
                                   uint4* to, index_t thread, index_t threads, F const& seen) {
    for (index_t i = thread; i < n * pieces; i += threads) {
      index_t const at = piece(i), slot = from + row(i);
      bool const live = slot < end;
      if (keys.whole())
        copy_16(to + i, keys.address(live ? slot : end - 1, keys.has(at) ? at : 0),
                live && keys.has(at));
      else
        store_16(to + i, live ? keys.gather(keys.row(slot), at) : make_uint4(0, 0, 0, 0));
      if (at == 0) seen(row(i), slot);
    }
  }
  /// Starts copying `n` rows of split queries. @param number(row) of the head's query, -1: zeros
  template <class N>
  __device__ static void copy_queries(uint4 const* from, uint4* to, index_t n, N const& number) {
    for (index_t i = thread_of_block(); i < n * pieces; i += threads_of_block()) {
      index_t const q = number(row(i));
      copy_16(to + i, from + static_cast<offset_t>(max(q, 0)) * pieces + piece(i), q >= 0);
    }
  }

  /// Descriptor of rows, the first one's number a multiple of 8: start, from one piece to the next (leading),
  /// from eight rows to the next (stride), by 16 bytes, no swizzle.
  __device__ static unsigned long long descriptor(uint4 const* rows) {
    constexpr unsigned long long leading = 8, stride = 8 * pieces;
    return (shared_address(rows) & 0x3ffffu) >> 4 | leading << 16 | stride << 32;
  }
  /// What the i-th product's descriptor is more.
  __device__ static unsigned long long product_offset(int i) {
    return 16 * static_cast<unsigned>(i);
  }

  /// A warp's rows of a left operand: 16 of them, in registers.
  struct operand {
    unsigned word[products][4];

    /// @param rows  the warpgroup's 64
    __device__ void take(uint4 const* rows) {
      auto const* const own =
          reinterpret_cast<unsigned const*>(rows + warp_of_block() % 4 * 16 * pieces) +
          lane_of_warp();
      unrolled<products * 4>([&](int i) {  // two pieces of eight rows, then of the next eight
        word[i / 4][i % 4] = own[(i % 2 * pieces + i / 4 * 2 + i % 4 / 2) * 32];
      });
    }
  };

  /// Starts z = rows * columns, or adds to z.
  template <class T>
  __device__ static void start(T type, group_products& z, operand const& rows,
                               unsigned long long columns, bool add) {
    unrolled<products>([&](int i) {
      start_products(type, z, rows.word[i], columns + product_offset(i), add || i > 0);
    });
  }
  template <class T>
  __device__ static void start(T type, group_products& z, unsigned long long rows,
                               unsigned long long columns, bool add) {
    unrolled<products>([&](int i) {
      start_products(type, z, rows + product_offset(i), columns + product_offset(i), add || i > 0);
    });
  }
};

}  // namespace kvkeep::cuda
