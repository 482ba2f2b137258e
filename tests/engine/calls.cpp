// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
// Calls out of order or with bad arguments return a status and change nothing.
#include "../support/catch.hpp"
#include "../support/session_run.hpp"

using namespace kvkeep;
using namespace kvkeep::test;

namespace {

/// Everything that a session could have changed.
struct fingerprint {
  std::vector<std::byte> state;
  std::int64_t tokens, evicted, cuts, victims;

  explicit fingerprint(any_session& s, index_t n_sequences) {
    counters const c = s.count();
    tokens = c.tokens, evicted = c.evicted, cuts = c.cuts, victims = c.victims;
    std::vector<std::byte> one(s.saved_bytes());
    for (index_t id = 0; id < n_sequences; ++id) {
      bool const alive = s.save(id, one) == status::ok;
      state.push_back(std::byte{alive});
      if (alive) state.insert(state.end(), one.begin(), one.end());
    }
  }
  bool operator==(fingerprint const&) const = default;
};

struct fixture {
  world w;
  policy_options o;
  text words, more;
  std::vector<float> q, out;
  std::vector<index_t> slots;
  std::optional<engine> e;

  static world small(layout_id layout) {
    world w;
    w.layout = layout;
    w.prompt = 20;
    return w;
  }
  explicit fixture(layout_id layout = layout_id::hnd, char const* policy = "morphkv",
                   index_t slots_per_head = 0, limits const& lim = {})
      : w(small(layout)),
        o(options()),
        words(w.words()),
        more(w.words(1)),
        q(uz(3 * 4 * 8)),
        out(uz(3 * 4 * 6)),
        slots(uz(3 * 2)) {
    w.lim = lim;
    any const p = make(policy, o);
    e.emplace(w.options(p, slots_per_head), p);
  }
  static policy_options options() {
    policy_options o;
    o.capacity = 12;
    o.window = 4;
    return o;
  }
  any_session& s() { return e->session(); }
  queries query(index_t rows = 1) const { return make_queries(q.data(), 4, rows, 8); }
  /// The call returns `want` and nothing has changed.
  template <class F>
  void refused(status want, F&& call) {
    fingerprint const before(s(), 3);
    CHECK(call() == want);
    CHECK(fingerprint(s(), 3) == before);
    CHECK(s().verify() == status::ok);
  }
};

}  // namespace

TEST_CASE("ids: unknown, ended, used twice, too many") {
  fixture f;
  index_t id = -1;
  f.refused(status::bad_sequence, [&] { return f.s().end(0); });
  f.refused(status::bad_sequence, [&] { return f.s().end(-1); });
  f.refused(status::bad_sequence, [&] { return f.s().end(3); });
  REQUIRE(f.s().begin(id, {2, 0}) == status::ok);
  CHECK(id == 2);
  f.refused(status::bad_sequence, [&] { return f.s().begin(id, {2, 0}); });
  f.refused(status::bad_sequence, [&] { return f.s().begin(id, {3, 0}); });
  f.refused(status::bad_argument, [&] { return f.s().begin(id, {-1, -1}); });
  f.refused(status::capacity_exceeded, [&] { return f.s().begin(id, {-1, 1000}); });
  REQUIRE(f.s().begin(id) == status::ok);
  CHECK(id == 0);
  f.refused(status::bad_sequence, [&] { return f.s().fork(1, id); });
  f.refused(status::bad_sequence, [&] { return f.s().fork(0, id, {2, 0}); });
  REQUIRE(f.s().begin(id) == status::ok);
  f.refused(status::capacity_exceeded, [&] { return f.s().begin(id); });
  f.refused(status::capacity_exceeded, [&] { return f.s().fork(0, id); });
  REQUIRE(f.s().end(1) == status::ok);
  f.refused(status::bad_sequence, [&] { return f.s().observe(0, 1, tokens_only(1)); });
  f.refused(status::bad_sequence, [&] { return f.s().end_prompt(1); });
  f.refused(status::bad_sequence, [&] { return f.s().end_prompt(0, 1); });
  f.refused(status::bad_sequence, [&] { return f.s().report(1, {}); });
}

TEST_CASE("prompts: layers, counts and order") {
  fixture f;
  stream s = f.e->begin(f.words);
  f.refused(status::bad_argument, [&] { return f.s().observe(2, s.id, f.query()); });
  f.refused(status::bad_argument, [&] { return f.s().observe(-1, s.id, f.query()); });
  f.refused(status::bad_argument, [&] { return f.s().end_prompt(2, s.id); });
  queries bad = f.query();
  bad.n_rows = -1;
  f.refused(status::bad_argument, [&] { return f.s().observe(0, s.id, bad); });
  bad = f.query(2);
  bad.tokens = 1;
  f.refused(status::bad_argument, [&] { return f.s().observe(0, s.id, bad); });
  bad = f.query();
  bad.data = nullptr;
  f.refused(status::bad_argument, [&] { return f.s().observe(0, s.id, bad); });
  bad = tokens_only(-3);
  f.refused(status::bad_argument, [&] {
    bad.n_rows = 0;
    bad.tokens = -3;
    status const st = f.s().observe(0, s.id, bad);
    return st == status::ok ? status::bad_argument : st;  // no tokens: nothing to do
  });
  f.refused(status::capacity_exceeded, [&] { return f.s().observe(0, s.id, tokens_only(1000)); });
  f.refused(status::capacity_exceeded,
            [&] { return f.s().observe(0, s.id, tokens_only(2147483647)); });
  f.refused(status::bad_argument, [&] { return f.s().observe(0, s.id, f.query(), nullptr, 99); });
  kv_ref<> const view = f.e->cache(0).ref();
  f.refused(status::bad_argument, [&] { return f.s().observe(0, s.id, f.query(), &view); });
  f.refused(status::bad_argument, [&] { return f.s().end_prompt(0, s.id, &view); });
  f.refused(status::unsupported, [&] {
    return f.s().observe(0, s.id, own_scores{f.q.data(), 0, 0});
  });

  f.e->observe_prompt(s, 0, 20);
  f.refused(status::bad_order, [&] { return f.s().end_prompt(1, s.id); });
  auto const b = engine::batch_of({&s});
  f.refused(status::bad_order, [&] { return f.s().append(0, b.batch(), f.slots.data()); });
  f.refused(status::bad_order, [&] { return f.s().confirm(b.batch(), 1); });
  REQUIRE(f.e->end_layer(s, 0) == status::ok);
  f.refused(status::bad_order, [&] { return f.e->end_layer(s, 0); });
  f.refused(status::bad_order, [&] { return f.s().observe(0, s.id, f.query()); });
  f.refused(status::bad_order, [&] { return f.s().end_prompt(1, s.id, nullptr, s.row); });
  f.e->observe_prompt(s, 1, 20);
  REQUIRE(f.e->end_layer(s, 1) == status::ok);
}

TEST_CASE("no copy is made of a sequence whose layers are being cut together") {
  fixture f(layout_id::hnd, "dynamickv");
  stream s = f.e->begin(f.words);
  index_t id = -1;
  for (index_t l = 0; l < 2; ++l) f.e->observe_prompt(s, l, 20);
  REQUIRE(f.e->end_layer(s, 0) == status::ok);
  f.refused(status::bad_order, [&] { return f.s().fork(s.id, id); });
  REQUIRE(f.e->end_layer(s, 1) == status::ok);
  CHECK(f.s().fork(s.id, id) == status::ok);
}

TEST_CASE("decoding: append, attend, confirm in that order, with sane arguments") {
  for (char const* name : {"morphkv", "h2o", "tova", "knorm", "streamingllm"}) {
    INFO(name);
    fixture f(layout_id::hnd, name);
    stream s = f.e->begin(f.words);
    f.e->prompt(s, 20);
    auto const b = engine::batch_of({&s});
    auto const go = b.batch();
    f.refused(status::bad_order, [&] { return f.s().attend(0, go, f.query(), f.out.data()); });
    f.refused(status::bad_order, [&] { return f.s().observe(0, go, f.query()); });
    f.refused(status::bad_order, [&] { return f.s().confirm(go, 1); });
    f.refused(status::bad_argument, [&] { return f.s().append(2, go, f.slots.data()); });
    f.refused(status::bad_argument, [&] { return f.s().append(0, {}, f.slots.data()); });
    std::vector<index_t> const twice{s.id, s.id}, unknown{1}, outside{9}, row{7}, two_rows{0, 1};
    f.refused(status::bad_argument, [&] { return f.s().append(0, {twice, {}}, f.slots.data()); });
    f.refused(status::bad_sequence, [&] { return f.s().append(0, {unknown, {}}, f.slots.data()); });
    f.refused(status::bad_sequence, [&] { return f.s().append(0, {outside, {}}, f.slots.data()); });
    f.refused(status::bad_argument, [&] { return f.s().append(0, {b.ids, row}, f.slots.data()); });
    f.refused(status::bad_argument, [&] {
      return f.s().append(0, {b.ids, two_rows}, f.slots.data());
    });
    REQUIRE(f.s().append(0, go, f.slots.data()) == status::ok);
    f.refused(status::bad_order, [&] { return f.s().append(0, go, f.slots.data()); });
    f.refused(status::bad_order, [&] { return f.s().confirm(go, 1); });
    f.refused(status::bad_argument, [&] { return f.s().attend(0, go, f.query(2), f.out.data()); });
    f.refused(status::bad_argument, [&] { return f.s().attend(0, go, f.query(), nullptr); });
    f.refused(status::bad_argument, [&] { return f.s().attend(0, go, queries{}, f.out.data()); });
    f.refused(status::bad_order, [&] { return f.s().attend(1, go, f.query(), f.out.data()); });
    f.refused(status::unsupported, [&] {
      return f.s().observe(0, go, own_scores{f.q.data(), 0, 0});
    });
    REQUIRE(f.s().attend(0, go, f.query(), f.out.data()) == status::ok);
    f.refused(status::bad_order, [&] { return f.s().attend(0, go, f.query(), f.out.data()); });
    f.refused(status::bad_order, [&] { return f.s().confirm(go, 1); });  // layer 1 is missing
    f.refused(status::unsupported, [&] { return f.s().rollback(go, 1); });
    REQUIRE(f.s().append(1, go, f.slots.data()) == status::ok);
    REQUIRE(f.s().attend(1, go, f.query(), f.out.data()) == status::ok);
    f.refused(status::bad_order, [&] { return f.s().confirm(go, 2); });
    f.refused(status::bad_argument, [&] { return f.s().confirm(go, 0); });
    f.refused(status::bad_argument, [&] { return f.s().confirm(go, -1); });
    REQUIRE(f.s().confirm(go, 1) == status::ok);
    CHECK(f.s().tokens(s.id) == 21);
    typename any_session::plan_type plan;
    f.refused(status::unsupported, [&] { return f.s().choose(go, plan); });
    f.refused(status::stale_plan, [&] { return f.s().commit(plan); });
    CHECK_FALSE(f.s().due(go));
  }
}

TEST_CASE("rows that a cache cannot take, and opaque or FP8 queries, are refused") {
  dtype const type = GENERATE(dtype::opaque, dtype::e4m3);
  fixture f;
  stream s = f.e->begin(f.words);
  queries sealed = f.query();
  sealed.type = type;
  f.refused(status::unsupported, [&] { return f.s().observe(0, s.id, sealed); });
  f.e->prompt(s, 20);
  auto const b = engine::batch_of({&s});
  test_cache const numbers = new_rows({&s}, 0, f.w.shape, dtype::f32);
  token_kv const good = token_of(numbers.ref());
  std::vector<std::byte> const before = f.e->cache(0).k().bytes();
  auto const decode = [&](token_kv const& kv, queries const& q, float* out) {
    return f.s().decode(0, b.batch(), {kv, q, out});
  };
  for (bool const values : {false, true}) {
    token_kv bad = good;
    head_vectors& rows = values ? bad.v : bad.k;
    rows.type = dtype::opaque;
    f.refused(status::unsupported, [&] { return f.s().append(0, b.batch(), bad); });
    f.refused(status::unsupported, [&] { return decode(bad, f.query(), f.out.data()); });
    rows.data = nullptr;
    f.refused(status::bad_argument, [&] { return f.s().append(0, b.batch(), bad); });
    f.refused(status::bad_argument, [&] { return decode(bad, f.query(), f.out.data()); });
  }
  f.refused(status::bad_argument, [&] { return f.s().append(2, b.batch(), good); });
  f.refused(status::bad_argument, [&] { return f.s().append(0, {}, good); });
  f.refused(status::bad_argument, [&] { return decode(good, f.query(2), f.out.data()); });
  f.refused(status::bad_argument, [&] { return decode(good, {}, f.out.data()); });
  f.refused(status::bad_argument, [&] { return decode(good, f.query(), nullptr); });
  f.refused(status::unsupported, [&] { return decode(good, sealed, f.out.data()); });
  CHECK(f.e->cache(0).k().bytes() == before);
  REQUIRE(f.s().append(0, b.batch(), good) == status::ok);  // and nobody asks for the slots
  CHECK(f.e->cache(0).k().bytes() != before);
  f.refused(status::bad_order, [&] { return f.s().append(0, b.batch(), good); });
  f.refused(status::bad_order, [&] { return decode(good, f.query(), f.out.data()); });
  f.refused(status::unsupported, [&] { return f.s().attend(0, b.batch(), sealed, f.out.data()); });
  f.refused(status::unsupported, [&] { return f.s().observe(0, b.batch(), sealed); });
}

TEST_CASE("decode is append and attend") {
  for (char const* name : {"morphkv", "h2o", "streamingllm"})
    for (layout_id const layout : all_layouts()) {
      INFO(name << ", " << to_string(layout));
      fixture one(layout, name), two(layout, name);
      stream a = one.e->begin(one.words), b = two.e->begin(two.words);
      one.e->prompt(a, 20);
      two.e->prompt(b, 20);
      for (index_t step = 0; step < 9; ++step) {
        auto const want = one.e->step({&a});
        auto const who = engine::batch_of({&b});
        for (index_t l = 0; l < 2; ++l) {
          test_cache const rows = new_rows({&b}, l, two.w.shape, dtype::f32);
          auto const q = two.e->query_rows(b, l, b.tokens, 1);
          std::vector<float> out(uz(4 * 6));
          REQUIRE(two.s().decode(l, who.batch(),
                                 {token_of(rows.ref()), make_queries(q.data(), 4, 1, 8),
                                  out.data()}) == status::ok);
          CHECK(out == want[uz(l)].out);
        }
        REQUIRE(two.s().confirm(who.batch(), 1) == status::ok);
        ++b.tokens;
        for (index_t l = 0; l < 2; ++l) CHECK(two.e->kept(l, b) == want[uz(l)].done);
      }
      two.e->check({&b});
    }
}

TEST_CASE("skipped layers, and sessions that are shown other evidence, decode nothing") {
  limits lim;
  lim.decode = decode_offer::attention_rows;
  fixture f(layout_id::hnd, "h2o", 0, lim);
  stream s = f.e->begin(f.words);
  f.e->prompt(s, 20);
  auto const b = engine::batch_of({&s});
  test_cache const rows = new_rows({&s}, 0, f.w.shape, dtype::f32);
  token_io const t{token_of(rows.ref()), f.query(), f.out.data()};
  f.refused(status::unsupported, [&] { return f.s().decode(0, b.batch(), t); });

  fixture other;
  engine_options o = other.w.options(make("morphkv", other.o));
  o.skip = {true, false};
  engine skipping(o, make("morphkv", other.o));
  stream x = skipping.begin(other.words);
  skipping.prompt(x, 20);
  auto const c = engine::batch_of({&x});
  CHECK(skipping.session().append(0, c.batch(), t.kv) == status::unsupported);
  CHECK(skipping.session().decode(0, c.batch(), t) == status::unsupported);
}

TEST_CASE("a prompt-only policy runs until its cache is full, and says so") {
  fixture f(layout_id::hnd, "snapkv", 22);
  stream s = f.e->begin(f.words);
  f.e->prompt(s, 20);
  auto const b = engine::batch_of({&s});
  for (index_t i = 12; i < 22; ++i) (void)f.e->step({&s});
  f.refused(status::capacity_exceeded, [&] { return f.s().append(0, b.batch(), f.slots.data()); });
  f.e->check({&s});
}

TEST_CASE("a ragged pool: the smaller heads bound the sequence") {
  world w;
  w.layout = layout_id::ragged;
  w.n_layers = 1;
  policy_options o;
  o.capacity = 12;
  o.window = 4;
  any const p = make("snapkv", o);
  engine_options x = w.options(p, 24);
  x.cache.capacities = {24, 24, 24, 24, 24, 14};  // row 2, head 1
  engine e(x, p);
  text const words = w.words();
  stream s = e.begin(words, {}, 2);
  std::vector<index_t> slots(2);
  CHECK(e.session().observe(0, s.id, tokens_only(20), nullptr, s.row) == status::capacity_exceeded);
  e.prompt(s, 13);
  (void)e.step({&s});
  (void)e.step({&s});
  auto const b = engine::batch_of({&s});
  CHECK(e.session().append(0, b.batch(), slots.data()) == status::capacity_exceeded);
  e.check({&s});
}

TEST_CASE("block table entries out of range are found before anything is touched") {
  for (index_t const bad : {-1, 1000000}) {
    fixture f(layout_id::paged_per_head, "h2o");
    stream s = f.e->begin(f.words);
    auto* const table = const_cast<index_t*>(f.e->specs()[1].kv.v.layout.paged.table);
    auto const& pages = f.e->specs()[1].kv.v.layout.paged;
    offset_t const at = s.row * pages.table_seq_stride + pages.table_head_stride + 1;
    index_t const good = table[at];
    for (index_t l = 0; l < 2; ++l) {
      table[at] = good;
      f.e->observe_prompt(s, l, 6);
      table[at] = bad;
      if (l == 1) f.refused(status::bad_table, [&] { return f.e->end_layer(s, l); });
      table[at] = good;
      REQUIRE(f.e->end_layer(s, l) == status::ok);
    }
    s.tokens = 6;
    auto const b = engine::batch_of({&s});
    table[at] = bad;
    f.refused(status::bad_table, [&] { return f.s().append(1, b.batch(), f.slots.data()); });
    f.refused(status::bad_table, [&] { return f.s().append_at(b.batch()); });
    table[at] = good;
    REQUIRE(f.s().append(1, b.batch(), f.slots.data()) == status::ok);
    table[at] = bad;
    std::fill(f.out.begin(), f.out.end(), 7.0F);
    f.refused(status::bad_table,
              [&] { return f.s().attend(1, b.batch(), f.query(), f.out.data()); });
    CHECK(f.out == std::vector<float>(f.out.size(), 7.0F));
    f.refused(status::bad_table, [&] { return f.s().observe(1, b.batch(), f.query()); });
    table[at] = good;
    REQUIRE(f.s().attend(1, b.batch(), f.query(), f.out.data()) == status::ok);
  }
}

TEST_CASE("append_at checks the engine's slot mapping") {
  limits lim;
  lim.engine_commits = true;
  fixture f(layout_id::paged, "h2o", 0, lim);
  stream s = f.e->begin(f.words);
  f.e->prompt(s, 20);
  auto const b = engine::batch_of({&s});
  auto const& pages = f.e->specs()[0].kv.k.layout.paged;
  auto const& other = f.e->specs()[1].kv.k.layout.paged;
  // The two layers of this fixture have tables of their own, which one mapping cannot serve.
  index_t const slot = f.s().lengths(0)(s.id, 0), size = pages.block_size;
  std::int64_t const right = std::int64_t{pages.entry(s.row, 0, slot / size)} * size + slot % size;
  std::int64_t const there = std::int64_t{other.entry(s.row, 0, slot / size)} * size + slot % size;
  std::int64_t const wrong[] = {right + 1, right - 1, -1, 0};
  for (std::int64_t const x : wrong)
    if (x != right) f.refused(status::bad_argument, [&] { return f.s().append_at(b.batch(), &x); });
  if (there == right)
    REQUIRE(f.s().append_at(b.batch(), &right) == status::ok);
  else
    f.refused(status::bad_argument, [&] { return f.s().append_at(b.batch(), &right); });
}

TEST_CASE("no number of tokens is too large to be refused") {
  limits lim;
  lim.max_prompt = GENERATE(0, 30);
  fixture f(layout_id::hnd, "knorm", 14, lim);
  stream s = f.e->begin(f.words);
  index_t const huge = std::numeric_limits<index_t>::max();
  f.refused(status::capacity_exceeded, [&] { return f.s().observe(0, s.id, tokens_only(huge)); });
  f.e->observe_prompt(s, 0, 5);
  f.refused(status::capacity_exceeded, [&] { return f.s().observe(0, s.id, tokens_only(huge)); });
}

TEST_CASE("a transient prompt has a row of the cache to go to, and rows like those there") {
  limits lim;
  lim.max_prompt = 30;
  lim.max_sequences = 9;
  fixture f(layout_id::hnd, "knorm", 14, lim);
  stream s = f.e->begin(f.words);
  f.e->observe_prompt(s, 0, 30);
  kv_ref<> view = f.e->cache(0).ref();
  view.shape.max_slots = 30;
  view.k.type = dtype::bf16;
  f.refused(status::bad_argument, [&] { return f.s().end_prompt(0, s.id, &view); });
  REQUIRE(f.e->end_layer(s, 0) == status::ok);
  index_t id = 0;
  while (id < f.e->cache(0).shape().n_seq) REQUIRE(f.s().begin(id) == status::ok);
  s.id = id;
  f.e->observe_prompt(s, 0, 30);
  f.refused(status::bad_argument, [&] { return f.e->end_layer(s, 0); });
}

TEST_CASE("a failed end of a prompt can be taken again") {
  // The destination of a transient prompt has a bad table: nothing is cut, and the call works
  // later.
  limits lim;
  lim.max_prompt = 30;
  fixture f(layout_id::paged, "knorm", 14, lim);
  stream s = f.e->begin(f.words);
  auto* const table = const_cast<index_t*>(f.e->specs()[0].kv.k.layout.paged.table);
  auto const& pages = f.e->specs()[0].kv.k.layout.paged;
  offset_t const at = s.row * pages.table_seq_stride;
  index_t const good = table[at];
  f.e->observe_prompt(s, 0, 30);
  table[at] = -5;
  f.refused(status::bad_table, [&] { return f.e->end_layer(s, 0); });
  table[at] = good;
  REQUIRE(f.e->end_layer(s, 0) == status::ok);
  f.e->observe_prompt(s, 1, 30);
  REQUIRE(f.e->end_layer(s, 1) == status::ok);
  s.tokens = 30;
  f.e->check({&s});
}

TEST_CASE("tokens of an open prompt are neither confirmed nor rolled back") {
  fixture f;
  f.w.draft = 2;
  any const p = make("knorm", f.o);
  f.e.emplace(f.w.options(p, 30), p);
  stream s = f.e->begin(f.words);
  batch const b{{&s.id, 1}};
  auto const both = [&] {
    f.refused(status::bad_order, [&] { return f.s().confirm(b, 1); });
    f.refused(status::bad_order, [&] { return f.s().rollback(b, 1); });
  };
  for (index_t l : {0, 1}) f.e->observe_prompt(s, l, 20);
  both();
  REQUIRE(f.e->end_layer(s, 0) == status::ok);
  both();
  REQUIRE(f.e->end_layer(s, 1) == status::ok);
  both();
  // A draft in the first layer alone is none yet.
  REQUIRE(f.s().append(0, b, f.slots.data()) == status::ok);
  REQUIRE(f.s().attend(0, b, f.query(), f.out.data()) == status::ok);
  both();
  REQUIRE(f.s().append(1, b, f.slots.data()) == status::ok);
  REQUIRE(f.s().attend(1, b, f.query(), f.out.data()) == status::ok);
  REQUIRE(f.s().rollback(b, 1) == status::ok);
  CHECK(f.s().verify() == status::ok);
}

TEST_CASE(
    "a view that is refused leaves another sequence's prompt alone, which cannot be saved either") {
  limits lim;
  lim.max_prompt = 30;
  fixture f(layout_id::hnd, "knorm", 14, lim);
  stream a = f.e->begin(f.words), b = f.e->begin(f.more);
  f.e->observe_prompt(a, 0, 10);
  std::vector<std::byte> saved(f.s().saved_bytes());
  CHECK(f.s().save(a.id, saved) == status::bad_order);
  REQUIRE(f.s().save(b.id, saved) == status::ok);
  kv_ref<> bad = f.e->cache(0).ref();
  bad.shape.max_slots = 31;
  CHECK(f.s().observe(0, b.id, tokens_only(5), &bad) == status::bad_argument);
  CHECK(f.s().end_prompt(0, b.id, &bad) == status::bad_argument);
  a.tokens = 10;
  f.e->observe_prompt(a, 0, 20);
  CHECK(f.e->end_layer(a, 0) == status::ok);
}

TEST_CASE("a copy is frozen as far as it has tokens") {
  fixture f(layout_id::hnd, "knorm", 30);
  stream s = f.e->begin(f.words);
  f.e->prompt(s, 6);
  index_t id = -1;
  sequence_options o;
  o.frozen = 7;
  f.refused(status::bad_argument, [&] { return f.s().fork(s.id, id, o); });
  o.frozen = 6;
  CHECK(f.s().fork(s.id, id, o) == status::ok);
}

TEST_CASE("queries are shown where they were offered") {
  limits lim;
  lim.decode = decode_offer::nothing;
  fixture f(layout_id::hnd, "knorm", 30, lim);
  stream s = f.e->begin(f.words);
  f.e->prompt(s, 20);
  batch const b{{&s.id, 1}};
  for (index_t l : {0, 1}) REQUIRE(f.s().append(l, b, f.slots.data()) == status::ok);
  f.refused(status::unsupported, [&] { return f.s().attend(0, b, f.query(), f.out.data()); });
  f.refused(status::unsupported, [&] { return f.s().observe(0, b, f.query()); });
  CHECK(f.s().confirm(b, 1) == status::ok);
}
