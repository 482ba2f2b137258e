// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// Stands in for the library's header of the same name. Accumulators are no numbers until they are waited for;
/// whether shared memory is read at the start or at the wait is drawn, so that what comes too late and what
/// goes too early both show. Refused: warpgroups of which some warps are missing, descriptors that differ
/// within a warp, that have a swizzle or leave shared memory, and pieces that copy_16 or store_16 wrote but
/// that were not made visible (warpgroups.cpp).
#pragma once

#include <kvkeep/backend/cuda/kernels/ptx.cuh>

namespace emulation {

/// Of a product: the left operand in registers or by descriptor, the right one by descriptor.
struct product_operands {
  bool half;                  ///< fp16, else bf16
  bool add;                   ///< to what is there
  unsigned const* registers;  ///< [4] or null
  unsigned long long a, b;
};
/// All threads of a warpgroup wait for each other, and nothing more.
void products_meet();
void start_product(float (*z)[4], product_operands const& from);
void end_products();
void wait_products(int pending);
void note_store(void const* to);
/// What the running thread has written may be read by products.
void make_visible();

}  // namespace emulation

namespace kvkeep::cuda {

inline constexpr index_t group_rows = 64;
inline constexpr index_t group_columns = 64;
using group_products = float[group_columns / 8][4];

inline unsigned shared_address(void const* p) {
  return static_cast<unsigned>(static_cast<char const*>(p) -
                               reinterpret_cast<char const*>(shared_words));
}

template <class T>
void start_products(T, group_products& z, unsigned const (&a)[4], unsigned long long b, bool add) {
  emulation::start_product(z, {std::is_same_v<T, fp16>, add, a, 0, b});
}
template <class T>
void start_products(T, group_products& z, unsigned long long a, unsigned long long b, bool add) {
  emulation::start_product(z, {std::is_same_v<T, fp16>, add, nullptr, a, b});
}
inline void products_begin() { emulation::products_meet(); }
inline void products_end() { emulation::end_products(); }
template <int Pending>
void products_wait(group_products&) {
  emulation::wait_products(Pending);
}

inline void store_16(uint4* to, uint4 const& value) {
  *to = value;
  emulation::note_store(to);
}
inline void writes_to_products() { emulation::make_visible(); }
inline void block_meets() { emulation::block_barrier(false, true); }

}  // namespace kvkeep::cuda
