// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
// Scores from cached rows and from attention rows of a group.
#include <cmath>
#include <limits>

#include <kvkeep/backend/cpu/kernels/fused_rows.hpp>

#include "../support/random.hpp"

namespace {

using namespace kvkeep;
using test::generator;

constexpr float inf = std::numeric_limits<float>::infinity();
constexpr float not_a_number = std::numeric_limits<float>::quiet_NaN();

std::size_t uz(offset_t i) { return static_cast<std::size_t>(i); }

struct ring {
  std::vector<float> e;
  std::vector<index_t> order;
  std::vector<std::int32_t> old;
  cpu::cached_rows view;

  ring(generator& g, index_t heads, index_t rows, index_t slots) {
    index_t const size = rows + 2;
    order = g.permutation(size);
    order.resize(uz(rows));
    std::vector<std::uint8_t> mask;
    for (index_t j = 0; j < slots; ++j) mask.push_back(g.chance(0.8f) ? 7 : 0);
    old.resize(uz(slots));
    for (index_t j = 0; j < slots; ++j) old[uz(j)] = mask[uz(j)] != 0 ? -1 : 0;
    offset_t const row = slots + 3;
    e.resize(uz(heads * size * row));
    for (float& x : e) x = std::exp(g.normal());
    for (offset_t i = 0; i < offset_t{heads} * size; ++i)  // slots that do not count hold anything
      for (index_t j = 0; j < slots; ++j)
        if (old[uz(j)] == 0) e[uz(i * row + j)] = j % 2 == 0 ? not_a_number : inf;
    view = {e.data(), size * row, row, order.data(), heads, rows, slots};
  }
  double at(index_t g, index_t r, index_t j) const {
    return static_cast<double>(view.row(g, r)[j]);
  }
};

void check_ring(generator& g, index_t heads, index_t rows, index_t slots) {
  INFO("heads " << heads << " rows " << rows << " slots " << slots);
  ring const x(g, heads, rows, slots);
  std::vector<float> z(uz(heads * rows)), inverse(z.size());
  cpu::cached_row_sums(x.view, x.old.data(), z.data());
  for (index_t h = 0; h < heads; ++h)
    for (index_t r = 0; r < rows; ++r) {
      double sum = 0;
      for (index_t j = 0; j < slots; ++j) sum += x.old[uz(j)] != 0 ? x.at(h, r, j) : 0;
      CHECK(z[uz(h * rows + r)] == Approx(sum).epsilon(1e-6));
      index_t const n_blocks = (slots + cpu::slot_block - 1) / cpu::slot_block;
      std::vector<float> sums(uz(n_blocks));
      cpu::slot_block_sums(x.view.row(h, r), x.old.data(), slots, sums.data());
      for (index_t b = 0; b < n_blocks; ++b) {
        index_t const from = b * cpu::slot_block;
        CHECK(sums[uz(b)] == cpu::slot_block_sum(x.view.row(h, r) + from, x.old.data() + from,
                                                 std::min(slots - from, cpu::slot_block)));
      }
      CHECK(cpu::sum_blocks(sums.data(), n_blocks) == z[uz(h * rows + r)]);
    }
  cpu::invert_sums(z.data(), heads * rows, inverse.data());
  std::vector<float> sum(uz(slots) + 1, 99.0f), top(uz(slots) + 1, 99.0f);
  cpu::fuse_cached_rows(x.view, inverse.data(), x.old.data(), cpu::row_fold::sum, sum.data());
  cpu::fuse_cached_rows(x.view, inverse.data(), x.old.data(), cpu::row_fold::max, top.data());
  for (index_t j = 0; j < slots; ++j) {
    double s = 0, m = 0;
    for (index_t r = 0; r < rows; ++r) {
      double best = 0;
      for (index_t h = 0; h < heads; ++h)
        best = std::max(best, x.at(h, r, j) * static_cast<double>(inverse[uz(h * rows + r)]));
      s += best;
      m = std::max(m, best);
    }
    if (x.old[uz(j)] == 0) {
      CHECK(sum[uz(j)] == inf);
      CHECK(top[uz(j)] == inf);
    } else {
      CHECK(sum[uz(j)] == Approx(s).epsilon(1e-6));
      CHECK(top[uz(j)] == Approx(m).epsilon(1e-6));
    }
  }
  CHECK(sum.back() == 99.0f);
  CHECK(top.back() == 99.0f);
}

TEST_CASE("cached rows sum and fuse") {
  generator g(1);
  for (index_t slots = 1; slots <= 40; ++slots) check_ring(g, 4, 5, slots);
  for (index_t heads = 1; heads <= 8; ++heads) check_ring(g, heads, 3, 101);
  for (index_t slots : {63, 64, 65, 511, 512, 513, 1100}) check_ring(g, 2, 4, slots);
}

TEST_CASE("a row without mass has no say") {
  float const z[3] = {0.0f, 2.0f, not_a_number};
  float inverse[3];
  cpu::invert_sums(z, 3, inverse);
  CHECK(inverse[0] == 0.0f);
  CHECK(inverse[1] == 0.5f);
  CHECK(inverse[2] == 0.0f);
}

}  // namespace
