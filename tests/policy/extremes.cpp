// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
// NaN and infinities in K and Q, huge logits, softcap, sink logits, equal scores, budgets of zero.
#include "../support/catch.hpp"
#include "../support/prompt_reference.hpp"
#include "../support/session_run.hpp"

using namespace kvkeep;
using namespace kvkeep::test;

namespace {

constexpr double inf = std::numeric_limits<double>::infinity();

/// Writes what a broken layer may produce into some rows of K and Q. `large`: also finite values,
/// small
/// enough for logits in fp32, but not for squares, which the oracle (double) still tells apart.
void damage(generator& g, text& t, index_t n, bool large) {
  double const bad[] = {std::nan(""), inf, -inf, 1e30, -1e30, 1e20};
  for (auto& l : t.layer)
    for (index_t i = 0; i < n; ++i) {
      index_t const p = g.integer(0, l.k.extent(1) - 1);
      double const x = static_cast<double>(static_cast<float>(bad[g.integer(0, large ? 5 : 2)]));
      if (g.chance(0.7F))
        l.k.at(g.integer(0, l.k.extent(0) - 1), p, g.integer(0, l.k.extent(2) - 1)) = x;
      else
        l.q.at(g.integer(0, l.q.extent(0) - 1), p, g.integer(0, l.q.extent(2) - 1)) = x;
    }
}

bool reads_norms(std::string const& name) {
  return name.find("knorm") == 0 || name.find("keydiff") == 0;
}

/// Runs a decode case on damaged tokens beside the oracle.
index_t run_damaged(decode_case const& c, generator& g, index_t amount) {
  world w;
  w.seed = g.next();
  w.n_layers = 1;
  text words = w.words();
  damage(g, words, amount, !reads_norms(c.name));
  engine e(w.options(c.policy), c.policy);
  stream s = e.begin(words);
  e.prompt(s, w.prompt);
  auto ref = c.make(words.layer[0], w.prompt, e.rule());
  ref->end_prompt(w.prompt - 1);
  index_t ties = 0;
  for (index_t step = 0; step < 50; ++step) {
    auto const r = e.step({&s});
    auto const want = ref->step(s.tokens - 1);
    auto const& got = c.at_append ? r[0].appended : r[0].done;
    INFO("step " << step);
    bool const same = ref->agrees(got, ties);
    if (!same) CHECK(got == ref->live());
    REQUIRE(same);
    for (std::size_t i = 0; i < r[0].out.size(); ++i) REQUIRE(std::isfinite(r[0].out[i]));
    REQUIRE(e.session().verify() == status::ok);
  }
  return ties;
}

}  // namespace

TEST_CASE("decoding with NaN and infinities in keys and queries follows the oracle") {
  index_t ties = 0;
  for (decode_case const& c : all_decode_cases())
    for (index_t const amount : {2, 12})
      for_seeds(2, [&](generator& g) {
        INFO(c.name << ", " << amount << " damaged rows");
        ties += run_damaged(c, g, amount);
      });
  CHECK(ties <= 2);
}

TEST_CASE("prompts with NaN and infinities are cut as the oracle cuts them") {
  index_t ties = 0;
  for (char const* name : {"snapkv", "pyramidkv", "dynamickv", "cake", "adakv", "h2o", "tova",
                           "knorm", "keydiff", "observed_attention", "streamingllm"})
    for_seeds(4, [&](generator& g) {
      INFO(name);
      world w;
      w.seed = g.next();
      w.n_layers = 3;
      text words = w.words();
      damage(g, words, 3, !reads_norms(name));
      policy_options o;
      o.capacity = 14;
      o.window = name == std::string("tova") ? 1 : 4;
      o.make_room_first = false;
      o.every = 2;
      o.r_max = 2;
      o.kernel = 3;
      o.pooling = g.chance(0.5F) ? op::pooling::average : op::pooling::maximum;
      any const p = make(name, o);
      engine e(w.options(p), p);
      stream s = e.begin(words);
      e.prompt(s, w.prompt);
      std::vector<oracle::array> scores;
      auto const want = prompt_reference(name, o).kept(words, w.prompt, e.rule(), &scores);
      for (index_t l = 0; l < w.n_layers; ++l) {
        INFO("layer " << l);
        auto const got = e.kept(l, s);
        bool const same = same_sets(got, want[uz(l)], scores[uz(l)], ties);
        if (!same) CHECK(got == want[uz(l)]);
        REQUIRE(same);
      }
      REQUIRE(e.session().verify() == status::ok);
    });
  CHECK(ties <= 1);
}

TEST_CASE("softcap, sink logits and a scale of the view's own take part in every score") {
  std::vector<float> const sinks{0.5F, -1, 2, 0};
  for (decode_case const& c : all_decode_cases())
    for_seeds(2, [&](generator& g) {
      INFO(c.name);
      world w;
      w.seed = g.next();
      w.n_layers = 1;
      text const words = w.words();
      test_cache cache = test_cache::make(layout_id::hnd, dtype::f32, {1, 4, 2, 8, 6, 40});
      kv_ref<> kv = cache.ref();
      kv.scale = 0.9F;
      kv.softcap = 1.5F;
      kv.sink_logits = sinks.data();
      layer_spec<> const spec{kv};
      cpu::context ctx;
      auto s =
          bind_session(ctx, c.policy, c.policy, std::span<layer_spec<> const>(&spec, 1), limits{});
      engine helper(w.options(c.policy), c.policy);  // only for its queries and writes
      stream x = helper.begin(words, {}, 0);
      index_t id = -1;
      REQUIRE(s.begin(id) == status::ok);
      for (index_t h = 0; h < 2; ++h)
        for (index_t t = 0; t < w.prompt; ++t) helper.write(cache, x, 0, 0, h, t, t);
      auto const q = helper.query_rows(x, 0, 0, w.prompt);
      REQUIRE(s.observe(0, id, make_queries(q.data(), 4, w.prompt, 8)) == status::ok);
      REQUIRE(s.end_prompt(id) == status::ok);
      auto ref = c.make(words.layer[0], w.prompt, engine::rule_of(kv));
      ref->end_prompt(w.prompt - 1);
      index_t ties = 0;
      index_t const ids[] = {id};
      for (index_t at = w.prompt; at < w.prompt + 40; ++at) {
        INFO("token " << at);
        std::vector<index_t> slots(2);
        std::vector<float> out(24);
        REQUIRE(s.append(0, {ids, {}}, slots.data()) == status::ok);
        for (index_t h = 0; h < 2; ++h) helper.write(cache, x, 0, 0, h, slots[uz(h)], at);
        auto const kept = [&] {
          oracle::kept_sets sets(2);
          for (index_t h = 0; h < 2; ++h) {
            for (index_t t = 0; t < s.lengths(0)(id, h); ++t)
              if (t != s.free_slots(0)(id, h)) sets[uz(h)].push_back(s.positions(0)(id, h, t));
            std::sort(sets[uz(h)].begin(), sets[uz(h)].end());
          }
          return sets;
        };
        auto const appended = kept();
        auto const row = helper.query_rows(x, 0, at, 1);
        REQUIRE(s.attend(0, {ids, {}}, make_queries(row.data(), 4, 1, 8), out.data()) ==
                status::ok);
        REQUIRE(s.confirm({ids, {}}, 1) == status::ok);
        auto const want = ref->step(at);
        index_t const before = ties;
        bool const same = ref->agrees(c.at_append ? appended : kept(), ties);
        if (!same) CHECK((c.at_append ? appended : kept()) == ref->live());
        REQUIRE(same);
        for (std::size_t i = 0; i < out.size() && ties == before; ++i)
          REQUIRE(std::abs(static_cast<double>(out[i]) - want.out.data[i]) <=
                  2e-5 + 1e-4 * std::abs(want.out.data[i]));
      }
      CHECK(ties <= 1);
    });
}

TEST_CASE("equal scores keep the lower positions, in every policy") {
  // All keys, values and queries are equal: every score ties, exactly.
  for (decode_case const& c : all_decode_cases()) {
    bool const grows = c.name.find("h2o") == 0;  // older columns have seen more rows
    if (grows) continue;
    INFO(c.name);
    world w;
    w.n_layers = 1;
    text words = w.words();
    for (double& x : words.layer[0].k.data) x = 0.25;
    for (double& x : words.layer[0].q.data) x = 0;
    engine e(w.options(c.policy), c.policy);
    stream s = e.begin(words);
    e.prompt(s, w.prompt);
    auto ref = c.make(words.layer[0], w.prompt, e.rule());
    ref->end_prompt(w.prompt - 1);
    for (index_t step = 0; step < 40; ++step) {
      auto const r = e.step({&s});
      (void)ref->step(s.tokens - 1);
      auto const& got = c.at_append ? r[0].appended : r[0].done;
      INFO("step " << step);
      REQUIRE(got == ref->live());
    }
  }
}

TEST_CASE("queries in 16 bit, with strides of their own") {
  decode_sizes const z;
  for (decode_case const& c : all_decode_cases(z)) {
    if (c.policy.score.traits().decode != evidence::token_queries) continue;
    INFO(c.name);
    world w;
    w.n_layers = 1;
    w.seed = 77;
    text words = w.words();
    for (double& x : words.layer[0].q.data)
      x = static_cast<double>(to_float(to_bf16(static_cast<float>(x))));
    engine a(w.options(c.policy), c.policy), b(w.options(c.policy), c.policy);
    stream s = a.begin(words), t = b.begin(words);
    a.prompt(s, w.prompt);
    index_t const dim = 8, gap = 3, n = w.prompt;
    // [row, q_head, dim] with gaps, as a fused projection leaves them.
    auto const strided = [&](std::vector<float> const& q, index_t rows, std::vector<bf16>& to) {
      to.assign(uz(rows * (4 * dim + gap)), to_bf16(9));
      for (index_t h = 0; h < 4; ++h)
        for (index_t r = 0; r < rows; ++r)
          for (index_t d = 0; d < dim; ++d)
            to[uz(r * (4 * dim + gap) + h * dim + d)] = to_bf16(q[uz((h * rows + r) * dim + d)]);
      queries e;
      e.data = to.data();
      e.type = dtype::bf16;
      e.n_rows = rows;
      e.row_stride = 4 * dim + gap;
      e.head_stride = dim;
      e.entry_stride = 1000000;
      return e;
    };
    std::vector<bf16> memory;
    for (index_t h = 0; h < 2; ++h)
      for (index_t p = 0; p < n; ++p) b.write(b.cache(0), t, t.row, 0, h, p, p);
    REQUIRE(b.session().observe(0, t.id, strided(b.query_rows(t, 0, 0, n), n, memory), nullptr,
                                t.row) == status::ok);
    REQUIRE(b.end_layer(t, 0) == status::ok);
    t.tokens = n;
    for (index_t step = 0; step < 20; ++step) {
      auto const want = a.step({&s});
      auto const batch = engine::batch_of({&t});
      std::vector<index_t> slots(2);
      std::vector<float> out(24);
      REQUIRE(b.session().append(0, batch.batch(), slots.data()) == status::ok);
      for (index_t h = 0; h < 2; ++h) b.write(b.cache(0), t, t.row, 0, h, slots[uz(h)], t.tokens);
      REQUIRE(b.session().attend(0, batch.batch(),
                                 strided(b.query_rows(t, 0, t.tokens, 1), 1, memory),
                                 out.data()) == status::ok);
      REQUIRE(b.session().confirm(batch.batch(), 1) == status::ok);
      ++t.tokens;
      REQUIRE(out == want[0].out);
      REQUIRE(b.kept(0, t) == want[0].done);
    }
  }
}

TEST_CASE("heads and layers without a budget keep what is protected, or nothing") {
  per_layer b;
  b.n = 3;
  b.tokens[0] = 0;
  b.tokens[1] = 6;
  b.tokens[2] = 1;
  policy_options o;
  o.capacity = 6;
  o.window = 0;
  for (char const* name : {"knorm", "keydiff", "h2o", "tova"}) {
    INFO(name);
    any p = make(name, o);
    p.budget = b;
    world w;
    w.n_layers = 3;
    text const words = w.words();
    engine e(w.options(p, 40), p);
    stream s = e.begin(words);
    e.prompt(s, w.prompt);
    for (index_t step = 0; step < 20; ++step) {
      auto const r = e.step({&s});
      for (std::size_t l = 0; l < 3; ++l) {
        REQUIRE(oracle::count(r[l].appended[0]) == b.tokens[l] + 1);
        REQUIRE(oracle::count(r[l].done[0]) == b.tokens[l]);
        for (float const x : r[l].out) REQUIRE(std::isfinite(x));
      }
      e.check({&s});
    }
  }
}

TEST_CASE("heads have budgets of their own, at the prompt's end and while decoding") {
  for (layout_id const layout : {layout_id::hnd, layout_id::ragged, layout_id::paged_per_head})
    for (char const* name : {"knorm", "keydiff", "h2o", "snapkv", "morphkv"}) {
      INFO(name);
      policy_options o;
      o.window = 2, o.sinks = 2;
      if (std::string_view(name) == "morphkv") o.sinks = 0;
      std::vector<index_t> const tokens{5, 12, 30, 7};
      o.budget = "per_head";
      o.head_tokens = tokens;
      any const p = make(name, o);
      world w;
      w.layout = layout;
      text const words = w.words();
      engine e(w.options(p, 60), p);
      stream s = e.begin(words);
      e.prompt(s, w.prompt);
      bool const decodes = std::string_view(name) != "snapkv";
      for (index_t step = 0; step < 20; ++step) {
        auto const r = e.step({&s});
        for (index_t l = 0; l < w.n_layers; ++l)
          for (index_t h = 0; h < 2; ++h) {
            index_t const most = tokens[uz(2 * l + h)];
            index_t const kept =
                decodes ? std::min(most, w.prompt + step + 1) : std::min(most, w.prompt) + step + 1;
            REQUIRE(oracle::count(r[uz(l)].done[uz(h)]) == kept);
          }
        e.check({&s});
      }
    }
}
