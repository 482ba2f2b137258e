// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// The engine's arithmetic on rows. Every output element is a sum in one fixed order, so no result
/// depends on how many rows a call has, or on threads.
#pragma once

#include <kvkeep/backend/cpu/context.hpp>

#include <vector>

namespace kvkeep::generate {

/// Threads that the engine's products and the library share.
struct runtime {
  explicit runtime(int threads) : pool(threads), ctx{&pool} {}
  cpu::thread_pool pool;
  cpu::context ctx;
};

/// Weights `[rows, cols]`, packed for `multiply`: panels of 16 rows, in each the 16 elements of a column side
/// by side; missing rows of the last panel are zeros.
class matrix {
 public:
  static constexpr index_t panel_rows = 16;

  matrix() = default;
  matrix(index_t rows, index_t cols, std::vector<float> const& row_major);

  index_t rows() const { return rows_; }
  index_t cols() const { return cols_; }
  bool empty() const { return packed_.empty(); }
  index_t panels() const { return (rows_ + panel_rows - 1) / panel_rows; }
  float const* panel(index_t i) const { return packed_.data() + offset_t{i} * panel_rows * cols_; }
  void copy_row(index_t row, float* to) const;
  std::vector<float> row_major() const;

 private:
  index_t rows_ = 0;
  index_t cols_ = 0;
  std::vector<float> packed_;
};

/// Dense rows of activations `[n, cols of the matrix]`.
struct row_block {
  float const* data = nullptr;
  index_t n = 0;
};

/// y `[x.n, w.rows]` = x times the transpose of w: one accumulator per element, features in ascending order.
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
