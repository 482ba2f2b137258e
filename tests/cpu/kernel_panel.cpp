// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
// Panels of 16 keys: packing, logits, probabilities folded over rows, running row statistics.
#include <cmath>

#include <kvkeep/backend/cpu/kernels/panel_softmax.hpp>

#include "../support/random.hpp"

namespace {

using namespace kvkeep;
using test::generator;

std::size_t uz(offset_t i) { return static_cast<std::size_t>(i); }

/// Key rows in random order, one element off any alignment.
template <class T>
struct key_rows {
  std::vector<T> data;
  std::vector<T const*> rows;

  key_rows(generator& g, index_t n, index_t dim, T (*convert)(float)) {
    for (offset_t i = 0; i < offset_t{n} * dim + 1; ++i) data.push_back(convert(g.normal()));
    for (index_t j : g.permutation(n)) rows.push_back(data.data() + 1 + offset_t{j} * dim);
  }
  double at(index_t j, index_t d) const { return static_cast<double>(to_float(rows[uz(j)][d])); }
};

template <class T>
void check_panel(index_t n, index_t n_rows, index_t dim, T (*convert)(float)) {
  INFO("n " << n << " rows " << n_rows << " dim " << dim);
  generator g(static_cast<std::uint64_t>(n + 17 * n_rows + 1000 * dim));
  key_rows<T> const k(g, n, dim, convert);
  std::vector<float> panel(cpu::panel_floats(dim) + 1, 99.0f);
  cpu::pack_panel(k.rows.data(), n, dim, panel.data());
  bool packed = panel.back() == 99.0f;
  for (index_t d = 0; d < dim; ++d)
    for (index_t j = 0; j < 16; ++j)
      packed &= panel[uz(d * 16 + j)] == (j < n ? static_cast<float>(k.at(j, d)) : 0.0f);
  CHECK(packed);

  offset_t const ldq = dim + 3, ldo = 19;
  std::vector<float> const q = g.normals(uz(n_rows * ldq));
  std::vector<float> out(uz(n_rows * ldo) + 1, 99.0f), alone(16);
  cpu::qk_panel({q.data(), ldq, n_rows, dim, {0.25f, 0}}, panel.data(), out.data(), ldo);
  for (index_t r = 0; r < n_rows; ++r) {
    cpu::qk_panel({q.data() + r * ldq, ldq, 1, dim, {0.25f, 0}}, panel.data(), alone.data());
    for (index_t j = 0; j < 16; ++j) {
      double dot = 0;
      for (index_t d = 0; d < dim && j < n; ++d)
        dot += static_cast<double>(q[uz(r * ldq + d)]) * k.at(j, d);
      float const z = out[uz(r * ldo + j)];
      if (std::abs(z - 0.25 * dot) > 1e-5) FAIL("row " << r << " key " << j);
      if (z != alone[uz(j)]) FAIL("row " << r << " depends on its neighbours");
    }
    for (index_t j = 16; j < 19; ++j) CHECK(out[uz(r * ldo + j)] == 99.0f);
  }
}

TEST_CASE("panels hold the keys and give the logits") {
  for (index_t n = 0; n <= 16; ++n) check_panel<float>(n, 7, 24, [](float x) { return x; });
  for (index_t rows = 0; rows <= 40; ++rows)
    check_panel<bf16>(16, rows, 16, [](float x) { return to_bf16(x); });
  for (index_t dim = 1; dim <= 40; ++dim)
    check_panel<fp16>(13, 5, dim, [](float x) { return to_fp16(x); });
  check_panel<bf16>(16, 13, 128, [](float x) { return to_bf16(x); });
}

struct tile {
  std::vector<float> z, shift, scale;
  std::vector<std::uint16_t> visible;
  cpu::logit_tile view;

  tile(generator& g, index_t n_rows, bool masked) : z(g.normals(uz(n_rows * 17) + 1, 3)) {
    for (index_t r = 0; r < n_rows; ++r) {
      shift.push_back(g.uniform(0, 5));
      scale.push_back(g.uniform(0, 2));
      visible.push_back(static_cast<std::uint16_t>(r == 2 ? 0 : r == 3 ? 0xffff : g.next()));
    }
    view = {z.data() + 1, 17, n_rows, masked ? visible.data() : nullptr};
  }
  bool sees(index_t r, index_t j) const {
    return view.visible == nullptr || ((visible[uz(r)] >> j) & 1) != 0;
  }
  double logit(index_t r, index_t j) const { return static_cast<double>(view.z[r * 17 + j]); }
  double probability(index_t r, index_t j) const {
    double const e = std::exp(logit(r, j) - static_cast<double>(shift[uz(r)]));
    return sees(r, j) ? e * static_cast<double>(scale[uz(r)]) : 0;
  }
  cpu::row_norm norm() const { return {shift.data(), scale.data()}; }
};

TEST_CASE("probabilities fold over rows and can be written") {
  for (bool masked : {false, true})
    for (index_t n_rows = 0; n_rows <= 40; ++n_rows) {
      generator g(static_cast<std::uint64_t>(n_rows));
      tile const t(g, n_rows, masked);
      float sum[16], top[16];
      for (int j = 0; j < 16; ++j) sum[j] = 0.5f, top[j] = 0.01f;
      cpu::exp_rows_accumulate(t.view, t.norm(), cpu::row_fold::sum, sum);
      cpu::exp_rows_accumulate(t.view, t.norm(), cpu::row_fold::max, top);
      std::vector<float> p(uz(n_rows * 16));
      cpu::exp_rows_write(t.view, t.norm(), p.data(), 16);
      for (index_t j = 0; j < 16; ++j) {
        double s = 0.5, m = 0.01f;
        for (index_t r = 0; r < n_rows; ++r) {
          s += t.probability(r, j);
          m = std::max(m, t.probability(r, j));
          CHECK(p[uz(r * 16 + j)] == Approx(t.probability(r, j)).epsilon(2e-6));
        }
        CHECK(sum[j] == Approx(s).epsilon(1e-6));
        CHECK(top[j] == Approx(m).epsilon(1e-6));
      }
    }
}

TEST_CASE("row statistics give the normaliser over panels") {
  for (bool masked : {false, true})
    for (index_t n_rows = 1; n_rows <= 40; ++n_rows) {
      generator g(static_cast<std::uint64_t>(n_rows));
      std::vector<tile> tiles;
      for (int i = 0; i < 5; ++i) tiles.emplace_back(g, n_rows, masked);
      std::vector<float> top(uz(n_rows)), sum(uz(n_rows)), top2(uz(n_rows)), sum2(uz(n_rows));
      cpu::row_stats const s{top.data(), sum.data()}, alone{top2.data(), sum2.data()};
      cpu::row_stats_begin(s, n_rows);
      cpu::row_stats_begin(alone, n_rows);
      for (tile& t : tiles) {
        t.view.z = t.z.data() + 1;  // the vector may have moved
        t.view.visible = masked ? t.visible.data() : nullptr;
        cpu::row_stats_update(t.view, s);
        for (index_t r = 0; r < n_rows; ++r)
          cpu::row_stats_update({t.view.z + r * 17, 17, 1, masked ? &t.visible[uz(r)] : nullptr},
                                {&top2[uz(r)], &sum2[uz(r)]});
      }
      CHECK(top == top2);
      CHECK(sum == sum2);
      cpu::row_stats_finish(s, n_rows);
      for (index_t r = 0; r < n_rows; ++r) {
        double total = 0;
        for (tile const& t : tiles)
          for (index_t j = 0; j < 16; ++j) total += t.sees(r, j) ? std::exp(t.logit(r, j)) : 0;
        if (total == 0)
          CHECK(sum[uz(r)] == 0.0f);
        else
          CHECK(std::exp(static_cast<double>(top[uz(r)])) / static_cast<double>(sum[uz(r)]) ==
                Approx(total).epsilon(2e-6));
      }
    }
}

TEST_CASE("huge logits share their row's mass") {
  float z[16], acc[16] = {}, top = 0, sum = 0;
  for (float& x : z) x = -FLT_MAX;
  cpu::row_stats_begin({&top, &sum}, 1);
  cpu::row_stats_update({z, 16, 1, nullptr}, {&top, &sum});
  cpu::row_norm const norm = cpu::row_stats_finish({&top, &sum}, 1);
  cpu::exp_rows_accumulate({z, 16, 1, nullptr}, norm, cpu::row_fold::sum, acc);
  for (float a : acc) CHECK(a == Approx(1.0 / 16));
}

TEST_CASE("a row that saw nothing has no probability") {
  float z[16] = {}, acc[16] = {}, top = 0, sum = 0;
  std::uint16_t const none = 0;
  cpu::row_stats_begin({&top, &sum}, 1);
  cpu::row_stats_update({z, 16, 1, &none}, {&top, &sum});
  cpu::row_norm const norm = cpu::row_stats_finish({&top, &sum}, 1);
  cpu::exp_rows_accumulate({z, 16, 1, nullptr}, norm, cpu::row_fold::sum, acc);
  for (float a : acc) CHECK(a == 0.0f);
}

}  // namespace
