// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
#include "generate/matrix.hpp"

#include <algorithm>
#include <cmath>

namespace kvkeep::generate {

namespace {

using cpu::lanes;
using cpu::vf;

/// Products of R rows of w with N rows of x: acc[n * R + r]. Rows are `cols` apart.
template <int R, int N>
void tile(float const* w, float const* x, index_t cols, vf (&acc)[R * N]) {
  KVKEEP_CPU_UNROLL
  for (int i = 0; i < R * N; ++i) acc[i] = cpu::splat(0.0F);
  auto const step = [&](auto&& load_at, index_t k) {
    vf a[N];
    KVKEEP_CPU_UNROLL
    for (int n = 0; n < N; ++n) a[n] = load_at(x + offset_t{n} * cols + k);
    KVKEEP_CPU_UNROLL
    for (int r = 0; r < R; ++r) {
      vf const b = load_at(w + offset_t{r} * cols + k);
      KVKEEP_CPU_UNROLL
      for (int n = 0; n < N; ++n) acc[n * R + r] = cpu::fma(b, a[n], acc[n * R + r]);
    }
  };
  index_t k = 0;
  for (; k + lanes <= cols; k += lanes) step([](float const* p) { return cpu::load(p); }, k);
  if (k < cols) step([&](float const* p) { return cpu::load_part(p, cols - k); }, k);
}

/// Rows [first, last) of w against all rows of x.
void multiply_rows(matrix const& w, row_block x, index_t first, index_t last, float* y) {
  index_t const cols = w.cols;
  auto const w_at = [&](index_t r) { return w.data.data() + offset_t{r} * cols; };
  auto const y_at = [&](index_t n, index_t r) { return y + offset_t{n} * w.rows + r; };
  for (index_t n = 0; n < x.n;) {
    float const* const x_at = x.data + offset_t{n} * cols;
    bool const pair = n + 1 < x.n;
    index_t r = first;
    vf acc[lanes];
    for (; pair && r + 4 <= last; r += 4) {
      tile<4, 2>(w_at(r), x_at, cols, acc);
      float sums[lanes];
      cpu::store(sums, cpu::sum_each(acc));
      std::copy_n(sums, 4, y_at(n, r));
      std::copy_n(sums + 4, 4, y_at(n + 1, r));
    }
    for (; !pair && r + 8 <= last; r += 8) {
      tile<8, 1>(w_at(r), x_at, cols, acc);
      cpu::store(y_at(n, r), cpu::sum_each(acc));
    }
    for (; r < last; ++r)
      for (index_t i = 0; i < (pair ? 2 : 1); ++i) {
        vf one[1];
        tile<1, 1>(w_at(r), x_at + offset_t{i} * cols, cols, one);
        *y_at(n + i, r) = cpu::sum_lanes(one[0]);
      }
    n += pair ? 2 : 1;
  }
}

}  // namespace

void multiply(runtime& rt, matrix const& w, row_block x, float* y) {
  // Threads cost some microseconds: small products stay in one.
  constexpr index_t block = 32;
  constexpr offset_t worth = 1 << 16;
  index_t const tasks = (w.rows + block - 1) / block;
  auto const task = [&](index_t i, int) {
    multiply_rows(w, x, i * block, std::min(w.rows, (i + 1) * block), y);
  };
  if (rt.pool.size() == 1 || offset_t{w.rows} * w.cols * x.n < worth)
    multiply_rows(w, x, 0, w.rows, y);
  else
    rt.pool.parallel_for(tasks, task);
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
