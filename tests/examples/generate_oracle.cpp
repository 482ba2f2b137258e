// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
// The baseline that knows the future: what it is told, and that it keeps what that says.
#include <algorithm>
#include <cmath>
#include <map>
#include <set>

#include "../support/catch.hpp"
#include "generate/oracle.hpp"
#include "generate_runs.hpp"

namespace {

using namespace kvkeep;
using namespace kvkeep::test;
using generate::attention_recorder;
using generate::future_attention;
using generate::oracle;

/// Hands every call on to two observers.
struct both final : generate::step_observer {
  step_observer &a, &b;
  both(step_observer& x, step_observer& y) : a(x), b(y) {}
  void on_token(token const& t) override { a.on_token(t), b.on_token(t); }
  void on_attended(index_t l, index_t id, float const* out) override {
    a.on_attended(l, id, out), b.on_attended(l, id, out);
  }
  void on_confirmed(std::span<index_t const> ids) override {
    a.on_confirmed(ids), b.on_confirmed(ids);
  }
};

/// Queries and keys of the sequence 0, by layer.
struct rows_recorder final : generate::step_observer {
  generate::model_config config;
  std::map<index_t, std::vector<std::vector<float>>> q, k;  // [layer][position]
  explicit rows_recorder(generate::model_config const& c) : config(c) {}
  void on_token(token const& t) override {
    if (t.id != 0) return;
    q[t.layer].emplace_back(t.q, t.q + config.q_width());
    k[t.layer].emplace_back(t.k, t.k + config.kv_width());
  }
  void on_attended(index_t, index_t, float const*) override {}
  void on_confirmed(std::span<index_t const>) override {}

  /// What the queries from `first` on give to a position, summed over a group, naively.
  double remaining(index_t layer, index_t head, std::size_t first, std::size_t position) {
    auto const dim = static_cast<std::size_t>(config.head_dim);
    auto const group = static_cast<std::size_t>(config.n_q_heads / config.n_kv_heads);
    double sum = 0;
    for (std::size_t t = std::max(first, position); t < q[layer].size(); ++t)
      for (std::size_t g = 0; g < group; ++g) {
        double mine = 0, all = 0;
        for (std::size_t p = 0; p <= t; ++p) {
          double z = 0;
          for (std::size_t d = 0; d < dim; ++d)
            z += double{q[layer][t][(static_cast<std::size_t>(head) * group + g) * dim + d]} *
                 k[layer][p][static_cast<std::size_t>(head) * dim + d];
          double const w = std::exp(z / std::sqrt(static_cast<double>(dim)));
          all += w;
          if (p == position) mine = w;
        }
        sum += mine / all;
      }
    return sum;
  }
};

/// Feeds the texts to an engine that `observer` watches.
std::vector<std::vector<float>> feed_texts(model const& m, generate::policy_pair const& policies,
                                           std::vector<generate::forced_text> const& texts,
                                           index_t batch, generate::step_observer* observer,
                                           engine** running = nullptr) {
  generate::runtime rt(1);
  engine_options o;
  o.max_sequences = batch;
  for (auto const& t : texts) {
    o.max_prompt = std::max(o.max_prompt, static_cast<index_t>(t.prompt.size()));
    o.max_tokens =
        std::max(o.max_tokens, static_cast<index_t>(t.prompt.size() + t.response.size()));
  }
  o.observer = observer;
  engine e(rt, m, policies, o);
  if (running != nullptr) *running = &e;
  std::vector<std::vector<float>> logits(texts.size());
  generate::follow(e, texts, [&](index_t i, index_t, std::span<float const> l) {
    auto& all = logits[static_cast<std::size_t>(i)];
    all.insert(all.end(), l.begin(), l.end());
  });
  return logits;
}

std::vector<generate::forced_text> random_texts() {
  return {{random_prompt(21, 19), random_prompt(22, 24)},
          {random_prompt(23, 8), random_prompt(24, 40)},
          {random_prompt(25, 30), random_prompt(26, 12)}};
}

/// The kept positions after every step of the only sequence.
struct kept_recorder final : generate::step_observer {
  engine* e = nullptr;
  std::vector<std::map<std::pair<index_t, index_t>, std::set<index_t>>> kept;
  void on_token(token const&) override {}
  void on_attended(index_t, index_t, float const*) override {}
  void on_confirmed(std::span<index_t const>) override {
    auto& now = kept.emplace_back();
    for (index_t l = 0; l < 3; ++l)
      for (index_t h = 0; h < 2; ++h) {
        auto const p = e->positions(0, l, h);
        for (index_t const x : p)
          if (x >= 0) now[{l, h}].insert(x);
      }
  }
};

}  // namespace

TEST_CASE("sums of future attention are over the later queries only") {
  future_attention f(1, 2, 3);  // the prompt is 0, 1, 2
  f.add(0, 0, {0.5F, 0.25F, 0.125F, 0.125F});
  f.add(0, 1, {0, 0, 0, 1});
  f.add(0, 0, {0.25F, 0.5F, 0, 0.125F, 0.125F});
  f.add(0, 1, {1, 0, 0, 0, 0});
  f.finish();
  CHECK(f.remaining(0, 0, 3, 0) == 0.75F);
  CHECK(f.remaining(0, 0, 3, 1) == 0.75F);
  CHECK(f.remaining(0, 0, 3, 3) == 0.25F);
  CHECK(f.remaining(0, 0, 4, 0) == 0.25F);
  CHECK(f.remaining(0, 1, 4, 3) == 0);
  CHECK(f.remaining(0, 1, 4, 0) == 1);
  CHECK(f.remaining(0, 0, 0, 2) == 0.125F);  // all that count
  CHECK(f.remaining(0, 0, 5, 0) == 0);       // behind the last query
  CHECK(f.remaining(0, 0, 4, 9) == 0);
}

TEST_CASE("recorded attention equals a naive computation, in batches too") {
  model const m = random_model(31);
  auto const texts = random_texts();
  attention_recorder recorder(m.config);
  rows_recorder rows(m.config);
  both watch(recorder, rows);
  feed_texts(m, generate::make_policies(with("fullkv", 1)), {texts[0]}, 1, &watch);
  auto const alone = recorder.take();
  REQUIRE(alone.size() == 1);
  double most = 0;
  for (index_t l = 0; l < 3; ++l)
    for (index_t h = 0; h < 2; ++h)
      for (index_t t : {19, 25, 41})
        for (index_t p = 0; p < t; ++p)
          most = std::max(most, std::abs(alone[0].remaining(l, h, t, p) -
                                         rows.remaining(l, h, static_cast<std::size_t>(t),
                                                        static_cast<std::size_t>(p))));
  CHECK(most < 1e-5);
  feed_texts(m, generate::make_policies(with("fullkv", 1)), {texts[1], texts[0], texts[2]}, 2,
             &recorder);
  auto const shared = recorder.take();
  REQUIRE(shared.size() == 3);
  for (index_t p = 0; p < 30; ++p)
    CHECK(shared[1].remaining(2, 1, 30, p) == alone[0].remaining(2, 1, 30, p));
}

TEST_CASE("the oracle keeps what a hand-made future says, by layer and head") {
  model const m = random_model(32);
  generate::forced_text const text{random_prompt(27, 8), random_prompt(28, 4)};
  // Position p of layer l and head h gets p * step[l][h] (modulo 11) from the one query that counts, the last.
  index_t const step[3][2] = {{1, 10}, {2, 9}, {3, 5}};
  future_attention f(3, 2, 8);
  for (index_t t = 8; t < 11; ++t)
    for (index_t l = 0; l < 3; ++l)
      for (index_t h = 0; h < 2; ++h) {
        std::vector<float> w(static_cast<std::size_t>(t) + 1);
        for (index_t p = 0; t == 10 && p <= t; ++p)
          w[static_cast<std::size_t>(p)] = static_cast<float>(p * step[l][h] % 11);
        f.add(l, h, w);
      }
  f.finish();
  auto const seer = std::make_shared<oracle>(std::vector{f});
  kept_recorder kept;
  both watch(*seer, kept);
  feed_texts(m, generate::make_oracle_pair(seer, 4), {text}, 1, &watch, &kept.e);
  REQUIRE(kept.kept.size() == 4);  // the prompt, and three tokens: the last one is not fed
  for (index_t l = 0; l < 3; ++l)
    for (index_t h = 0; h < 2; ++h) {
      INFO("layer " << l << ", head " << h);
      std::set<index_t> want;  // what is kept of what has come, one after another
      for (index_t t = 8; t < 11; ++t) {
        if (t == 8)
          for (index_t p = 0; p < 8; ++p) want.insert(p);
        else
          want.insert(t - 1);
        while (want.size() > 4)
          want.erase(*std::min_element(want.begin(), want.end(), [&](index_t a, index_t b) {
            return a * step[l][h] % 11 < b * step[l][h] % 11;
          }));
        CHECK(kept.kept[static_cast<std::size_t>(t - 8)].at({l, h}) == want);
      }
    }
}

TEST_CASE("the oracle evicts the least future attention of its sequence in a batch") {
  model const m = random_model(33);
  auto const texts = random_texts();
  attention_recorder recorder(m.config);
  auto const full = feed_texts(m, generate::make_policies(with("fullkv", 1)), texts, 2, &recorder);
  auto const futures = recorder.take();
  for (index_t const capacity : {6, 64}) {
    auto const together = std::make_shared<oracle>(futures);
    auto const logits =
        feed_texts(m, generate::make_oracle_pair(together, capacity), texts, 2, together.get());
    for (std::size_t i = 0; i < texts.size(); ++i) {
      auto const alone = std::make_shared<oracle>(std::vector{futures[i]});
      CHECK(feed_texts(m, generate::make_oracle_pair(alone, capacity), {texts[i]}, 1,
                       alone.get())[0] == logits[i]);
    }
    CHECK((logits == full) == (capacity == 64));  // all 64 hold every sequence
  }
}
