// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
// Decoding with one set per layer or per sequence: scores are joined over heads, then over layers.
#include "../support/catch.hpp"
#include "../support/oracle_budget.hpp"
#include "../support/session_run.hpp"

using namespace kvkeep;
using namespace kvkeep::test;

namespace {

/// One layer of an oracle whose cuts are taken from outside.
class open_layer {
 public:
  virtual ~open_layer() = default;
  virtual void append(index_t p) = 0;
  virtual void observe(index_t p) = 0;
  virtual std::vector<double> scores(index_t c, index_t p) const = 0;
  virtual oracle::kept_sets& live() = 0;
};

template <class Sim>
class open_layer_of final : public open_layer, private Sim {
 public:
  using Sim::Sim;
  void append(index_t p) override { Sim::append(p); }
  void observe(index_t p) override { Sim::observe(p); }
  std::vector<double> scores(index_t c, index_t p) const override { return Sim::scores(c, p); }
  oracle::kept_sets& live() override { return this->live_; }
};

std::unique_ptr<open_layer> open(std::string const& name, policy_options const& o,
                                 oracle::tokens const& t, index_t n,
                                 oracle::attention_rule const& rule) {
  auto const r = decode_rule_of(o, {}, rule);
  auto const live = oracle::full_cache(t, n);
  if (name == "h2o")
    return std::make_unique<open_layer_of<oracle::h2o_decode>>(
        t, r, live, oracle::h2o_decode::prompt_acc(t, n, oracle::reduction::mean, rule));
  if (name == "tova") return std::make_unique<open_layer_of<oracle::tova_decode>>(t, r, live);
  if (name == "knorm") return std::make_unique<open_layer_of<oracle::knorm_decode>>(t, r, live);
  if (name == "keydiff") return std::make_unique<open_layer_of<oracle::keydiff_decode>>(t, r, live);
  oracle::morph_rule m;
  m.window = o.window.value();
  m.n_rows = m.window - 1;
  return std::make_unique<open_layer_of<oracle::morph_decode>>(t, r, m, live);
}

/// The joint cut of all layers, down to `keep` tokens of which `guard` are safe.
void cut(std::vector<std::unique_ptr<open_layer>>& layers, scope per, index_t p, index_t keep,
         oracle::guard const& safe) {
  index_t const n = oracle::count(layers[0]->live()[0]);
  if (n <= keep) return;
  index_t const heads = oracle::count(layers[0]->live());
  oracle::array all({oracle::count(layers), heads, n});
  for (std::size_t l = 0; l < layers.size(); ++l)
    for (index_t h = 0; h < heads; ++h) {
      auto const s = layers[l]->scores(h, p);
      for (index_t j = 0; j < n; ++j) all.at(static_cast<index_t>(l), h, j) = s[uz(j)];
    }
  for (std::size_t l = 0; l < layers.size(); ++l) {
    auto const joined = per == scope::layer
                            ? oracle::layer_scores(all.slice(static_cast<index_t>(l)))
                            : oracle::sequence_scores(all);
    auto const set = oracle::select(joined, layers[l]->live()[0], keep, safe);
    for (auto& h : layers[l]->live()) h = set;
  }
}

}  // namespace

TEST_CASE("one kept set per layer or per sequence while decoding") {
  for (std::string const name : {"h2o", "tova", "knorm", "keydiff", "morphkv"})
    for (scope const per : {scope::layer, scope::sequence})
      for (index_t const draft : {0, 2})
        for_seeds(2, [&](generator& g) {
          INFO(name << " per " << to_string(per) << " max_draft " << draft);
          policy_options o;
          o.capacity = g.integer(8, 16);
          o.window = name == "tova" ? g.integer(0, 1) : g.integer(2, 5);
          o.per = per;
          world w;
          w.n_layers = 3;
          w.draft = draft;
          w.seed = g.next();
          w.prompt = g.integer(3, 30);
          w.layout = g.one_of(all_layouts());
          any const p = make(name, o);
          text const words = w.words();
          engine e(w.options(p), p);
          stream s = e.begin(words);
          e.prompt(s, w.prompt);
          std::vector<std::unique_ptr<open_layer>> layers;
          for (index_t l = 0; l < 3; ++l)
            layers.push_back(open(name, o, words.layer[uz(l)], w.prompt, e.rule()));
          bool const first = name == "morphkv";  // evicts before the attention of its token
          oracle::guard const safe{0, *o.window + (first ? 1 : 0), 0};
          if (!first) cut(layers, per, w.prompt - 1, o.capacity, safe);
          while (s.tokens < words.size()) {
            INFO("token " << s.tokens);
            index_t const at = s.tokens;
            for (auto& l : layers) l->append(at);
            if (first) cut(layers, per, at, o.capacity + 1, safe);
            auto const r = e.step({&s});
            for (index_t l = 0; l < 3; ++l) {
              auto& layer = *layers[uz(l)];
              bool const same = r[uz(l)].appended == layer.live();
              if (!same) CHECK(r[uz(l)].appended == layer.live());
              REQUIRE(same);
              auto const& t = words.layer[uz(l)];
              auto const want = oracle::attend(t.q, at, t.k, t.v, layer.live(), e.rule());
              for (std::size_t i = 0; i < r[uz(l)].out.size(); ++i)
                REQUIRE(std::abs(static_cast<double>(r[uz(l)].out[i]) - want.out.data[i]) <=
                        2e-5 + 1e-4 * std::abs(want.out.data[i]));
              layer.observe(at);
            }
            if (!first) cut(layers, per, at, o.capacity, safe);
            e.check({&s});
          }
        });
}
