// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
// Parts of a policy that a user writes: what a session promises them, and what it refuses of them.
#include <kvkeep/budget/apportion.hpp>
#include <kvkeep/kvkeep.hpp>

#include "../support/plain_model.hpp"

using namespace kvkeep;
using namespace kvkeep::test;

namespace {

/// Splits a total over layers, later ones get more, in scratch.
struct ramp {
  index_t mean = 8;

  budget_traits traits() const {
    budget_traits t{"ramp"};
    t.varies_over_layers = t.fixed = true;
    return t;
  }
  std::uint64_t key() const { return config_key(mean); }
  index_t capacity() const { return mean; }
  index_t most(index_t, cache_shape const&, index_t, index_t) const { return 2 * mean; }
  layer_range due(index_t layer, index_t) const { return {layer, layer + 1}; }
  void check(index_t, cache_shape const&, index_t) const {}
  template <class Ctx>
  status allocate(Ctx& ctx, budget_input<space_of<Ctx>> const& in, workspace& w) const {
    std::size_t const n = uz(in.n_layers);
    auto *const weight = w.take<index_t>(n), *const cap = w.take<index_t>(n),
                *const part = w.take<index_t>(n);
    auto* const remainder = w.take<offset_t>(n);
    if (w.measuring()) return status::ok;
    if (!w.ok()) return status::workspace_too_small;
    for (index_t l = 0; l < in.n_layers; ++l) weight[l] = in.n_layers + l, cap[l] = 2 * mean;
    apportion(offset_t{mean} * in.n_layers, weight, cap, in.n_layers, part, remainder);
    return fill_layer(ctx, in, in.layer, part[in.layer], w);
  }
};

using ramp_knorm = policy<slot_score<key_norm_fn>, ramp>;

}  // namespace

TEMPLATE_TEST_CASE("a budget takes scratch wherever it is asked", "", std::false_type,
                   std::true_type) {
  for (bool const beside : {false, true}) {
    index_t const n_layers = 300;
    plain_model m;
    m.lim.max_chunk = m.lim.max_sequences = m.n_seq = 1;
    for (index_t l = 0; l < n_layers; ++l) m.add(40);
    ramp_knorm p;
    p.name = "ramp_knorm";
    auto const run = [&](auto& s) {
      index_t id = 0;
      REQUIRE(s.begin(id) == status::ok);
      for (index_t l = 0; l < n_layers; ++l)
        for (index_t t = 0; t < 30; ++t) REQUIRE(s.observe(l, id, tokens_only(1)) == status::ok);
      REQUIRE(s.end_prompt(id) == status::ok);
      CHECK(s.verify() == status::ok);
      return s.lengths(n_layers - 1)(id, 0) - s.lengths(0)(id, 0);
    };
    if (beside) {
      auto s = m.bind(TestType{}, make_fullkv(), p);
      CHECK(run(s) >= 0);
    } else {
      auto s = m.bind(TestType{}, p);
      CHECK(run(s) > 3);
    }
  }
}

namespace {
struct twice : uniform {
  index_t capacity() const { return 2 * tokens; }
};
template <class B>
concept erasable = requires(policy<slot_score<key_norm_fn>, B> const& p) {
  erase_policy<cpu::context>(p);
};

static_assert(erasable<uniform>);
static_assert(!erasable<twice>, "it would be cut to a uniform one");
static_assert(!erasable<ramp>);

}  // namespace

namespace {

/// Scores decoded tokens by the last queries, if all is as it should be.
struct looks_back : scorer_base {
  evidence prompt = evidence::window_queries, decode = evidence::token_queries;
  index_t ring = 4;
  bool grows = true;

  scorer_traits traits() const {
    scorer_traits t;
    t.name = "looks_back";
    t.prompt = prompt;
    t.decode = decode;
    return t;
  }
  state_spec state(cache_shape const&) const {
    state_spec s;
    s.query_ring = ring;
    s.ring_at_decode = grows;
    return s;
  }
  std::uint64_t key() const { return config_key(prompt, decode, ring, grows); }
  template <class Ctx>
  status score(Ctx& ctx, score_input<space_of<Ctx>> const& in, score_map<space_of<Ctx>> out,
               workspace& w) const {
    using space = space_of<Ctx>;
    workspace::frame const frame(w);
    query_rows<space> q;
    KVKEEP_TRY(last_queries(ctx, in, 4, q, w));
    return run(ctx, op::column_sums<space>{in.batch, in.layer, q, as_rows(out), false, false, true},
               w);
  }
};

/// What binding a scorer says.
std::string said(bool device, looks_back const& s, limits const& lim = {}) {
  plain_model m;
  m.lim = lim;
  m.lim.max_sequences = m.n_seq;
  m.add(32);
  policy<looks_back> p;
  p.score = s;
  p.budget.tokens = 16;
  return m.refusal_of(device, p);
}

}  // namespace

TEST_CASE("a scorer finds queries where it asks for them, and is told where it does not") {
  for (bool const device : {false, true}) {
    auto const has = [](std::string const& text, char const* part) {
      INFO(text << ": " << part);
      CHECK(text.find(part) != std::string::npos);
    };
    looks_back s;
    CHECK(said(device, s) == "accepted");
    s.grows = false;  // the ring has prompts' queries alone
    has(said(device, s), "unsupported");
    s.prompt = evidence::none;
    has(said(device, s), "state.query_ring = 4, allowed: 0 for the scorer looks_back");
    s.grows = true;
    CHECK(said(device, s) == "accepted");
    s.ring = 0;
    has(said(device, s), "state.query_ring = 0, allowed: > 0");
    s.ring = 4;
    s.decode = evidence::none;
    has(said(device, s), "state.ring_at_decode = true, allowed: false");
  }
}

namespace {
struct decayed_norm {
  static constexpr char const* name = "decayed_norm";
  static constexpr bool reads_k = true, reads_v = false;
  float tau = 8;
  std::uint64_t key() const { return config_key(tau); }
  void check() const { KVKEEP_EXPECTS(tau > 0, "tau", tau, "> 0"); }
  KVKEEP_HD float operator()(slot_values const& s) const noexcept {
    return static_cast<float>(s.position) / tau + s.k[0];
  }
};
}  // namespace

TEST_CASE("a functor checks its options") {
  for (bool const device : {false, true}) {
    plain_model m;
    m.add(32);
    policy<slot_score<decayed_norm>> p;
    p.budget.tokens = 16;
    CHECK(m.refusal_of(device, p) == "accepted");
    p.score.fn.tau = -1;
    std::string const refused = m.refusal_of(device, p);
    INFO(refused);
    CHECK(refused.find("tau = -1") != std::string::npos);
  }
}
