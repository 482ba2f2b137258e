// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// The engine at its limits: long prompts, draws, figures, refusals; and logits against a naive model in double.
#include <numeric>

#include "../support/catch.hpp"
#include "generate/file.hpp"
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

TEST_CASE("a prompt beyond its chunks goes on at constant size, if the policy evicts") {
  model const m = random_model(26);
  ids const prompt = random_prompt(10, 150);
  engine_options o;
  o.max_prompt = 40;
  o.max_tokens = 300;
  generate::runtime rt(1);
  engine e(rt, m, generate::make_policies(with("morphkv", 16)), o);
  index_t const id = e.begin(prompt);
  CHECK(e.tokens(id) == 150);
  CHECK(e.positions(id, 0, 0).size() <= 17);
  e.verify();
  engine grows(rt, m, generate::make_policies(with("snapkv", 16)), o);
  CHECK_THROWS_AS(grows.begin(prompt), std::invalid_argument);
}

TEST_CASE("draws depend on the seed alone") {
  model const m = random_model(27);
  std::vector<ids> const prompts{random_prompt(1, 9), random_prompt(1, 9), random_prompt(1, 9)};
  auto const drawn = [&](std::uint64_t seed, std::size_t n, double temperature, double top_p) {
    generate::runtime rt(1);
    std::span<ids const> const some(prompts.data(), n);
    engine e(rt, m, generate::make_policies(with("tova", 12)), options_of({}, prompts, 40));
    generate::generation_options g;
    g.tokens = 40;
    g.sampling = {temperature, top_p, seed};
    return generate::generate(e, some, g);
  };
  auto const three = drawn(5, 3, 0.9, 0.95);
  CHECK(three[0] != three[1]);
  CHECK(drawn(6, 1, 0.9, 0.95)[0] == three[1]);
  CHECK(drawn(7, 1, 0.9, 0.95)[0] == three[2]);
  CHECK(drawn(7, 1, 0.9, 0.0)[0] == drawn(1, 1, 0, 1)[0]);  // only the best token is left
}

TEST_CASE("teacher forcing sees the same logits as free text that agrees, in any batch") {
  model const m = random_model(28);
  policy_request const r = with("h2o", 12);
  std::vector<generate::forced_text> texts;
  for (index_t i = 0; i < 5; ++i) {
    ids const prompt = random_prompt(static_cast<std::uint64_t>(i + 11), 20 - 3 * i);
    texts.push_back({prompt, written(m, r, prompt, 30 - i)});
  }
  texts.push_back({{1, 2}, {}});
  for (index_t const batch : {1, 2, 6}) {
    generate::runtime rt(1);
    engine_options o = options_of({}, {texts[0].prompt}, 30);
    o.max_sequences = batch;
    engine e(rt, m, generate::make_policies(r), o);
    std::vector<index_t> seen(texts.size());
    auto const best =
        generate::follow(e, texts, [&](index_t i, index_t at, std::span<float const> logits) {
          CHECK(logits.size() == 61);
          CHECK(at == seen[static_cast<std::size_t>(i)]++);
        });
    for (std::size_t i = 0; i < texts.size(); ++i) CHECK(best[i] == texts[i].response);
    std::vector<ids> prompts;
    for (auto const& t : texts) prompts.push_back(t.prompt);
    generate::generation_options g;
    g.tokens = 26;
    auto const free = generate::generate(e, prompts, g);  // more prompts than sequences
    for (std::size_t i = 0; i < 5; ++i)
      CHECK(std::equal(free[i].begin(), free[i].end(), texts[i].response.begin()));
  }
}

TEST_CASE("figures add up") {
  model const m = random_model(29);
  ids const prompt = random_prompt(12, 40);
  generate::runtime rt(1);
  engine e(rt, m, generate::make_policies(with("morphkv", 16)),
           options_of({layout_kind::paged, 1, 8, 1, false}, {prompt}, 60));
  generate::generation_options g;
  g.tokens = 60;
  generate::generate(e, std::vector<ids>{prompt}, g);
  auto const u = e.usage();
  CHECK(u.prompt_tokens == 40);
  CHECK(u.decoded_tokens == 59);
  CHECK(u.peak_slots == 3 * 2 * 17);
  CHECK(u.peak_bytes() == 3 * 2 * 17 * 2 * 8 * sizeof(float));
  CHECK(u.sampled_steps == 11);
  CHECK(u.state_bytes > 0);
  CHECK(u.eviction() > 0);
  CHECK(u.eviction() < u.prefill + u.decode);
  CHECK(u.peak_blocks >= 3 * 5);
}

TEST_CASE("what cannot run is refused before it starts") {
  model const m = random_model(30);
  generate::runtime rt(1);
  auto const refused = [&](policy_request const& r, char const* part) {
    try {
      engine const e(rt, m, generate::make_policies(r), options_of({}, {random_prompt(1, 30)}, 10));
      FAIL_CHECK("not refused: " << part);
    } catch (std::invalid_argument const& x) {
      INFO(x.what());
      CHECK(std::string(x.what()).find(part) != std::string::npos);
    }
  };
  policy_request r = with("h2o", 8);
  r.window = 8;
  refused(r, "sinks + window");
  r = with("knorm", 8);
  r.sinks = 5;
  r.window = 3;
  refused(r, "sinks + window");
  refused(with("nobody", 8), "--policy: nobody");
  refused(with("morphkv+snapkv", 8), "--policy: snapkv");
  refused(with("morphkv", 0), "--budget: 0");
  refused(with("adakv+streamingllm", 4), "--budget: 4: expected more than sinks + window = 4");
  r = with("fullkv+h2o", 8);
  r.layer_budget = "pyramid";
  refused(r, "--layer-budget: pyramid");
  r = with("streamingllm", 8);
  r.window = 3;
  refused(r, "--window: streamingllm");
  r = with("h2o", 8);
  r.fusion = reduction::max;
  refused(r, "--fusion: h2o");
  engine e(rt, m, generate::make_policies(with("h2o", 8)),
           options_of({}, {random_prompt(1, 30)}, 10));
  CHECK_THROWS_AS(e.begin(ids{61}), generate::bad_input);
  CHECK_THROWS_AS(e.begin(ids{-1}), generate::bad_input);
  CHECK_THROWS_AS(e.begin(ids{}), std::invalid_argument);
  feed const nobody{0, 1};
  CHECK_THROWS_AS(e.step({&nobody, 1}), std::invalid_argument);
}
