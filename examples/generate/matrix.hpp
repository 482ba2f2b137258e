// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// The engine's arithmetic on rows. Every output element is a sum in one fixed order, so no result
/// depends on how many rows a call has, or on threads.
#pragma once

#include <kvkeep/kvkeep.hpp>

#include <vector>

namespace kvkeep::generate {

/// Threads that the engine's products and the library share.
struct runtime {
  explicit runtime(int threads) : pool(threads), ctx{&pool} {}
  cpu::thread_pool pool;
  cpu::context ctx;
};

/// Row-major weights `[rows, cols]`.
struct matrix {
  index_t rows = 0;
  index_t cols = 0;
  std::vector<float> data;
};

/// Dense rows of activations `[n, cols of the matrix]`.
struct row_block {
  float const* data = nullptr;
  index_t n = 0;
};

/// y `[x.n, w.rows]` = x times the transpose of w. One accumulator of eight lanes per element, features in
/// ascending order.
void multiply(runtime& rt, matrix const& w, row_block x, float* y);

/// y = x / rms(x) * weight.
void rms_norm(float const* x, std::vector<float> const& weight, float epsilon, float* y);

/// gate = silu(gate) * up.
void gate_with_silu(float* gate, float const* up, std::size_t n);

/// to += x
void add(float* to, float const* x, std::size_t n);

/// Rotates pairs (2i, 2i + 1) of each head by the angles whose cosines and sines alternate in `table`.
struct head_rows {
  float* data = nullptr;
  index_t n_heads = 0;
  index_t dim = 0;
};
void rotate(head_rows const& heads, float const* table);

}  // namespace kvkeep::generate
