// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
// Decode attention of one KV head, and statistics of key rows, against naive sums in double.
#include <cmath>

#include <kvkeep/backend/cpu/kernels/key_rows.hpp>

#include "../support/random.hpp"

namespace {

using namespace kvkeep;
using test::generator;

std::size_t uz(offset_t i) { return static_cast<std::size_t>(i); }

template <class T>
T convert(float x) {
  if constexpr (std::is_same_v<T, float>) return x;
  if constexpr (std::is_same_v<T, fp16>) return to_fp16(x);
  if constexpr (std::is_same_v<T, bf16>) return to_bf16(x);
}

/// Rows in random order, one element off any alignment.
template <class T>
struct random_rows {
  std::vector<T> data;
  std::vector<T const*> rows;
  cpu::row_list<T> list;

  random_rows(generator& g, index_t n, index_t dim) {
    for (offset_t i = 0; i < offset_t{n} * dim + 1; ++i) data.push_back(convert<T>(g.normal()));
    for (index_t j : g.permutation(n)) rows.push_back(data.data() + 1 + offset_t{j} * dim);
    list = {rows.data(), n};
  }
  double at(index_t j, index_t d) const { return static_cast<double>(to_float(rows[uz(j)][d])); }
};

template <class T>
void check_logits(generator& g, index_t group, index_t n, index_t dim) {
  INFO("G " << group << " n " << n << " dim " << dim);
  random_rows<T> const k(g, n, dim);
  offset_t const ldq = dim + 1, ldz = n + 2;
  std::vector<float> const q = g.normals(uz(group * ldq));
  std::vector<float> z(uz(group * ldz), 99.0f), alone(1);
  cpu::query_rows rows{q.data(), ldq, group, dim, {0.5f, 20.0f}};
  cpu::qk_rows(rows, k.list, z.data(), ldz);
  for (index_t r = 0; r < group; ++r) {
    for (index_t j = 0; j < n; ++j) {
      double dot = 0;
      for (index_t d = 0; d < dim; ++d) dot += static_cast<double>(q[uz(r * ldq + d)]) * k.at(j, d);
      float const x = z[uz(r * ldz + j)];
      if (std::abs(x - 20 * std::tanh(0.5 * dot / 20)) > 2e-5) FAIL("row " << r << " key " << j);
      cpu::query_rows const one{q.data() + r * ldq, ldq, 1, dim, rows.form};
      cpu::qk_rows(one, cpu::row_list<T>{&k.rows[uz(j)], 1}, alone.data(), 1);
      if (x != alone[0]) FAIL("key " << j << " of row " << r << " depends on its neighbours");
    }
    CHECK(z[uz(r * ldz + n)] == 99.0f);
  }
}

TEST_CASE("logits of a group are those of each pair alone") {
  generator g(1);
  for (index_t n = 1; n <= 40; ++n) check_logits<bf16>(g, 4, n, 24);
  for (index_t group = 1; group <= 16; ++group) check_logits<float>(g, group, 37, 16);
  for (index_t dim = 1; dim <= 40; ++dim) check_logits<fp16>(g, 7, 11, dim);
  check_logits<bf16>(g, 8, 300, 128);
}

TEST_CASE("softmax of a row") {
  generator g(2);
  for (index_t n : {1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 40, 63, 64, 65, 127, 1000}) {
    std::vector<float> z = g.normals(uz(n) + 1, 5), e(uz(n) + 2, 99.0f);
    if (n > 2) z[2] = -FLT_MAX;
    cpu::softmax_sum const s = cpu::softmax_row(z.data() + 1, n, e.data() + 1);
    double sum = 0;
    float const top = *std::max_element(z.begin() + 1, z.end());
    CHECK(s.max == top);
    for (index_t j = 1; j <= n; ++j) {
      double const x = std::exp(static_cast<double>(z[uz(j)] - top));
      sum += x;
      CHECK(e[uz(j)] == Approx(x).epsilon(1e-6));
    }
    CHECK(e.back() == 99.0f);
    CHECK(s.sum == Approx(sum).epsilon(1e-6));
    cpu::softmax_sum const in_place = cpu::softmax_row(z.data() + 1, n, z.data() + 1);
    CHECK(in_place.sum == s.sum);
    CHECK(std::equal(z.begin() + 1, z.end(), e.begin() + 1));
  }
  CHECK(cpu::softmax_row(nullptr, 0, nullptr).sum == 0.0f);
}

template <class T>
void check_values(generator& g, index_t group, index_t n, index_t dim) {
  INFO("G " << group << " n " << n << " dim " << dim);
  random_rows<T> const v(g, n, dim);
  offset_t const lde = n + 1, ldo = dim + 2;
  std::vector<float> e = g.normals(uz(group * lde)), scale = g.normals(uz(group));
  std::vector<float> out(uz(group * ldo), 99.0f), alone(uz(dim));
  for (float& x : e) x = std::abs(x);
  cpu::av_rows(cpu::value_weights{e.data(), lde, scale.data(), group}, v.list, dim, out.data(),
               ldo);
  for (index_t r = 0; r < group; ++r) {
    cpu::value_weights const one{e.data() + r * lde, lde, &scale[uz(r)], 1};
    cpu::av_rows(one, v.list, dim, alone.data(), dim);
    for (index_t d = 0; d < dim; ++d) {
      double sum = 0;
      for (index_t j = 0; j < n; ++j) sum += static_cast<double>(e[uz(r * lde + j)]) * v.at(j, d);
      float const x = out[uz(r * ldo + d)];
      if (std::abs(x - sum * static_cast<double>(scale[uz(r)])) > 1e-4) FAIL(r << " " << d);
      if (x != alone[uz(d)]) FAIL("row " << r << " depends on its neighbours");
    }
    CHECK(out[uz(r * ldo + dim)] == 99.0f);
  }
}

TEST_CASE("weighted sums of values") {
  generator g(3);
  for (index_t n = 0; n <= 40; ++n) check_values<bf16>(g, 4, n, 24);
  for (index_t group = 1; group <= 16; ++group) check_values<float>(g, group, 70, 128);
  for (index_t dim = 1; dim <= 80; ++dim) check_values<fp16>(g, 3, 11, dim);
}

template <class T>
void check_statistics(generator& g, index_t n, index_t dim) {
  INFO("n " << n << " dim " << dim);
  random_rows<T> const k(g, n, dim);
  std::vector<float> norms(uz(n) + 1, 99.0f), low(uz(dim)), high(uz(dim));
  cpu::row_norms(k.list, dim, norms.data());
  cpu::channel_range(k.list, dim, low.data(), high.data());
  CHECK(norms.back() == 99.0f);
  for (index_t j = 0; j < n; ++j) {
    double squares = 0;
    for (index_t d = 0; d < dim; ++d) squares += k.at(j, d) * k.at(j, d);
    CHECK(norms[uz(j)] == Approx(std::sqrt(squares)).epsilon(1e-6));
  }
  std::vector<float> range(uz(dim)), deviation(uz(n) + 1, 99.0f);
  cpu::invert_range(low.data(), high.data(), dim, range.data());
  for (index_t d = 0; d < dim; ++d) {
    double lo = FLT_MAX, hi = -FLT_MAX;
    for (index_t j = 0; j < n; ++j) {
      lo = std::min(lo, k.at(j, d));
      hi = std::max(hi, k.at(j, d));
    }
    CHECK(static_cast<double>(low[uz(d)]) == lo);
    CHECK(static_cast<double>(high[uz(d)]) == hi);
    CHECK(range[uz(d)] == Approx(hi > lo ? 1 / (hi - lo) : 0));
  }
  if (dim < 2) return;
  cpu::normalised_deviation(k.list, dim, low.data(), range.data(), deviation.data());
  CHECK(deviation.back() == 99.0f);
  for (index_t j = 0; j < n; ++j) {
    std::vector<double> x;
    double mean = 0, variance = 0;
    for (index_t d = 0; d < dim; ++d) {
      double const inverse_range = static_cast<double>(range[uz(d)]);
      x.push_back((k.at(j, d) - static_cast<double>(low[uz(d)])) * inverse_range);
      mean += x.back() / dim;
    }
    for (double y : x) variance += (y - mean) * (y - mean) / (dim - 1);
    CHECK(deviation[uz(j)] == Approx(std::sqrt(variance)).margin(1e-6));
  }
}

TEST_CASE("norms, ranges and deviations of rows") {
  generator g(4);
  for (index_t n = 1; n <= 40; ++n) check_statistics<bf16>(g, n, 24);
  for (index_t dim = 1; dim <= 40; ++dim) check_statistics<fp16>(g, 19, dim);
  check_statistics<float>(g, 33, 128);
}

TEST_CASE("the norm of a row of zeros is 0") {
  float const zero[8] = {};
  float const* const row = zero;
  float norm = 1;
  cpu::row_norms(cpu::row_list<float>{&row, 1}, 8, &norm);
  CHECK(norm == 0.0f);
}

}  // namespace
