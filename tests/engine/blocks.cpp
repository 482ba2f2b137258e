// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
// Engines that commit plans themselves: due, choose, commit, report; packed and whole blocks, freed blocks
// and the tables to use from then on.
#include "../support/block_engine.hpp"
#include "../support/catch.hpp"

using namespace kvkeep;
using namespace kvkeep::test;

TEST_CASE("whole blocks: no token moves, the report frees blocks and proposes tables") {
  for (scope const per : {scope::head, scope::layer, scope::sequence})
    for (bool const per_head : {false, true})
      for (bool const share : {false, true}) {
        // What shares a table must share a kept set.
        if (per == scope::head && (!per_head || share)) continue;
        if (per == scope::layer && share) continue;
        for (index_t const block : {2, 4})
          for_seeds(1, [&](generator& g) {
            INFO("per " << to_string(per) << " table per head " << per_head << " shared " << share
                        << " block " << block);
            block_case c;
            c.pool.table_per_head = per_head;
            c.pool.layers_share = share;
            c.pool.block = block;
            c.policy = block_policy(true, per, block);
            run_blocks<host_calls>(c, g.next());
          });
      }
}

TEST_CASE("packed blocks: floor(C / b) * b tokens stay, packed") {
  for (scope const per : {scope::head, scope::layer, scope::sequence})
    for (bool const per_head : {false, true})
      for (bool const share : {false, true})
        for_seeds(1, [&](generator& g) {
          INFO("per " << to_string(per) << " table per head " << per_head << " shared " << share);
          block_case c;
          c.pool.table_per_head = per_head;
          c.pool.layers_share = share;
          c.policy = block_policy(false, per);
          run_blocks<host_calls>(c, g.next());
        });
}

TEST_CASE("plans of single tokens follow plain decoding") {
  for (decode_case const& c : all_decode_cases()) {
    if (!is_plain(c)) continue;
    INFO(c.name);
    world w;
    world own = w;
    own.lim.engine_commits = true;
    text const words = w.words();
    engine plain(w.options(c.policy), c.policy), e(own.options(c.policy), c.policy);
    stream a = plain.begin(words), b = e.begin(words);
    plain.prompt(a, w.prompt);
    e.prompt(b, w.prompt);
    auto const batch = engine::batch_of({&b});
    for (index_t step = 0; step < 40; ++step) {
      auto want = plain.step({&a}), got = e.step({&b});
      any_session::plan_type plan;
      if (e.session().due(batch.batch())) {
        REQUIRE(e.session().choose(batch.batch(), plan) == status::ok);
        REQUIRE(e.session().commit(plan) == status::ok);
      }
      for (index_t l = 0; l < w.n_layers; ++l) got[uz(l)].done = e.kept(l, b);
      INFO("step " << step);
      require_same(got, want, false);
      e.check({&b});
    }
  }
}

TEST_CASE("stale plans and plans of other sessions are refused, and nothing changes") {
  world w;
  w.lim.engine_commits = true;
  policy_options o;
  o.capacity = 12;
  o.window = 3;
  any const p = make("h2o", o);
  text const words = w.words(), more = w.words(1);
  engine e(w.options(p), p), other(w.options(p), p);
  stream a = e.begin(words), b = e.begin(more), x = other.begin(words);
  e.prompt(a, w.prompt);
  e.prompt(b, w.prompt);
  other.prompt(x, w.prompt);
  (void)e.step({&a, &b});
  (void)other.step({&x});
  auto const both = engine::batch_of({&a, &b}), one = engine::batch_of({&a});
  any_session::plan_type plan, foreign, second;
  CHECK(e.session().commit(plan) == status::stale_plan);
  REQUIRE(e.session().due(both.batch()));
  REQUIRE(e.session().choose(both.batch(), plan) == status::ok);
  REQUIRE(other.session().choose(engine::batch_of({&x}).batch(), foreign) == status::ok);
  CHECK(e.session().commit(foreign) == status::stale_plan);
  CHECK(e.kept(0, a)[0].size() == 13);
  // A token in between: positions have changed hands.
  REQUIRE(e.session().append(0, one.batch()) == status::ok);
  CHECK(e.session().commit(plan) != status::ok);
  CHECK(e.kept(0, b)[0].size() == 13);
  std::vector<float> q(32, 1), out(24);
  REQUIRE(e.session().attend(0, one.batch(), make_queries(q.data(), 4, 1, 8), out.data()) ==
          status::ok);
  REQUIRE(e.session().append(1, one.batch()) == status::ok);
  CHECK(e.session().choose(one.batch(), second) == status::bad_order);
  REQUIRE(e.session().attend(1, one.batch(), make_queries(q.data(), 4, 1, 8), out.data()) ==
          status::ok);
  REQUIRE(e.session().confirm(one.batch(), 1) == status::ok);
  CHECK(e.session().commit(plan) == status::stale_plan);
  CHECK(e.kept(0, a)[0].size() == 14);
  REQUIRE(e.session().choose(both.batch(), plan) == status::ok);
  REQUIRE(e.session().end(b.id) == status::ok);
  CHECK(e.session().commit(plan) == status::stale_plan);
  REQUIRE(e.session().choose(one.batch(), plan) == status::ok);
  REQUIRE(e.session().choose(one.batch(), second) == status::ok);
  REQUIRE(e.session().commit(second) == status::ok);
  CHECK(e.session().commit(second) == status::stale_plan);
  CHECK(e.session().commit(plan) == status::stale_plan);
  CHECK(e.kept(0, a)[0].size() == 12);
}

TEST_CASE("reports that do not fit are refused and can be taken again") {
  block_case c;
  c.pool.n_layers = 1;
  c.policy = block_policy(true, scope::layer);
  any const p = make("knorm", c.policy);
  block_engine<host_calls> e(c.pool, p, own_commits());
  text const t = words_of(3, 1, 60);
  index_t id = -1;
  REQUIRE(e.session().begin(id) == status::ok);
  e.prompt(id, 0, t, 33);
  std::vector<index_t> one(1), tables(uz(e.per_table()));
  report_buffer small;
  small.lengths = one;
  CHECK(e.session().report(id, small) == status::bad_argument);
  small = {};
  small.freed = one;
  CHECK(e.session().report(id, small) == status::bad_argument);
  small = {};
  small.tables = std::span(tables).first(2);
  CHECK(e.session().report(id, small) == status::bad_argument);
  std::vector<index_t> lengths(8);
  small = {};
  small.lengths = lengths;  // says nothing of the blocks that have left
  CHECK(e.session().report(id, small) == status::bad_argument);
  CHECK(e.session().report(id + 1, {}) == status::bad_sequence);
  index_t const freed = e.adopt(id, 0), again = e.adopt(id, 0);
  CHECK(freed > 0);
  CHECK(again == 0);  // said once
}
