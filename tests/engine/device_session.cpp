// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
// A session whose state the host never reads keeps, and computes, what a session does.
#include "../support/device_engine.hpp"

namespace {

using namespace kvkeep;
using test::bit;
using test::generator;
using test::small;
using test::uz;

struct pairing {
  std::string prompt, decode;
  policy_options o, d;
};

std::vector<pairing> pairings() {
  std::vector<pairing> all;
  list_policies([&](policy_info const& p) {
    all.push_back({p.name, p.name, small(16), small(16)});
  });
  for (char const* prompt : {"snapkv", "pyramidkv", "dynamickv", "cake", "adakv"})
    for (char const* decode : {"morphkv", "h2o", "streamingllm"}) {
      pairing p{prompt, decode, small(16), small(16)};
      p.d.budget = "inherit";
      all.push_back(p);
    }
  pairing burst{"snapkv", "morphkv", small(16), small(14)};
  burst.d.evict_after = 1.3;
  all.push_back(burst);
  burst.prompt = burst.decode = "knorm";
  burst.o.evict_after = 1.3;
  burst.d = burst.o;
  all.push_back(burst);
  for (morph_rows rows : {morph_rows::cached, morph_rows::lazy, morph_rows::direct}) {
    pairing p{"morphkv", "morphkv", small(20), small(20)};
    p.o.window = 9;
    p.o.evaluation = rows;
    p.o.fusion = rows == morph_rows::cached ? reduction::max : reduction::sum;
    p.d = p.o;
    all.push_back(p);
  }
  for (bool const current : {true, false})
    for (bool const masks : {true, false})
      for (double const burst_factor : {1.0, 1.3}) {
        if (!current && !masks) continue;
        pairing p{"morphkv", "morphkv", small(16), small(16)};
        p.o.include_current = current;
        p.o.per_head_mask = masks;
        p.o.evict_after = burst_factor;
        p.d = p.o;
        all.push_back(p);
        if (masks || burst_factor > 1) continue;
        p.prompt = "snapkv";  // leaves more than decoding keeps
        p.o = small(20);
        all.push_back(p);
      }
  pairing lag{"lagkv", "h2o", small(16), small(16)};
  lag.o.lag = 9;  // prompts of up to 18 tokens stay whole
  all.push_back(lag);
  for (char const* budget : {"", "ada"}) {
    pairing expected{"expected_attention", "h2o", small(16), small(16)};
    expected.o.budget = budget;
    all.push_back(expected);
  }
  pairing layer{"knorm", "knorm", small(16), small(16)};
  layer.o.per = layer.d.per = scope::layer;
  all.push_back(layer);
  for (char const* name : {"h2o", "tova", "knorm", "keydiff", "morphkv"})
    for (double const burst_factor : {1.0, 1.3}) {
      pairing sequence{name, name, small(16), small(16)};
      sequence.o.per = scope::sequence;
      bool const bursts = name[0] == 'k' || name[0] == 'm';
      if (burst_factor > 1 && !bursts) continue;
      sequence.o.evict_after = burst_factor;
      sequence.d = sequence.o;
      all.push_back(sequence);
      sequence.prompt = "snapkv";  // leaves more than decoding keeps
      sequence.o = small(20);
      sequence.o.per = scope::sequence;
      all.push_back(sequence);
    }
  return all;
}

std::string describe(pairing const& p) {
  return p.prompt + ", then " + p.decode + ", evict_after " + std::to_string(p.d.evict_after) +
         ", per " + to_string(p.d.per) + (p.d.include_current ? ", include_current" : "") +
         (p.d.per_head_mask ? ", per_head_mask" : "");
}

/// Queries as bf16 holds them.
void round_queries(test::text& t) {
  for (oracle::tokens& l : t.layer)
    for (double& x : l.q.data) x = static_cast<double>(to_float(to_bf16(static_cast<float>(x))));
}

/// Slots may differ (what a session frees as a victim may be a cut here), so outputs agree up to rounding.
/// Two sequences of different lengths, a third that begins while they decode, and a copy of the first in place of
/// the second.
void compare(pairing const& p, test::world w, std::uint64_t seed) {
  w.seed = seed;
  generator g(seed);
  auto const prompt = test::make(p.prompt, p.o), decode = test::make(p.decode, p.d);
  index_t slots = w.prompt + 30;
  bool const together = p.o.per == scope::sequence;
  if (!p.d.include_current && !p.d.per_head_mask && !together && g.chance(0.5F)) {
    w.lim.max_prompt = w.prompt;
    slots = slots_needed(prompt, decode, {w.shape, w.n_layers, -1, w.lim, w.prompt, 3, slots});
  }
  INFO("transient prompts " << (w.lim.max_prompt > 0) << ", slots " << slots);
  auto const o = w.options(decode, slots);
  test::engine host(o, prompt, decode);
  test::device_engine device(o, make_policy<test::op_context>(p.prompt, p.o),
                             make_policy<test::op_context>(p.decode, p.d));
  auto a = w.words(1), b = w.words(2), c = w.words(3);
  if (g.chance(0.5F)) {
    for (test::text* t : {&a, &b, &c}) round_queries(*t);
    device.show_bf16();
  }
  if (g.chance(0.5F)) device.decide_aside();
  if (g.chance(0.5F)) device.append_rows();
  auto const start = [&](test::text const& t, index_t n) {
    test::stream h = host.begin(t), d = device.begin(t);
    REQUIRE(h.id == d.id);
    index_t const first = g.integer(1, n);
    std::vector<index_t> const chunks =
        first < n ? std::vector<index_t>{first, n - first} : std::vector<index_t>{n};
    test::prompt_options how;
    how.chunks = chunks;
    host.prompt(h, n, how);
    device.prompt(d, n, chunks);
    for (index_t l = 0; l < w.n_layers; ++l) REQUIRE(host.kept(l, h) == device.kept(l, d));
    return std::pair{h, d};
  };
  auto x = start(a, w.prompt), y = start(b, g.integer(3, w.prompt - 1));
  std::vector<test::stream*> hosts{&x.first, &y.first}, devices{&x.second, &y.second};
  for (int t = 0; t < 12; ++t) test::require_same(host.step(hosts), device.step(devices), false);
  auto z = start(c, 18);
  hosts = {&z.first, &x.first, &y.first};
  devices = {&z.second, &x.second, &y.second};
  for (int t = 0; t < 8; ++t) test::require_same(host.step(hosts), device.step(devices), false);
  REQUIRE(host.session().end(y.first.id) == status::ok);
  REQUIRE(device.session().end(y.second.id) == status::ok);
  test::stream child = x.first, device_child = device.fork(x.second);
  REQUIRE(host.session().fork(x.first.id, child.id) == status::ok);
  REQUIRE(child.id == device_child.id);
  child.row = device_child.row;
  host.copy_rows(x.first, child);
  hosts[2] = &child;
  devices[2] = &device_child;
  for (int t = 0; t < 8; ++t) test::require_same(host.step(hosts), device.step(devices), false);
  for (test::stream const* s : devices) REQUIRE(device.session().faults()[s->id] == 0);
  CHECK(device.intact());
}

}  // namespace

TEST_CASE("a device session keeps and computes what a session does, under every policy") {
  for (pairing const& p : pairings())
    test::for_seeds(test::host_reads_rows ? 2 : 1, [&](generator& g) {
      INFO(describe(p));
      test::world w;
      w.layout = g.one_of(test::all_layouts());
      w.type = g.one_of(
          std::array<dtype, 5>{dtype::f32, dtype::f16, dtype::bf16, dtype::e4m3, dtype::e5m2});
      compare(p, w, g.next());
    });
}

TEST_CASE("a device session keeps what a session does where heads have budgets of their own") {
  index_t const of_heads[] = {9, 16, 30, 12};
  for (char const* prompt : {"snapkv", "h2o"})
    test::for_seeds(2, [&](generator& g) {
      pairing p{prompt, "h2o", small(16), small(16)};
      p.o.budget = "per_head";
      p.o.head_tokens = of_heads;
      p.d = p.o;
      INFO(describe(p));
      compare(p, {}, g.next());
    });
}

/// What an engine of its own exports: probabilities of the newest token over a sequence's slots in use.
std::vector<float> exported(test::device_engine& device, test::world const& w,
                            test::stream const& s, index_t slots) {
  std::vector<float> a(uz(w.shape.n_q_heads * slots), -1);
  auto const live = device.kept(0, s);
  auto const& words = s.words->layer[0];
  for (index_t h = 0; h < w.shape.n_q_heads; ++h) {
    auto const& mine = live[uz(h / w.shape.group())];
    auto const p = oracle::row_probs(words.q, h, s.tokens, words.k, mine, device.rule());
    for (index_t t = 0; t < device.session().lengths(0)(s.id, h / w.shape.group()); ++t) {
      index_t const at = device.session().positions(0)(s.id, h / w.shape.group(), t);
      auto const it = std::find(mine.begin(), mine.end(), at);
      if (it != mine.end()) a[uz(h * slots + t)] = static_cast<float>(p[uz(it - mine.begin())]);
    }
  }
  return a;
}

TEST_CASE("an engine that attends itself brings its probabilities, or nothing where nobody looks") {
  for (char const* name : {"h2o", "tova", "streamingllm", "knorm"})
    for (bool const aside : {false, true}) {
      INFO(name << (aside ? ", aside" : ""));
      bool const rows = name[0] == 'h' || name[0] == 't';
      policy_options const o = small(16);
      test::world w;
      w.n_layers = 1;
      auto const p = make_policy<test::op_context>(name, o);
      auto e = w.options(test::make(name, o), 60);
      test::device_engine attends(e, p, p);
      e.lim.decode = rows ? decode_offer::attention_rows : decode_offer::nothing;
      test::device_engine shows(e, p, p);
      if (aside) shows.decide_aside();
      auto const words = w.words(1);
      test::stream x = attends.begin(words), y = shows.begin(words);
      for (auto* const s : {&x, &y}) (s == &x ? attends : shows).prompt(*s, 12, {12});
      index_t const slots = 60;
      test::own_batch const b{{y.id}, {y.row}};
      for (int step = 0; step < 12; ++step) {
        auto const done = attends.step({&x})[0].done;
        shows.append(y);
        std::vector<float> const a = exported(shows, w, y, slots);
        auto& session = shows.session();
        REQUIRE((rows ? session.observe(0, b, attention_rows{a.data(), 0, slots})
                      : session.observe(0, b, tokens_only(1))) == status::ok);
        REQUIRE(session.join() == status::ok);
        test::settle_device();
        ++y.tokens;
        INFO("step " << step);
        REQUIRE(shows.kept(0, y) == done);
      }
      CHECK(shows.session().observe(0, b, own_scores{}) == status::unsupported);
      if (rows) {
        CHECK(shows.session().observe(0, b, attention_rows{}) == status::bad_argument);
        CHECK(shows.session().observe(0, b, tokens_only(1)) == status::bad_argument);
      }
      CHECK(attends.session().observe(0, b, attention_rows{}) == status::unsupported);
    }
}

TEST_CASE("scores of the engine's own decide") {
  policy<engine_score> typed;
  typed.name = "engine";
  typed.budget.tokens = 12;
  typed.keep = {1, 2};
  auto const policy = erase_policy<test::op_context>(typed);
  test::for_seeds(4, [&](generator& g) {
    test::world w;
    w.n_layers = 1;
    auto e = w.options(test::make("streamingllm", small(12)), 60);
    e.lim.prompt = prompt_offer::scores;
    e.lim.decode = decode_offer::scores;
    test::device_engine device(e, policy, policy);
    auto const words = w.words(1);
    test::stream s = device.begin(words);
    index_t const row = s.row, slots = 60, heads = w.shape.n_kv_heads;
    REQUIRE(device.session().observe(0, s.id, tokens_only(20), nullptr, row) == status::ok);
    std::vector<float> const first = g.normals(uz(heads * slots));
    CHECK(device.session().observe(0, s.id + 1, own_scores{first.data(), 0, slots}) ==
          status::bad_sequence);
    REQUIRE(device.session().observe(0, s.id, own_scores{first.data(), 0, slots}) == status::ok);
    REQUIRE(device.session().end_prompt(0, s.id, nullptr, row) == status::ok);
    test::settle_device();
    s.tokens = 20;
    for (index_t h = 0; h < heads; ++h) {
      std::vector<std::pair<float, index_t>> ranked;  // the first and the last two stay anyway
      for (index_t t = 1; t < 18; ++t) ranked.emplace_back(-first[uz(h * slots + t)], t);
      std::sort(ranked.begin(), ranked.end());
      oracle::kept_set want{0, 18, 19};
      for (std::size_t i = 0; i < 9; ++i) want.push_back(ranked[i].second);
      std::sort(want.begin(), want.end());
      REQUIRE(device.kept(0, s)[uz(h)] == want);
    }
    test::own_batch const b{{s.id}, {row}};
    for (int step = 0; step < 10; ++step) {
      device.append(s);
      auto want = device.kept(0, s);
      std::vector<float> const x = g.normals(uz(heads * slots));
      for (index_t h = 0; h < heads; ++h) {
        auto& mine = want[uz(h)];
        if (mine.size() <= 12) continue;
        auto lowest = mine.end();  // neither the first nor the last two positions
        float least = 0;
        for (index_t t = 0; t < device.session().lengths(0)(s.id, h); ++t) {
          index_t const at = device.session().positions(0)(s.id, h, t);
          auto const it = std::find(mine.begin() + 1, mine.end() - 2, at);
          if (it == mine.end() - 2 || (lowest != mine.end() && x[uz(h * slots + t)] >= least))
            continue;
          lowest = it;
          least = x[uz(h * slots + t)];
        }
        mine.erase(lowest);
      }
      REQUIRE(device.session().observe(0, b, own_scores{x.data(), 0, slots}) == status::ok);
      test::settle_device();
      ++s.tokens;
      REQUIRE(device.kept(0, s) == want);
    }
  });
}

TEST_CASE("a sequence that finds no slot says so, and the others go on") {
  policy_options o = small(64);
  test::world w;
  test::device_engine device(w.options(test::make("fullkv", o), w.prompt + 2),
                             make_policy<test::op_context>("fullkv", o),
                             make_policy<test::op_context>("fullkv", o));
  auto const a = w.words(1), b = w.words(2);
  test::stream x = device.begin(a), y = device.begin(b);
  device.prompt(x, w.prompt, {w.prompt});
  device.prompt(y, 5, {5});
  for (int t = 0; t < 4; ++t) {
    auto const r = device.step({&x, &y});
    index_t const fault = t < 2 ? 0 : bit(device_fault::no_slot);
    CHECK(device.session().faults()[x.id] == fault);
    CHECK(device.session().faults()[y.id] == 0);
    CHECK(oracle::count(r[1].done[0]) == 6 + t);
    CHECK(oracle::count(r[0].done[0]) == w.prompt + std::min(t + 1, 2));
  }
  CHECK(device.intact());
  REQUIRE(device.session().end(x.id) == status::ok);
  test::stream again = device.begin(a, x.id);
  CHECK(again.id == x.id);
  test::settle_device();
  CHECK(device.session().faults()[x.id] == 0);
}

TEST_CASE("a slot that one KV head cannot have is taken by none") {
  bool const rows = GENERATE(false, true);
  policy_options const o = small(64);
  test::world w;
  w.layout = test::layout_id::ragged;
  auto e = w.options(test::make("fullkv", o), w.prompt + 2);
  cache_shape const& shape = e.cache.shape;
  // The last head of the last row has room for the prompt alone.
  e.cache.capacities.assign(uz(shape.n_seq * shape.n_kv_heads), shape.max_slots);
  e.cache.capacities.back() = 5;
  auto const policy = make_policy<test::op_context>("fullkv", o);
  test::device_engine device(e, policy, policy);
  if (rows) device.append_rows();
  auto const a = w.words(1), b = w.words(2);
  test::stream x = device.begin(a), y = device.begin(b);
  REQUIRE(x.row == shape.n_seq - 1);
  for (test::stream* s : {&x, &y}) device.prompt(*s, 5, {5});
  auto const before = device.kept(0, x);
  auto const r = device.step({&x, &y});
  CHECK(device.session().faults()[x.id] == bit(device_fault::no_slot));
  CHECK(device.session().faults()[y.id] == 0);
  CHECK(r[0].done == before);
  CHECK(oracle::count(r[1].done[0]) == 6);
  CHECK(device.intact());
}

TEST_CASE("prompts of no token and of one, in the cache and transient") {
  for (index_t const transient : {0, 40})
    for (char const* name : {"h2o", "morphkv", "streamingllm", "snapkv"}) {
      INFO(name << ", transient " << transient);
      test::world w;
      w.lim.max_prompt = transient;
      auto const p = make_policy<test::op_context>(name, small(16));
      test::device_engine device(w.options(test::make(name, small(16)), 60), p, p);
      auto const words = w.words(1);
      test::stream full = device.begin(words), none = device.begin(words),
                   one = device.begin(words);
      device.prompt(full, 30, {30});  // leaves its own state where prompts are shared
      device.prompt(none, 0, {});
      device.prompt(one, 1, {1});
      device.step({&none, &one});
      for (oracle::kept_set const& head : device.kept(0, none)) CHECK(head == oracle::kept_set{0});
      for (oracle::kept_set const& head : device.kept(0, one))
        CHECK(head == oracle::kept_set{0, 1});
      CHECK(device.intact());
    }
}

TEST_CASE("tokens of others may come between the layers of a prompt") {
  for (char const* name : {"knorm", "h2o", "dynamickv", "cake", "adakv"})
    for (scope const per : {scope::head, scope::sequence}) {
      bool const own_budget = name[0] == 'd' || name[0] == 'c' || name[0] == 'a';
      if (own_budget && per == scope::sequence) continue;
      INFO(name << ", per " << to_string(per));
      policy_options o = small(16), d = small(16);
      o.per = d.per = per;
      char const* const decode = own_budget ? "h2o" : name;
      test::world w;
      auto const options = w.options(test::make(decode, d), 60);
      test::engine host(options, test::make(name, o), test::make(decode, d));
      test::device_engine device(options, make_policy<test::op_context>(name, o),
                                 make_policy<test::op_context>(decode, d));
      auto const a = w.words(1), b = w.words(2);
      test::stream x = host.begin(a), y = host.begin(b), s = device.begin(a), t = device.begin(b),
                   alone = host.begin(b);
      host.prompt(alone, 27);
      host.prompt(x, 25);
      device.prompt(s, 25, {25});
      for (int step = 0; step < 3; ++step)
        test::require_same(host.step({&x}), device.step({&s}), false);
      host.observe_prompt(y, 0, 27);
      REQUIRE(host.end_layer(y, 0) == status::ok);
      auto const want = host.step({&x});
      host.observe_prompt(y, 1, 27);
      REQUIRE(host.end_layer(y, 1) == status::ok);
      y.tokens = 27;
      device.observe_prompt(t, 0, 0, 27);
      REQUIRE(device.end_layer(t, 0) == status::ok);
      test::require_same(want, device.step({&s}), false);
      device.observe_prompt(t, 1, 0, 27);
      REQUIRE(device.end_layer(t, 1) == status::ok);
      t.tokens = 27;
      for (index_t l = 0; l < w.n_layers; ++l) {
        REQUIRE(host.kept(l, alone) == host.kept(l, y));
        REQUIRE(host.kept(l, alone) == device.kept(l, t));
      }
      for (int step = 0; step < 3; ++step)
        test::require_same(host.step({&x, &y}), device.step({&s, &t}), false);
    }
}

TEST_CASE("a sequence begins as if no other had had its id") {
  for (pairing const& p : pairings()) {
    INFO(describe(p));
    test::world w;
    w.n_layers = 1;
    auto const o = w.options(test::make(p.decode, p.d), w.prompt + 30);
    auto const prompt = make_policy<test::op_context>(p.prompt, p.o);
    auto const decode = make_policy<test::op_context>(p.decode, p.d);
    test::device_engine used(o, prompt, decode), fresh(o, prompt, decode);
    auto const first = w.words(1), second = w.words(2);
    test::stream x = used.begin(first);
    used.prompt(x, w.prompt, {w.prompt});
    for (int t = 0; t < 9; ++t) used.step({&x});
    REQUIRE(used.session().end(x.id) == status::ok);
    x = used.begin(second);
    test::stream y = fresh.begin(second);
    used.prompt(x, 11, {11});
    fresh.prompt(y, 11, {11});
    for (int t = 0; t < 15; ++t) test::require_same(used.step({&x}), fresh.step({&y}));
  }
}

TEST_CASE("what a device session does not have is refused when it is bound") {
  policy_options const o = small(16);
  test::world w;
  auto const refused = [&](policy_options const& options, limits const& lim, char const* name,
                           char const* field) {
    test::world bad = w;
    bad.lim = lim;
    auto const p = make_policy<test::op_context>(name, options);
    auto e = bad.options(test::make("fullkv"), 60);
    e.lim = lim;
    CHECK_THROWS_WITH(test::device_engine(e, p, p), Catch::Matchers::Contains(field));
  };
  limits lim;
  policy_options wide = o;
  wide.per = scope::sequence;
  lim = {};
  lim.max_prompt = 30;
  refused(wide, lim, "knorm", "limits.max_prompt");
  lim.max_prompt = 61;
  refused(o, lim, "fullkv", "max_slots");  // which would keep more than the cache holds
  lim.max_prompt = 30;
  policy_options late = o;
  late.include_current = true;
  refused(late, lim, "morphkv", "before_attention");
  auto const p = make_policy<test::op_context>("h2o", o);
  test::device_engine good(w.options(test::make("h2o"), 60), p, p);
  lim.max_prompt = 1 << 30;
  CHECK_THROWS_WITH(device_session_bytes(test::one_thread(), p, p, good.specs(), lim),
                    Catch::Matchers::Contains("limits.max_prompt"));
  policy_options layers = o;
  layers.include_current = true;
  layers.per = scope::layer;
  refused(layers, {}, "morphkv", "one set per head");
  // What heads keep after such a prompt is no set of a layer.
  auto const h2o = make_policy<test::op_context>("h2o", o),
             tova = make_policy<test::op_context>("tova", o);
  auto const e = w.options(test::make("fullkv"), 60);
  CHECK_THROWS_WITH(test::device_engine(e, h2o, tova), Catch::Matchers::Contains("prompt.per"));
  policy_options blocks = o;
  blocks.whole_blocks = true;
  blocks.block = 4;
  refused(blocks, {}, "knorm", "decode.select");
  lim = {};
  lim.engine_commits = true;
  refused(blocks, lim, "knorm", "view.k.layout");
}

TEST_CASE("a query head is shown what a plan keeps, and nothing else") {
  test::for_seeds(20, [](generator& g) {
    index_t const n = g.integer(1, 3), heads = g.integer(1, 3), group = g.integer(1, 3);
    index_t const slots = g.integer(1, 200), mine = g.integer(0, group - 1);
    auto const size = uz(n * heads);
    std::vector<index_t> kept(size * uz(slots), -1), count(size);
    std::vector<std::uint8_t> visible(size * uz(group) * uz(slots), 7), expected = visible;
    for (std::size_t i = 0; i < size; ++i)
      for (index_t j = 0; j < slots; ++j) {
        bool const keeps = g.chance(0.4F);
        if (keeps) kept[i * uz(slots) + uz(count[i]++)] = j;
        expected[(i * uz(group) + uz(mine)) * uz(slots) + uz(j)] = keeps ? 1 : 0;
      }
    using memory = test::device_memory;
    using show = detail::show_plan<memory>;
    show const f{row_major<memory>(visible.data(), n, heads * group, slots),
                 {row_major<memory>(kept.data(), n, heads, slots),
                  row_major<memory>(count.data(), n, heads)},
                 heads,
                 group,
                 mine};
    workspace none{std::span<std::byte>()};
    op::for_each<show, memory> const all{n * heads * show::pieces(slots), f};
    REQUIRE(run(test::one_thread(), all, none) == status::ok);
    test::settle_device();
    REQUIRE(visible == expected);
  });
}

TEST_CASE("rows that cannot become the cache's are refused before anything is enqueued") {
  policy_options const o = small(16);
  test::world w;
  auto const p = make_policy<test::op_context>("streamingllm", o);
  test::device_engine device(w.options(test::make("streamingllm", o), 60), p, p);
  auto const a = w.words(1);
  test::stream x = device.begin(a);
  device.prompt(x, 9, {9});
  test::own_batch const b{{x.id}, {x.row}};
  std::vector<float> const numbers(uz(w.shape.n_kv_heads * (w.shape.dim_k + w.shape.dim_v)));
  token_kv kv = make_token_kv(numbers.data(), numbers.data(), w.shape);
  auto& s = device.session();
  auto const before = device.kept(0, x);
  CHECK(s.append(7, b, kv) == status::bad_argument);
  CHECK(s.append(0, {}, kv) == status::bad_argument);
  kv.v.type = dtype::opaque;
  CHECK(s.append(0, b, kv) == status::unsupported);
  kv.v.data = nullptr;
  CHECK(s.append(0, b, kv) == status::bad_argument);
  test::settle_device();
  CHECK(device.kept(0, x) == before);
  std::vector<float> out(uz(w.shape.n_q_heads * w.shape.dim_v));
  queries const q = make_queries(numbers.data(), 1, 1, 1);
  CHECK(s.decode(0, b, {kv, q, out.data()}) == status::bad_argument);
  kv = make_token_kv(numbers.data(), numbers.data(), w.shape);
  CHECK(s.decode(0, b, {kv, q, nullptr}) == status::bad_argument);
  CHECK(s.decode(0, b, {kv, {}, out.data()}) == status::bad_argument);
  queries sealed = q;
  sealed.type = dtype::opaque;
  CHECK(s.decode(0, b, {kv, sealed, out.data()}) == status::unsupported);
  test::settle_device();
  CHECK(device.kept(0, x) == before);
  CHECK(s.append(0, b, kv) == status::ok);  // and nobody asks for the slots
  test::settle_device();
  CHECK(device.kept(0, x)[0].back() == 9);
  CHECK(s.attend(0, b, sealed, out.data()) == status::unsupported);
  index_t id = -1;
  REQUIRE(s.begin(id) == status::ok);
  CHECK(s.observe(0, id, sealed) == status::unsupported);
}

TEST_CASE("a decision before attention needs the session's attention") {
  policy_options o = small(16);
  o.include_current = true;
  test::world w;
  auto const p = make_policy<test::op_context>("morphkv", o);
  test::device_engine device(w.options(test::make("morphkv", o), 60), p, p);
  auto const a = w.words(1);
  test::stream x = device.begin(a);
  device.prompt(x, 9, {9});
  test::own_batch const b{{x.id}, {x.row}};
  float const q = 0;
  CHECK(device.session().observe(0, b, make_queries(&q, 1, 1, 1)) == status::unsupported);
}

TEST_CASE("decisions go to another context only with memory for them") {
  policy_options const o = small(16);
  test::world w;
  auto const p = make_policy<test::op_context>("h2o", o);
  test::device_engine device(w.options(test::make("h2o", o), 60), p, p);
  auto& s = device.session();
  std::size_t const bytes = s.aside_bytes(test::other_context());
  REQUIRE(bytes > 0);
  test::aligned_block const memory(bytes);
  CHECK(s.decide_in(test::other_context(), memory.span(1)) == status::workspace_too_small);
#if defined(KVKEEP_TEST_CUDA)
  test::op_context unmarked(test::other_context().stream);
  CHECK(s.decide_in(unmarked, memory.span()) == status::bad_argument);
#endif
  auto const a = w.words(1);
  test::stream x = device.begin(a);
  device.prompt(x, 30, {30});
  for (int t = 0; t < 3; ++t) device.step({&x});  // in the session's own
  CHECK(s.join() == status::ok);
  CHECK(s.decide_in(test::other_context(), memory.span()) == status::ok);
  for (int t = 0; t < 3; ++t) device.step({&x});
  CHECK(s.lengths(0)(x.id, 0) == 17);
  CHECK(s.faults()[x.id] == 0);
}

TEST_CASE("calls out of order are refused before anything is enqueued") {
  policy_options const o = small(16);
  test::world w;
  auto const p = make_policy<test::op_context>("streamingllm", o);
  test::device_engine device(w.options(test::make("streamingllm", o), 60), p, p);
  auto const a = w.words(1);
  auto& s = device.session();
  CHECK(s.end(0) == status::bad_sequence);
  CHECK(s.observe(0, 0, tokens_only(3)) == status::bad_sequence);
  test::stream x = device.begin(a);
  CHECK(s.end_prompt(1, x.id) == status::bad_order);
  CHECK(s.observe(5, x.id, tokens_only(3)) == status::bad_argument);
  CHECK(s.observe(0, x.id, tokens_only(1000)) == status::capacity_exceeded);
  test::stream const begun = device.begin(a);
  REQUIRE(s.observe(0, begun.id, tokens_only(3)) == status::ok);
  CHECK(s.observe(0, begun.id, tokens_only(std::numeric_limits<index_t>::max())) ==
        status::capacity_exceeded);
  REQUIRE(s.end(begun.id) == status::ok);
  device.prompt(x, 9, {9});
  CHECK(s.observe(0, x.id, tokens_only(3)) == status::bad_order);
  CHECK(s.append(0, {}, nullptr) == status::bad_argument);
  index_t id = -1;
  CHECK(s.fork(1, id) == status::bad_sequence);
  CHECK(s.fork(x.id, id, {x.id, 0}) == status::bad_sequence);
  CHECK(s.fork(x.id, id, {-1, -1}) == status::bad_argument);
  for (index_t i = 1; i < w.shape.n_seq; ++i) REQUIRE(s.fork(x.id, id) == status::ok);
  CHECK(s.fork(x.id, id) == status::capacity_exceeded);
}

TEST_CASE("no copy is made of a sequence whose layers are being cut together") {
  policy_options const o = small(16);
  test::world w;
  auto const p = make_policy<test::op_context>("dynamickv", o);
  test::device_engine device(w.options(test::make("dynamickv", o), 60), p, p);
  auto const a = w.words(1);
  test::stream x = device.begin(a);
  index_t id = -1;
  for (index_t l = 0; l < w.n_layers; ++l) device.observe_prompt(x, l, 0, 30);
  REQUIRE(device.end_layer(x, 0) == status::ok);
  CHECK(device.session().fork(x.id, id) == status::bad_order);
  REQUIRE(device.end_layer(x, 1) == status::ok);
  CHECK(device.session().fork(x.id, id) == status::ok);
}
