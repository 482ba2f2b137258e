// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
// Engines that allocate and commit themselves, around a session whose state the host never reads.
#include "../support/block_engine.hpp"
#include "../support/device_engine.hpp"

namespace {

using namespace kvkeep;
using test::bit;
using test::generator;
using test::small;
using test::uz;
using device_batch = batch_ref<test::device_memory>;

/// How a block_engine talks to a device session.
struct device_calls {
  using space = test::device_memory;
  using policy_type = test::device_any;
  using session_type = device_session<test::op_context, policy_type, policy_type>;
  static policy_type make_policy(char const* name, policy_options const& o) {
    return kvkeep::make_policy<test::op_context>(name, o);
  }

  std::vector<layer_spec<space>> specs;
  std::unique_ptr<test::aligned_block> memory;
  std::optional<session_type> session;
  void bind(policy_type const& p, policy_type const& d, std::span<layer_spec<> const> host,
            limits const& lim) {
    (void)test::other_context();  // streams are late
    for (auto const& s : host) specs.push_back({test::to_device(s.kv)});
    std::span<layer_spec<space> const> const all(specs);
    memory = std::make_unique<test::aligned_block>(
        device_session_bytes(test::one_thread(), p, d, all, lim));
    session.emplace(bind_device_session(test::one_thread(), p, d, all, lim, memory->span()));
  }
  using one = test::own_batch;
  status append_at(one const& s, std::int64_t const* map) { return session->append_at(s, map); }
  status confirm(one const& s) {
    for (index_t l = 0; l < oracle::count(specs); ++l)
      KVKEEP_TRY(session->observe(l, s, tokens_only(1)));
    return status::ok;
  }
  status choose(one const& s, session_type::plan_type& p) { return session->choose(s, p); }
  void look(one const& s, bool) { REQUIRE(session->faults()[s.ids[0]] == 0); }
  // Both would be faults, which stay: see below.
  void refuse_token(one const&) {}
  void refuse_plan(one const&, session_type::plan_type const&) {}
  static void wait() { test::settle_device(); }
};

/// A sequence in whole blocks, a set per layer, with a prompt.
struct block_sequence {
  test::text words = test::words_of(3, 2, 60);
  test::block_engine<device_calls> e{
      {},
      device_calls::make_policy("knorm", test::block_policy(true, scope::layer)),
      test::own_commits()};
  std::vector<index_t> id{-1}, row{0};  // on the heap, as everything that a device reads
  explicit block_sequence(index_t prompt) {
    REQUIRE(e.session().begin(id[0]) == status::ok);
    e.prompt(id[0], row[0], words, prompt);
  }
};

/// A plan of all of a batch, applied.
void decide(test::device_engine& e, device_batch const& b) {
  plan<test::device_memory> p;
  REQUIRE(e.session().choose(b, p) == status::ok);
  REQUIRE(e.session().commit(p) == status::ok);
  test::settle_device();
}

}  // namespace

TEST_CASE("whole and packed blocks leave a device session as they leave a session") {
  for (bool const whole : {true, false})
    for (scope const per : {scope::head, scope::layer, scope::sequence})
      for (bool const per_head : {false, true})
        for (bool const share : {false, true}) {
          if (whole && per == scope::head && (!per_head || share)) continue;
          if (whole && per == scope::layer && share) continue;
          test::for_seeds(1, [&](generator& g) {
            INFO((whole ? "whole" : "packed") << ", per " << to_string(per) << ", table per head "
                                              << per_head << ", shared " << share);
            test::block_case c;
            c.pool.table_per_head = per_head;
            c.pool.layers_share = share;
            c.pool.block = whole && g.chance(0.5F) ? 2 : 4;
            c.policy = test::block_policy(whole, per, c.pool.block);
            test::run_blocks<device_calls>(c, g.next());
          });
        }
}

TEST_CASE("committed plans keep what plain decoding keeps") {
  struct pairing {
    char const* prompt;
    char const* decode;
    policy_options o, d;
  };
  std::vector<pairing> all;
  for (char const* name : {"h2o", "tova", "knorm", "keydiff", "morphkv", "streamingllm"})
    all.push_back({name, name, small(14), small(14)});
  for (double const burst : {1.0, 1.3})
    for (scope const per : {scope::layer, scope::sequence}) {
      policy_options o = small(14);
      o.per = per;
      o.evict_after = burst;
      all.push_back({"knorm", "knorm", o, o});
      if (burst == 1.0) all.push_back({"h2o", "h2o", o, o});
    }
  for (morph_rows rows : {morph_rows::cached, morph_rows::lazy, morph_rows::direct}) {
    policy_options o = small(20);
    o.window = 9;
    o.evaluation = rows;
    all.push_back({"morphkv", "morphkv", o, o});
  }
  policy_options inherits = small(14);
  inherits.budget = "inherit";
  all.push_back({"adakv", "h2o", small(14), inherits});
  all.push_back({"snapkv", "morphkv", small(20), small(14)});
  for (pairing const& p : all)
    test::for_seeds(1, [&](generator& g) {
      INFO(p.prompt << ", then " << p.decode << ", per " << to_string(p.d.per) << ", evict_after "
                    << p.d.evict_after);
      test::world w;
      w.layout = g.one_of(test::all_layouts());
      w.seed = g.next();
      auto const prompt = test::make(p.prompt, p.o), decode = test::make(p.decode, p.d);
      auto o = w.options(decode, w.prompt + 40);
      test::engine host(o, prompt, decode);
      o.lim.engine_commits = true;
      test::device_engine device(o, make_policy<test::op_context>(p.prompt, p.o),
                                 make_policy<test::op_context>(p.decode, p.d));
      auto const a = w.words(1), b = w.words(2);
      test::stream x = host.begin(a), y = host.begin(b), s = device.begin(a), t = device.begin(b);
      host.prompt(x, w.prompt);
      host.prompt(y, 9);
      device.prompt(s, w.prompt, {w.prompt});
      device.prompt(t, 9, {9});
      test::own_batch const both{{t.id, s.id}, {t.row, s.row}};
      decide(device, both);  // the decode policy keeps less than the prompt's
      for (int step = 0; step < 16; ++step) {
        auto const want = host.step({&y, &x});
        auto got = device.step({&t, &s});
        decide(device, both);
        for (index_t l = 0; l < w.n_layers; ++l) {
          got[uz(2 * l)].done = device.kept(l, t);
          got[uz(2 * l + 1)].done = device.kept(l, s);
        }
        INFO("step " << step);
        test::require_same(got, want, false);
      }
      for (index_t const id : both.ids) REQUIRE(device.session().faults()[id] == 0);
      CHECK(device.intact());
    });
}

TEST_CASE("a plan is applied to the sequences that it was made for, as they were") {
  test::world w;
  w.lim.engine_commits = true;
  auto const p = make_policy<test::op_context>("knorm", small(12));
  auto const o = w.options(test::make("knorm", small(12)), 60);
  test::device_engine e(o, p, p), other(o, p, p);
  auto const words = w.words(1);
  test::stream a = e.begin(words), b = e.begin(words), x = other.begin(words);
  e.prompt(a, 20, {20});
  e.prompt(b, 20, {20});
  other.prompt(x, 20, {20});
  e.step({&a, &b});
  other.step({&x});
  test::own_batch const both{{a.id, b.id}, {a.row, b.row}};
  device_batch const one = both.first(1);
  auto& s = e.session();
  plan<test::device_memory> chosen, foreign, second;
  CHECK(s.commit(chosen) == status::stale_plan);
  REQUIRE(s.choose(both, chosen) == status::ok);
  REQUIRE(other.session().choose(one, foreign) == status::ok);
  CHECK(s.commit(foreign) == status::stale_plan);

  SECTION("a token in between") {
    e.step({&a});
    REQUIRE(s.commit(chosen) == status::ok);
    test::settle_device();
    CHECK(s.faults()[a.id] == bit(device_fault::stale_plan));
    CHECK(e.kept(0, a)[0].size() == 14);
    CHECK(s.faults()[b.id] == 0);
    CHECK(e.kept(0, b)[0].size() == 12);
    e.step({&a, &b});  // goes on
    CHECK(e.kept(0, a)[0].size() == 15);
    decide(e, both);
    CHECK(e.kept(0, a)[0].size() == 12);
    CHECK(s.faults()[a.id] == bit(device_fault::stale_plan));
  }
  SECTION("committed twice") {
    REQUIRE(s.commit(chosen) == status::ok);
    test::settle_device();
    auto const once = e.kept(1, a);
    CHECK(once[0].size() == 12);
    REQUIRE(s.commit(chosen) == status::ok);
    test::settle_device();
    CHECK(e.kept(1, a) == once);
    CHECK(s.faults()[a.id] == bit(device_fault::stale_plan));
  }
  SECTION("another choice since") {
    REQUIRE(s.choose(one, second) == status::ok);
    CHECK(s.commit(chosen) == status::stale_plan);  // of two entries
    REQUIRE(s.commit(second) == status::ok);
    test::settle_device();
    CHECK(e.kept(0, a)[0].size() == 12);
    CHECK(e.kept(0, b)[0].size() == 13);
  }
  SECTION("ended, and begun anew") {
    REQUIRE(s.end(b.id) == status::ok);
    bool const anew = GENERATE(false, true);
    test::stream fresh;
    if (anew) {
      fresh = e.begin(words, b.id);
      e.prompt(fresh, 15, {15});
    }
    REQUIRE(s.commit(chosen) == status::ok);
    test::settle_device();
    CHECK(e.kept(0, a)[0].size() == 12);
    CHECK(s.faults()[b.id] == bit(device_fault::stale_plan));
    if (anew) CHECK(e.kept(1, fresh)[1].size() == 12);
    if (!anew) CHECK(s.lengths(0)(b.id, 0) == 13);
    CHECK(e.intact());
  }
  SECTION("before a token has had its attention") {
    e.append(a);
    REQUIRE(s.choose(both, second) == status::ok);
    REQUIRE(s.commit(second) == status::ok);
    test::settle_device();
    CHECK(s.faults()[a.id] == bit(device_fault::bad_order));
    CHECK(e.kept(0, a)[0].size() == 14);
    CHECK(e.kept(0, b)[0].size() == 12);
  }
  SECTION("before the end of a prompt") {
    test::stream late = e.begin(words);
    test::own_batch const of_late{{late.id}, {late.row}};
    e.observe_prompt(late, 0, 0, 18);
    REQUIRE(s.choose(of_late, second) == status::ok);
    REQUIRE(s.commit(second) == status::ok);
    test::settle_device();
    CHECK(s.faults()[late.id] == bit(device_fault::bad_order));
    CHECK(e.kept(0, late)[0].size() == 18);
  }
}

TEST_CASE("what a prompt's whole blocks leave is cut with the first token") {
  policy_options const blocks = test::block_policy(true, scope::head), tokens = small(9);
  test::pool_options pool;
  pool.table_per_head = true;
  limits lim = test::own_commits();
  lim.engine_commits = false;
  auto const words = test::words_of(3, 2, 60);
  auto const run = [&](auto e) {
    index_t id = -1;
    REQUIRE(e->session().begin(id) == status::ok);
    e->prompt(id, 1, words, 33);
    e->adopt(id, 1);
    CHECK(e->session().lengths(0)(id, 0) > 11);
    e->token(id, 1, words, 33);
    std::vector<oracle::kept_set> left;
    for (index_t l = 0; l < 2; ++l)
      for (index_t h = 0; h < 2; ++h) {
        left.push_back(e->slots(l, id, 1, h, words));
        std::sort(left.back().begin(), left.back().end());
      }
    return left;
  };
  auto const host = [](policy_options const& o) { return test::make("knorm", o); };
  auto const device = [](policy_options const& o) { return device_calls::make_policy("knorm", o); };
  auto const want = run(std::make_unique<test::block_engine<test::host_calls>>(pool, host(blocks),
                                                                               host(tokens), lim));
  CHECK(want[0].size() == 9);
  CHECK(run(std::make_unique<test::block_engine<device_calls>>(pool, device(blocks), device(tokens),
                                                               lim)) == want);
}

TEST_CASE("a selector of blocks that never selects asks for no pages") {
  policy_options o = small(12);
  o.whole_blocks = true;
  o.block = 4;
  for (test::layout_id const layout : {test::layout_id::hnd, test::layout_id::ragged})
    for (bool const commits : {false, true}) {
      INFO(layout << (commits ? ", commits" : ""));
      test::world w;
      w.layout = layout;
      w.lim.engine_commits = commits;
      auto const options = w.options(test::make("fullkv", o), 3000);
      auto const p = make_policy<test::op_context>("fullkv", o);
      test::engine host(options, test::make("fullkv", o));
      test::device_engine device(options, p, p);
      auto const words = w.words(1);
      test::stream x = host.begin(words), y = device.begin(words);
      host.prompt(x, 9);
      device.prompt(y, 9, {9});
      for (int t = 0; t < 2; ++t) test::require_same(host.step({&x}), device.step({&y}), false);
      if (layout == test::layout_id::ragged || commits) continue;
      limits many;
      many.max_sequences = 1 << 20;  // by which no slots are multiplied
      CHECK_NOTHROW(device_session_bytes(test::one_thread(), p, p, device.specs(), many));
    }
}

TEST_CASE("a refused plan of whole blocks leaves the tables alone") {
  block_sequence q(12);
  auto& [words, e, id, row] = q;
  auto& s = e.session();
  index_t position = 12;
  while (s.lengths(0)(id[0], 0) < 20) e.token(id[0], row[0], words, position++);
  plan<test::device_memory> chosen;
  REQUIRE(s.choose({1, row.data(), id.data()}, chosen) == status::ok);
  test::settle_device();
  CHECK(chosen.count(0, 0) < 20);
  e.token(id[0], row[0], words, position++);
  REQUIRE(s.commit(chosen) == status::ok);
  test::settle_device();
  CHECK(s.faults()[id[0]] == bit(device_fault::stale_plan));
  CHECK(s.lengths(1)(id[0], 1) == 21);
  e.token(id[0], row[0], words, position++);
  CHECK(s.lengths(1)(id[0], 1) == 22);
  CHECK(s.faults()[id[0]] == bit(device_fault::stale_plan));
}

TEST_CASE("a device session reports what a session reports") {
  struct told {
    std::vector<index_t> lengths, freed, freed_of, tables, sizes;
    explicit told(index_t tables_of, index_t per_table)
        : lengths(uz(4), -9),
          freed(uz(tables_of * per_table), -9),
          freed_of(uz(tables_of), -9),
          tables(uz(tables_of * per_table), -9),
          sizes(uz(tables_of), -9) {}
    report_buffer buffer() { return {lengths, freed, freed_of, tables, sizes}; }
    bool operator==(told const&) const = default;
  };
  policy_options burst = small(14);
  burst.evict_after = 1.4;
  policy_options inherits = small(14);
  inherits.budget = "inherit";
  struct pairing {
    char const* prompt;
    char const* decode;
    policy_options o, d;
  };
  for (pairing const& p :
       {pairing{"knorm", "knorm", burst, burst}, pairing{"h2o", "h2o", small(14), small(14)},
        pairing{"adakv", "morphkv", small(14), inherits}})
    for (test::layout_id const layout : {test::layout_id::paged, test::layout_id::paged_per_head}) {
      INFO(p.prompt << ", then " << p.decode << ", " << layout);
      test::world w;
      w.layout = layout;
      auto const prompt = test::make(p.prompt, p.o), decode = test::make(p.decode, p.d);
      auto const o = w.options(decode, 60);
      test::engine host(o, prompt, decode);
      test::device_engine device(o, make_policy<test::op_context>(p.prompt, p.o),
                                 make_policy<test::op_context>(p.decode, p.d));
      auto const words = w.words(1);
      test::stream x = host.begin(words), y = device.begin(words);
      auto const& pages = host.specs()[0].kv.k.layout.paged;
      index_t const n_tables = w.n_layers * (pages.table_head_stride != 0 ? 2 : 1);
      index_t freed = 0;
      auto const compare = [&](test::stream const& a, test::stream const& b) {
        told want(n_tables, pages.blocks_per_table), got = want;
        REQUIRE(host.session().report(a.id, want.buffer(), a.row) == status::ok);
        REQUIRE(device.session().report(b.id, got.buffer(), b.row) == status::ok);
        test::settle_device();
        REQUIRE(want == got);
        for (index_t const n : got.freed_of) freed += n;
      };
      host.prompt(x, w.prompt);
      device.prompt(y, w.prompt, {w.prompt});
      test::stream child = x;
      REQUIRE(host.session().fork(x.id, child.id) == status::ok);
      test::stream const device_child = device.fork(y);
      child.row = device_child.row;
      compare(child, device_child);
      compare(x, y);
      CHECK(freed > 0);
      bool const frees = freed > 0 && p.o.evict_after > 1;
      freed = 0;
      for (int step = 0; step < 14; ++step) {
        host.step({&x});
        device.step({&y});
        compare(x, y);
      }
      CHECK((freed > 0) == frees);
    }
}

TEST_CASE("the tail is no place for a token while a head has a free slot") {
  test::world w;
  auto const p = make_policy<test::op_context>("h2o", small(12));
  test::device_engine e(w.options(test::make("h2o", small(12)), 60), p, p);
  auto const words = w.words(1);
  test::stream x = e.begin(words);
  e.prompt(x, 20, {20});
  e.step({&x});
  auto& s = e.session();
  test::own_batch const b{{x.id}, {x.row}};
  REQUIRE(s.append_at(b) == status::ok);
  test::settle_device();
  CHECK(s.faults()[x.id] == bit(device_fault::bad_order));
  CHECK(e.kept(0, x)[0].size() == 12);
}

TEST_CASE("a token goes where the engine has put it, or nowhere") {
  test::pool_options pool;
  pool.layers_share = true;
  limits lim = test::own_commits();
  test::block_engine<device_calls> e(pool, device_calls::make_policy("knorm", small(12)), lim);
  auto const words = test::words_of(3, 2, 60);
  test::own_batch both{{-1, -1}, {0, 1}};
  auto& [ids, rows] = both;
  auto& s = e.session();
  for (std::size_t i = 0; i < 2; ++i) {
    REQUIRE(s.begin(ids[i]) == status::ok);
    e.prompt(ids[i], rows[i], words, 8);  // two whole blocks
  }
  SECTION("another slot") {
    for (std::size_t i = 0; i < 2; ++i) e.grow(0, rows[i], 0, 9);
    std::int64_t const right = std::int64_t{e.entry(0, 0, 0, 2)} * 4;
    std::vector<std::int64_t> const map{right, std::int64_t{e.entry(0, 1, 0, 2)} * 4 + 1};
    REQUIRE(s.append_at(both, map.data()) == status::ok);
    test::settle_device();
    CHECK(s.faults()[ids[0]] == 0);
    CHECK(s.faults()[ids[1]] == bit(device_fault::wrong_slot));
  }
  SECTION("no page") {
    e.grow(0, rows[0], 0, 9);
    REQUIRE(s.append_at(both) == status::ok);
    test::settle_device();
    CHECK(s.faults()[ids[0]] == 0);
    CHECK(s.faults()[ids[1]] == bit(device_fault::bad_table));
  }
  for (index_t l = 0; l < 2; ++l)
    for (index_t h = 0; h < 2; ++h) {
      CHECK(s.lengths(l)(ids[0], h) == 9);
      CHECK(s.lengths(l)(ids[1], h) == 8);
    }
}

TEST_CASE("a page that one layer lacks keeps a token out of all of them") {
  test::pool_options pool;
  test::block_engine<device_calls> e(pool, device_calls::make_policy("knorm", small(12)),
                                     test::own_commits());
  test::own_batch b{{-1}, {1}};
  auto& id = b.ids;
  REQUIRE(e.session().begin(id[0]) == status::ok);
  e.prompt(id[0], 1, test::words_of(3, 2, 60), 8);
  e.grow(0, 1, 0, 9);
  REQUIRE(e.session().append_at(b) == status::ok);
  test::settle_device();
  CHECK(e.session().faults()[id[0]] == bit(device_fault::bad_table));
  for (index_t l = 0; l < 2; ++l) CHECK(e.session().lengths(l)(id[0], 0) == 8);
}

TEST_CASE("tokens and plans wait until a report has told of the tables") {
  block_sequence q(33);
  auto& [words, e, id, row] = q;
  auto& s = e.session();
  std::vector<index_t> short_list(uz(2 * e.per_table() - 1)), one(1);
  report_buffer small_buffer;
  small_buffer.lengths = std::span(short_list).first(3);
  CHECK(s.report(id[0], small_buffer) == status::bad_argument);
  for (auto const list : {&report_buffer::freed, &report_buffer::tables}) {
    small_buffer = {};
    small_buffer.*list = short_list;
    CHECK(s.report(id[0], small_buffer) == status::bad_argument);
  }
  for (auto const list : {&report_buffer::freed_of, &report_buffer::table_sizes}) {
    small_buffer = {};
    small_buffer.*list = one;
    CHECK(s.report(id[0], small_buffer) == status::bad_argument);
  }
  CHECK(s.report(id[0] + 1, {}) == status::bad_sequence);
  CHECK(s.report(id[0], {}, 2) == status::bad_argument);
  bool const reported = GENERATE(true, false);
  if (reported) CHECK(e.adopt(id[0], 0) > 0);
  index_t const n = s.lengths(0)(id[0], 0);
  CHECK(n < 33);
  if (reported) {
    e.token(id[0], 0, words, 33);
  } else {
    REQUIRE(s.append_at({1, row.data(), id.data()}) == status::ok);
    test::settle_device();
  }
  CHECK(s.faults()[id[0]] == (reported ? 0 : bit(device_fault::bad_order)));
  CHECK(s.lengths(0)(id[0], 0) == (reported ? n + 1 : n));
}

TEST_CASE("plans want an engine that commits, and a policy that decides while decoding") {
  test::world w;
  auto const o = small(12);
  plan<test::device_memory> p;
  auto const words = w.words(1);
  for (bool const commits : {false, true}) {
    char const* const name = commits ? "snapkv" : "h2o";
    w.lim.engine_commits = commits;
    auto const policy = make_policy<test::op_context>(name, o);
    test::device_engine e(w.options(test::make(name, o), 60), policy, policy);
    test::stream x = e.begin(words);
    e.prompt(x, 9, {9});
    test::own_batch const b{{x.id}, {x.row}};
    CHECK(e.session().choose(b, p) == status::unsupported);
    CHECK(e.session().commit(p) == status::stale_plan);
    CHECK(e.session().append_at({}) == status::bad_argument);
  }
  w.lim.engine_commits = true;
  auto const policy = make_policy<test::op_context>("h2o", o);
  test::device_engine e(w.options(test::make("h2o", o), 60), policy, policy);
  CHECK(e.session().choose({}, p) == status::bad_argument);
}

TEST_CASE("the host knows which layers a prompt's end decides") {
  test::world w;
  w.n_layers = 4;
  for (char const* name : {"h2o", "dynamickv", "cake"})
    for (scope const per : {scope::head, scope::sequence}) {
      policy_options o = small(12);
      o.per = per;
      if (name[0] != 'h') o.per = scope::head;
      auto const policy = make_policy<test::op_context>(name, o);
      auto const options = w.options(test::make(name, o), 60);
      test::engine host(options, test::make(name, o));
      test::device_engine device(options, policy, policy);
      for (index_t l = -1; l < 5; ++l) {
        CHECK(device.session().due(l).first == host.session().due(l).first);
        CHECK(device.session().due(l).last == host.session().due(l).last);
      }
    }
}
