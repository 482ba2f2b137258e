// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// The engine's logits against a naive model in double.
#include <numeric>

#include "../support/catch.hpp"
#include "generate_runs.hpp"

namespace {

using namespace kvkeep;
using namespace kvkeep::test;

using row = std::vector<double>;

row times(generate::matrix const& w, row const& x) {
  auto const data = w.row_major();
  row y(static_cast<std::size_t>(w.rows()));
  for (std::size_t r = 0; r < y.size(); ++r)
    for (std::size_t k = 0; k < x.size(); ++k) y[r] += double{data[r * x.size() + k]} * x[k];
  return y;
}

row normed(row const& x, std::vector<float> const& weight, double epsilon) {
  double sum = 0;
  for (double const v : x) sum += v * v;
  row y = x;
  for (std::size_t i = 0; i < y.size(); ++i)
    y[i] *= double{weight[i]} / std::sqrt(sum / static_cast<double>(x.size()) + epsilon);
  return y;
}

void rotate(row& heads, index_t dim, std::size_t position, double base) {
  auto const n = static_cast<std::size_t>(dim);
  for (std::size_t i = 0; i < heads.size(); i += 2) {
    double const angle = static_cast<double>(position) *
                         std::pow(base, -static_cast<double>(i % n) / static_cast<double>(n));
    double const a = heads[i], b = heads[i + 1];
    heads[i] = a * std::cos(angle) - b * std::sin(angle);
    heads[i + 1] = a * std::sin(angle) + b * std::cos(angle);
  }
}

/// One query head over the tokens that `sees(position)` allows.
template <class F>
row attend(row const& q, std::vector<row> const& k, std::vector<row> const& v, F const& sees) {
  row out(q.size()), p(k.size());
  double sum = 0;
  for (std::size_t j = 0; j < k.size(); ++j) {
    if (!sees(j)) continue;
    double const z = std::inner_product(q.begin(), q.end(), k[j].begin(), 0.0);
    sum += p[j] = std::exp(z / std::sqrt(static_cast<double>(q.size())));
  }
  for (std::size_t j = 0; j < k.size(); ++j)
    for (std::size_t d = 0; d < q.size(); ++d) out[d] += p[j] / sum * v[j][d];
  return out;
}

/// Logits behind the last token. The query at t sees position j where sees(t, j).
template <class F>
row naive_logits(model const& m, ids const& tokens, F const& sees) {
  auto const& c = m.config;
  auto const dim = static_cast<std::size_t>(c.dim), hd = static_cast<std::size_t>(c.head_dim);
  auto const part = [&](row const& x, std::size_t h) {
    auto const at = x.begin() + static_cast<std::ptrdiff_t>(h * hd);
    return row(at, at + static_cast<std::ptrdiff_t>(hd));
  };
  auto const embedding = m.embedding.row_major();
  std::vector<row> x;
  for (index_t const t : tokens) {
    auto const at = embedding.begin() + offset_t{t} * c.dim;
    x.emplace_back(at, at + static_cast<std::ptrdiff_t>(dim));
  }
  for (auto const& l : m.layers) {
    std::vector<row> q, k, v;
    for (std::size_t t = 0; t < x.size(); ++t) {
      row const n = normed(x[t], l.attention_norm, double{c.norm_epsilon});
      q.push_back(times(l.q, n));
      k.push_back(times(l.k, n));
      v.push_back(times(l.v, n));
      rotate(q[t], c.head_dim, t, c.rope_base);
      rotate(k[t], c.head_dim, t, c.rope_base);
    }
    for (std::size_t t = 0; t < x.size(); ++t) {
      row mixed;
      for (std::size_t h = 0; h < static_cast<std::size_t>(c.n_q_heads); ++h) {
        std::size_t const kv = h / static_cast<std::size_t>(c.n_q_heads / c.n_kv_heads);
        std::vector<row> kh, vh;
        for (std::size_t j = 0; j <= t; ++j) {
          kh.push_back(part(k[j], kv));
          vh.push_back(part(v[j], kv));
        }
        row const o = attend(part(q[t], h), kh, vh, [&](std::size_t j) { return sees(t, j); });
        mixed.insert(mixed.end(), o.begin(), o.end());
      }
      row const o = times(l.output, mixed);
      for (std::size_t d = 0; d < dim; ++d) x[t][d] += o[d];
      row const n = normed(x[t], l.ffn_norm, double{c.norm_epsilon});
      row g = times(l.gate, n);
      row const u = times(l.up, n);
      for (std::size_t i = 0; i < g.size(); ++i) g[i] = g[i] / (1 + std::exp(-g[i])) * u[i];
      row const f = times(l.down, g);
      for (std::size_t d = 0; d < dim; ++d) x[t][d] += f[d];
    }
  }
  return times(m.classifier(), normed(x.back(), m.final_norm, double{c.norm_epsilon}));
}

void check_logits(std::span<float const> have, row const& want) {
  double most = 0;
  for (std::size_t i = 0; i < want.size(); ++i)
    most = std::max(most, std::abs(double{have[i]} - want[i]));
  CHECK(most < 2e-3);
}

}  // namespace

TEST_CASE("logits equal those of a naive model, at the prompt and behind decoded tokens") {
  for (bool const tied : {true, false}) {
    model const m = random_model(11, tiny_config(), tied);
    ids tokens = random_prompt(4, 23);
    generate::runtime rt(1);
    engine e(rt, m, generate::make_policies(with("fullkv", 1)), options_of({}, {tokens}, 8));
    index_t const id = e.begin(tokens);
    auto const all = [](std::size_t, std::size_t) { return true; };
    check_logits(e.logits(id), naive_logits(m, tokens, all));
    for (index_t const next : {5, 60, 0}) {
      feed const f{id, next};
      e.step({&f, 1});
      tokens.push_back(next);
    }
    check_logits(e.logits(id), naive_logits(m, tokens, all));
  }
}

TEST_CASE("keys keep the rotation of their positions when tokens have left") {
  model const m = random_model(12);
  ids tokens = random_prompt(5, 10);
  generate::runtime rt(1);
  policy_request r = with("streamingllm", 8);
  r.sinks = 2;
  engine e(rt, m, generate::make_policies(r), options_of({}, {tokens}, 30));
  index_t const id = e.begin(tokens);
  std::size_t const prompt = tokens.size();
  for (index_t const next : random_prompt(6, 30)) {
    feed const f{id, next};
    e.step({&f, 1});
    tokens.push_back(next);
    CHECK(e.tokens(id) == static_cast<index_t>(tokens.size()));
  }
  // Prompt rows see everything; a decoded one sees 2 sinks and itself with the 5 tokens before.
  auto const sees = [&](std::size_t t, std::size_t j) { return t < prompt || j < 2 || j + 6 > t; };
  check_logits(e.logits(id), naive_logits(m, tokens, sees));
}
