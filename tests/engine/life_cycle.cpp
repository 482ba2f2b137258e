// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
// Sequences: begin and end between steps, ids used again, fork, frozen prefixes, saved state,
// transient
// prompts, budgets and pools per layer, skipped layers.
#include <cstring>
#include <utility>

#include "../support/catch.hpp"
#include "../support/session_run.hpp"

using namespace kvkeep;
using namespace kvkeep::test;

namespace {

/// The records of one sequence alone in its own engine.
std::vector<std::vector<token_record>> alone(decode_case const& c, world const& w,
                                             text const& words, index_t steps) {
  engine e(w.options(c.policy), c.policy);
  stream s = e.begin(words);
  e.prompt(s, w.prompt);
  std::vector<std::vector<token_record>> r;
  for (index_t i = 0; i < steps; ++i) r.push_back(e.step({&s}));
  return r;
}

/// K and V of one engine's row in another engine's, slot by slot.
void copy_cache(engine& from, stream const& a, engine& to, stream const& b, index_t n_layers) {
  for (index_t l = 0; l < n_layers; ++l)
    for (index_t h = 0; h < from.cache(l).shape().n_kv_heads; ++h)
      for (index_t t = 0; t < from.session().lengths(l)(a.id, h); ++t) {
        to.cache(l).set_k(b.row, h, t, from.cache(l).get_k(a.row, h, t));
        to.cache(l).set_v(b.row, h, t, from.cache(l).get_v(a.row, h, t));
      }
}

}  // namespace

TEST_CASE("sequences come and go between steps and do not see each other") {
  for (decode_case const& c : all_decode_cases()) {
    INFO(c.name);
    world w;
    text const one = w.words(1), two = w.words(2), three = w.words(3);
    auto const want_one = alone(c, w, one, 40), want_two = alone(c, w, two, 30),
               want_three = alone(c, w, three, 25);
    engine e(w.options(c.policy), c.policy);
    stream a = e.begin(one), b, d;
    e.prompt(a, w.prompt);
    std::size_t at = 0;
    for (index_t step = 0; step < 40; ++step) {
      INFO("step " << step);
      if (step == 5) {
        b = e.begin(two);
        e.prompt(b, w.prompt);
      }
      if (step == 15) {
        REQUIRE(e.session().end(b.id) == status::ok);
        d = e.begin(three);
        CHECK(d.id == b.id);  // used again, with nothing of its past
        e.prompt(d, w.prompt);
      }
      bool const with_b = step >= 5 && step < 15, with_d = step >= 15;
      std::vector<stream*> who{&a};
      if (with_b) who.insert(who.begin(), &b);
      if (with_d) who.push_back(&d);
      auto const r = e.step(who);
      auto const pick = [&](std::size_t i) {
        std::vector<token_record> mine;
        for (index_t l = 0; l < w.n_layers; ++l) mine.push_back(r[uz(l) * who.size() + i]);
        return mine;
      };
      require_same(pick(with_b ? 1 : 0), want_one[uz(step)]);
      if (with_b) require_same(pick(0), want_two[at++]);
      if (step == 14) at = 0;
      if (with_d) require_same(pick(1), want_three[at++]);
      e.check({&a});
    }
  }
}

TEST_CASE("a fork continues like its parent, and on its own") {
  bool many_drafts = true;  // for the first case
  for (decode_case const& c : all_decode_cases()) {
    INFO(c.name);
    world w;
    w.draft = std::exchange(many_drafts, false) ? 70 : 0;
    text const words = w.words();
    auto const want = alone(c, w, words, 40);
    engine e(w.options(c.policy), c.policy);
    stream parent = e.begin(words);
    e.prompt(parent, w.prompt);
    for (std::size_t i = 0; i < 12; ++i) require_same(e.step({&parent}), want[i]);
    stream child = parent;
    REQUIRE(e.session().fork(parent.id, child.id) == status::ok);
    CHECK(child.id != parent.id);
    child.row = w.shape.n_seq - 1 - child.id;
    e.copy_rows(parent, child);
    e.check({&parent, &child});
    // The parent runs ahead, ends, and the child follows it.
    for (std::size_t i = 12; i < 25; ++i) require_same(e.step({&parent}), want[i]);
    for (std::size_t i = 12; i < 20; ++i) require_same(e.step({&child}), want[i]);
    REQUIRE(e.session().end(parent.id) == status::ok);
    for (std::size_t i = 20; i < 40; ++i) require_same(e.step({&child}), want[i]);
    e.check({&child});
  }
}

TEST_CASE("a frozen prefix stays where it is, and the rest follows the oracle") {
  decode_sizes z;
  z.frozen = 5;
  for (decode_case const& c : all_decode_cases(z)) {
    auto const t = c.policy.score.traits();
    INFO(c.name);
    world w;
    w.prompt = 21;
    w.n_layers = 1;
    text const words = w.words();
    engine e(w.options(c.policy, 40), c.policy);
    index_t id = -1;
    if (!t.prefix_safe) {
      CHECK(e.session().begin(id, {-1, z.frozen}) == status::unsupported);
      continue;
    }
    stream s = e.begin(words, {-1, z.frozen});
    e.prompt(s, w.prompt - z.frozen);
    auto ref = c.make(words.layer[0], w.prompt, e.rule());
    ref->end_prompt(w.prompt - 1);
    index_t ties = 0;
    for (index_t step = 0; step < 50; ++step) {
      auto const r = e.step({&s});
      (void)ref->step(s.tokens - 1);
      INFO("step " << step);
      auto const& got = c.at_append ? r[0].appended : r[0].done;
      bool const same = ref->agrees(got, ties);
      if (!same) CHECK(got == ref->live());
      REQUIRE(same);
      for (index_t h = 0; h < w.shape.n_kv_heads; ++h)
        for (index_t p = 0; p < z.frozen; ++p) REQUIRE(e.session().positions(0)(s.id, h, p) == p);
      e.check({&s});
    }
    CHECK(ties <= 1);
  }
}

TEST_CASE("saved state continues elsewhere; other configurations and damaged bytes are refused") {
  for (decode_case const& c : all_decode_cases()) {
    INFO(c.name);
    world w;
    text const words = w.words();
    auto const want = alone(c, w, words, 40);
    engine e(w.options(c.policy), c.policy), other(w.options(c.policy), c.policy);
    stream s = e.begin(words);
    e.prompt(s, w.prompt);
    for (std::size_t i = 0; i < 15; ++i) (void)e.step({&s});
    std::vector<std::byte> bytes(e.session().saved_bytes());
    CHECK(e.session().save(s.id, std::span(bytes).first(bytes.size() - 1)) ==
          status::workspace_too_small);
    CHECK(e.session().save(s.id + 1, bytes) == status::bad_sequence);
    REQUIRE(e.session().save(s.id, bytes) == status::ok);

    stream spare = other.begin(words), to = other.begin(words);
    to.tokens = s.tokens;
    CHECK(other.session().load(2, bytes) == status::bad_sequence);
    for (std::size_t const n : {std::size_t{0}, std::size_t{7}, bytes.size() - 1})
      CHECK(other.session().load(to.id, std::span(bytes).first(n)) == status::bad_argument);
    for (std::size_t const at :
         {0U, 8U, 12U, 16U, 24U}) {  // magic, byte order, version, hash, size
      auto damaged = bytes;
      damaged[at] ^= std::byte{1};
      CHECK(other.session().load(to.id, damaged) == status::bad_argument);
    }
    CHECK(other.session().tokens(to.id) == 0);
    REQUIRE(other.session().load(to.id, bytes) == status::ok);
    copy_cache(e, s, other, to, w.n_layers);
    other.check({&to});
    for (std::size_t i = 15; i < 40; ++i) require_same(other.step({&to}), want[i]);
    CHECK(other.session().tokens(spare.id) == 0);

    policy_options o;
    o.capacity = 15;
    o.window = 4;
    any const another = make(c.policy.name, o);
    world same = w;
    engine third(same.options(another, w.options(c.policy).cache.shape.max_slots), another);
    stream x = third.begin(words);
    CHECK(third.session().load(x.id, bytes) == status::bad_argument);
  }
}

TEST_CASE("a transient prompt longer than the pool gives what an in-place one gives") {
  for (decode_case const& c : all_decode_cases()) {
    if (!is_plain(c)) continue;
    INFO(c.name);
    world w;
    w.prompt = 40;
    text const words = w.words(1), more = w.words(2);
    auto const want = alone(c, w, words, 30), want_more = alone(c, w, more, 30);
    world t = w;
    t.lim.max_prompt = 40;
    engine e(t.options(c.policy, detail::decode_slots(c.policy.budget.capacity(), c.policy.when)),
             c.policy);
    CHECK(e.session().slots_needed() == e.cache(0).shape().max_slots);
    stream a = e.begin(words), b = e.begin(more);
    e.prompt(a, w.prompt, {{13, 20, 7}});
    e.prompt(b, w.prompt);
    for (std::size_t i = 0; i < 30; ++i) {
      auto const r = e.step({&a, &b});
      for (std::size_t l = 0; l < uz(w.n_layers); ++l) {
        INFO("step " << i << " layer " << l);
        require_same(r[2 * l], want[i][l], false);
        require_same(r[2 * l + 1], want_more[i][l], false);
      }
    }
    e.check({&a, &b});
  }
}

TEST_CASE("budgets and pools per layer") {
  for (decode_case const& c : all_decode_cases()) {
    INFO(c.name);
    world w;
    w.n_layers = 3;
    index_t const tokens[] = {20, 9, 14};
    any p = c.policy;
    per_layer b;
    b.n = 3;
    std::copy_n(tokens, 3, b.tokens);
    p.budget = b;
    engine_options o = w.options(p);
    for (index_t const k : tokens)
      o.slots.push_back(std::max(w.prompt, detail::decode_slots(k, p.when)) + 1);
    engine e(o, p);
    text const words = w.words();
    stream s = e.begin(words);
    e.prompt(s, w.prompt);
    std::vector<std::vector<token_record>> want;
    std::vector<text> one_layer;
    std::vector<std::unique_ptr<engine>> singles;
    std::vector<stream> streams;
    for (index_t l = 0; l < 3; ++l) {
      one_layer.emplace_back();
      one_layer.back().layer.push_back(words.layer[uz(l)]);
    }
    for (index_t l = 0; l < 3; ++l) {
      world single = w;
      single.n_layers = 1;
      any q = c.policy;
      q.budget = uniform{tokens[l]};
      singles.push_back(std::make_unique<engine>(single.options(q), q));
      streams.push_back(singles.back()->begin(one_layer[uz(l)]));
      singles.back()->prompt(streams.back(), w.prompt);
    }
    for (index_t step = 0; step < 40; ++step) {
      auto const r = e.step({&s});
      for (std::size_t l = 0; l < 3; ++l) {
        INFO("step " << step << " layer " << l);
        require_same({r[l]}, singles[l]->step({&streams[l]}), false);
      }
      e.check({&s});
    }
  }
}

TEST_CASE("skipped layers are left alone and budgets do not count them") {
  for (decode_case const& c : all_decode_cases()) {
    INFO(c.name);
    world w, all;
    w.n_layers = 4;
    text const words = w.words();
    text managed;
    managed.layer = {words.layer[1], words.layer[3]};
    auto const want = alone(c, all, managed, 30);
    engine_options o = w.options(c.policy);
    o.skip = {true, false, true, false};
    engine e(o, c.policy);
    stream s = e.begin(words);
    e.prompt(s, w.prompt);
    auto const b = engine::batch_of({&s});
    std::vector<float> q(uz(w.shape.n_q_heads * w.shape.dim_k)), out(q.size());
    auto const query = make_queries(q.data(), w.shape.n_q_heads, 1, w.shape.dim_k);
    for (std::size_t i = 0; i < 30; ++i) {
      CHECK(e.session().append(0, b.batch()) == status::ok);
      CHECK(e.session().attend(0, b.batch(), query, out.data()) == status::unsupported);
      CHECK(e.session().observe(2, b.batch(), query) == status::ok);
      auto const r = e.step({&s});
      require_same({r[1], r[3]}, want[i], false);
    }
    CHECK(e.session().lengths(0).data == nullptr);
    CHECK(e.session().positions(2).data == nullptr);
    CHECK(e.session().end_prompt(2, s.id) == status::ok);
    e.check({&s});
  }
}

TEST_CASE("an empty sequence may decode, alone and in a batch") {
  for (decode_case const& c : all_decode_cases()) {
    INFO(c.name);
    world w;
    text const words = w.words(), more = w.words(1);
    engine e(w.options(c.policy), c.policy), e0(w.options(c.policy), c.policy);
    stream a = e.begin(words), b = e.begin(more), only = e0.begin(more);
    e.prompt(a, w.prompt);
    e.prompt(b, 0);
    REQUIRE(e0.session().end_prompt(only.id) == status::ok);
    for (index_t step = 0; step < 30; ++step) {
      auto const r = e.step({&a, &b});
      auto const want = e0.step({&only});
      for (std::size_t l = 0; l < 2; ++l) require_same(r[2 * l + 1], want[l]);
      REQUIRE(e.session().verify() == status::ok);
    }
    e.check({&a, &b});
  }
}
