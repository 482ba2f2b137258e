// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
#include "generate/matrix.hpp"

#include <kvkeep/backend/cpu/kernels/math.hpp>

#include <algorithm>
#include <cmath>

namespace kvkeep::generate {

namespace {

using cpu::lanes;
using cpu::vf;

constexpr index_t wide = matrix::panel_rows;

/// Products of P panels of w with N rows of x.
template <int P, int N>
struct tile {
  matrix const& w;
  row_block const& x;
  float* y;

  void operator()(index_t panel, index_t row) const {
    constexpr int vectors = 2 * P;
    vf acc[vectors * N];
    KVKEEP_CPU_UNROLL
    for (int i = 0; i < vectors * N; ++i) acc[i] = cpu::splat(0.0F);
    index_t const cols = w.cols();
    offset_t const panel_step = offset_t{wide} * cols;
    float const* b = w.panel(panel);
    float const* a = x.data + offset_t{row} * cols;
    for (index_t k = 0; k < cols; ++k, b += wide, ++a) {
      vf column[vectors];
      KVKEEP_CPU_UNROLL
      for (int v = 0; v < vectors; ++v)
        column[v] = cpu::load(b + v / 2 * panel_step + v % 2 * lanes);
      KVKEEP_CPU_UNROLL
      for (int n = 0; n < N; ++n) {
        vf const feature = cpu::splat(a[offset_t{n} * cols]);
        KVKEEP_CPU_UNROLL
        for (int v = 0; v < vectors; ++v)
          acc[n * vectors + v] = cpu::fma(column[v], feature, acc[n * vectors + v]);
      }
    }
    for (int n = 0; n < N; ++n) store(acc + n * vectors, panel * wide, row + n);
  }

 private:
  void store(vf const* sums, index_t first, index_t row) const {
    float* const to = y + offset_t{row} * w.rows();
    for (int v = 0; v < 2 * P; ++v) {
      index_t const at = first + v * lanes, left = w.rows() - at;
      if (left > 0) cpu::store_some(to + at, sums[v], left);
    }
  }
};

/// Panels [first, last) with N rows: W panels at a time, as long as there are so many.
template <int W, int N>
void multiply_panels(matrix const& w, row_block const& x, index_t row, index_t first, index_t last,
                     float* y) {
  for (; first + W <= last; first += W) tile<W, N>{w, x, y}(first, row);
  for (; first < last; ++first) tile<1, N>{w, x, y}(first, row);
}

/// Panels [first, last) of w against all rows of x. Eight accumulators hide the latency of multiply-adds.
void multiply_rows(matrix const& w, row_block const& x, index_t first, index_t last, float* y) {
  index_t row = 0;
  for (; row + 4 <= x.n; row += 4) multiply_panels<1, 4>(w, x, row, first, last, y);
  for (; row + 2 <= x.n; row += 2) multiply_panels<2, 2>(w, x, row, first, last, y);
  if (row < x.n) multiply_panels<4, 1>(w, x, row, first, last, y);
}

}  // namespace

matrix::matrix(index_t rows, index_t cols, std::vector<float> const& row_major)
    : rows_(rows), cols_(cols), packed_(product(panels(), panel_rows, cols)) {
  for (index_t r = 0; r < rows; ++r) {
    float* const to = packed_.data() + offset_t{r / wide} * wide * cols + r % wide;
    for (index_t c = 0; c < cols; ++c)
      to[offset_t{c} * wide] = row_major[static_cast<std::size_t>(offset_t{r} * cols + c)];
  }
}

void matrix::copy_row(index_t row, float* to) const {
  float const* const from = panel(row / wide) + row % wide;
  for (index_t c = 0; c < cols_; ++c) to[c] = from[offset_t{c} * wide];
}

std::vector<float> matrix::row_major() const {
  std::vector<float> v(product(rows_, cols_));
  for (index_t r = 0; r < rows_; ++r) copy_row(r, v.data() + offset_t{r} * cols_);
  return v;
}

void multiply(runtime& rt, matrix const& w, row_block x, float* y) {
  // Threads cost some microseconds: small products stay in one.
  constexpr index_t block = 4;  // panels
  constexpr offset_t worth = 1 << 17;
  auto const task = [&](index_t i, int) {
    multiply_rows(w, x, i * block, std::min(w.panels(), (i + 1) * block), y);
  };
  if (rt.pool.size() == 1 || offset_t{w.rows()} * w.cols() * x.n < worth)
    multiply_rows(w, x, 0, w.panels(), y);
  else
    rt.pool.parallel_for((w.panels() + block - 1) / block, task);
}

void rms_norm(float const* x, std::vector<float> const& weight, float epsilon, float* y) {
  auto const n = static_cast<index_t>(weight.size());
  vf sum = cpu::splat(0.0F);
  for (index_t k = 0; k < n; k += lanes) {
    vf const a = cpu::load_some(x + k, n - k);
    sum = cpu::fma(a, a, sum);
  }
  float const mean = cpu::sum_lanes(sum) / static_cast<float>(n);
  vf const scale = cpu::splat(1.0F / std::sqrt(mean + epsilon));
  for (index_t k = 0; k < n; k += lanes) {
    vf const a = cpu::load_some(x + k, n - k) * scale * cpu::load_some(weight.data() + k, n - k);
    cpu::store_some(y + k, a, n - k);
  }
}

void gate_with_silu(float* gate, float const* up, std::size_t n) {
  vf const one = cpu::splat(1.0F), zero = cpu::splat(0.0F);
  auto const size = static_cast<offset_t>(n);
  for (offset_t k = 0; k < size; k += lanes) {
    auto const rest = static_cast<index_t>(std::min<offset_t>(size - k, lanes));
    vf const g = cpu::load_some(gate + k, rest);
    cpu::store_some(gate + k, g / (one + cpu::exp(zero - g)) * cpu::load_some(up + k, rest), rest);
  }
}

void add(float* to, float const* x, std::size_t n) {
  for (std::size_t i = 0; i < n; ++i) to[i] += x[i];
}

void rotate(head_rows const& heads, float const* table) {
  for (index_t h = 0; h < heads.n_heads; ++h) {
    float* const row = heads.data + offset_t{h} * heads.dim;
    for (index_t d = 0; d < heads.dim; d += 2) {
      float const a = row[d], b = row[d + 1], c = table[d], s = table[d + 1];
      row[d] = a * c - b * s;
      row[d + 1] = a * s + b * c;
    }
  }
}

}  // namespace kvkeep::generate
