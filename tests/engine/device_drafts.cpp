// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
// Drafts of a device session: how many stay is known to the backend alone, and the others leave no trace.
#include "../support/device_engine.hpp"

namespace {

using namespace kvkeep;
using test::bit;
using test::generator;
using test::small;
using test::uz;
using device_batch = batch_ref<test::device_memory>;

struct pairing {
  char const* prompt;
  char const* decode;
  policy_options o, d;
};

std::vector<pairing> pairings() {
  std::vector<pairing> all;
  for (char const* name : {"fullkv", "h2o", "tova", "knorm", "keydiff", "morphkv", "streamingllm"})
    all.push_back({name, name, small(14), small(14)});
  for (char const* name : {"knorm", "keydiff", "morphkv"}) {
    policy_options burst = small(14);
    burst.evict_after = 1.3;
    all.push_back({name, name, burst, burst});
  }
  for (morph_rows rows : {morph_rows::cached, morph_rows::lazy, morph_rows::direct}) {
    policy_options o = small(20);
    o.window = 9;
    o.evaluation = rows;
    all.push_back({"morphkv", "morphkv", o, o});
  }
  for (char const* name : {"knorm", "h2o"})
    for (scope const per : {scope::layer, scope::sequence}) {
      policy_options o = small(14);
      o.per = per;
      all.push_back({name, name, o, o});
    }
  policy_options inherits = small(14);
  inherits.budget = "inherit";
  all.push_back({"adakv", "h2o", small(14), inherits});
  all.push_back({"snapkv", "morphkv", small(20), small(14)});
  return all;
}

/// A sequence of both engines, and texts that go on otherwise.
struct twin {
  test::stream host, device;
  test::text const* right;
  test::text const* wrong;
};

/// `n` drafts for each sequence, of which the first `good` belong to its text.
void round_of(test::engine& host, test::device_engine& device, std::vector<twin*> const& who,
              index_t n, std::vector<index_t> const& good) {
  for (index_t t = 0; t < n; ++t) {
    std::vector<test::stream*> hosts, devices;
    for (std::size_t i = 0; i < who.size(); ++i) {
      twin& w = *who[i];
      w.host.words = w.device.words = t < good[i] ? w.right : w.wrong;
      hosts.push_back(&w.host);
      devices.push_back(&w.device);
    }
    auto const want = host.token(hosts), got = device.step(devices);
    REQUIRE(want.size() == got.size());
    for (std::size_t i = 0; i < want.size(); ++i) {
      REQUIRE(want[i].appended == got[i].appended);
      for (std::size_t d = 0; d < want[i].out.size(); ++d)
        REQUIRE(std::abs(want[i].out[d] - got[i].out[d]) <=
                2e-5F + 1e-4F * std::abs(want[i].out[d]));
    }
  }
  std::vector<index_t> ids, rows;
  for (std::size_t i = 0; i < who.size(); ++i) {
    twin& w = *who[i];
    auto const b = test::engine::batch_of({&w.host});
    if (n > good[i]) REQUIRE(host.session().rollback(b.batch(), n - good[i]) == status::ok);
    if (good[i] > 0) REQUIRE(host.session().confirm(b.batch(), good[i]) == status::ok);
    w.host.tokens -= n - good[i];
    w.device.tokens -= n - good[i];
    ids.push_back(w.device.id);
    rows.push_back(w.device.row);
  }
  device_batch const b{oracle::count(who), rows.data(), ids.data()};
  REQUIRE(device.session().confirm(b, good.data()) == status::ok);
  test::settle_device();
}

}  // namespace

TEST_CASE("drafts that a backend accepts and drops leave what a session's leave") {
  for (pairing const& p : pairings())
    test::for_seeds(test::host_reads_rows ? 3 : 1, [&](generator& g) {
      INFO(p.prompt << ", then " << p.decode << ", per " << to_string(p.d.per) << ", evict_after "
                    << p.d.evict_after);
      test::world w;
      w.layout = g.one_of(test::all_layouts());
      w.seed = g.next();
      w.draft = g.integer(1, 4);
      auto const prompt = test::make(p.prompt, p.o), decode = test::make(p.decode, p.d);
      auto const o = w.options(decode, w.prompt + 60);
      test::engine host(o, prompt, decode);
      test::device_engine device(o, make_policy<test::op_context>(p.prompt, p.o),
                                 make_policy<test::op_context>(p.decode, p.d));
      if (g.chance(0.5F)) device.append_rows();
      auto const a = w.words(1), b = w.words(2), wrong = w.words(3);
      twin x{host.begin(a), device.begin(a), &a, &wrong},
          y{host.begin(b), device.begin(b), &b, &wrong};
      index_t const n_prompt = g.integer(3, w.prompt);
      host.prompt(x.host, w.prompt);
      host.prompt(y.host, n_prompt);
      device.prompt(x.device, w.prompt, {w.prompt});
      device.prompt(y.device, n_prompt, {n_prompt});
      for (int round = 0; round < 9; ++round) {
        INFO("round " << round);
        index_t const n = g.integer(1, w.draft);
        round_of(host, device, {&y, &x}, n, {g.integer(0, n), g.integer(0, n)});
        for (twin const* t : {&x, &y}) {
          for (index_t l = 0; l < w.n_layers; ++l)
            REQUIRE(host.kept(l, t->host) == device.kept(l, t->device));
          REQUIRE(device.session().faults()[t->device.id] == 0);
          REQUIRE(device.session().tokens(1)[t->device.id] == t->device.tokens);
        }
      }
      CHECK(device.intact());
    });
}

TEST_CASE("plans count confirmed drafts alone") {
  test::world w;
  w.lim.engine_commits = true;
  w.draft = 3;
  auto const p = make_policy<test::op_context>("h2o", small(12));
  test::device_engine e(w.options(test::make("h2o", small(12)), 60), p, p);
  auto const words = w.words(1);
  test::stream s = e.begin(words);
  e.prompt(s, 12, {12});
  test::own_batch const b{{s.id}, {s.row}};
  auto& session = e.session();
  for (int t = 0; t < 3; ++t) e.step({&s});
  bool const waits = GENERATE(true, false);
  std::vector<index_t> const two{2};
  if (waits) {
    REQUIRE(session.confirm(b, two.data()) == status::ok);
    test::settle_device();
    CHECK(session.lengths(1)(s.id, 1) == 14);  // the engine decides
  }
  plan<test::device_memory> chosen;
  REQUIRE(session.choose(b, chosen) == status::ok);
  REQUIRE(session.commit(chosen) == status::ok);
  test::settle_device();
  CHECK(session.faults()[s.id] == (waits ? 0 : bit(device_fault::bad_order)));
  CHECK(session.lengths(0)(s.id, 0) == (waits ? 12 : 15));
}

TEST_CASE("more drafts than there may be, or than there are") {
  test::world w;
  w.draft = 2;
  auto const p = make_policy<test::op_context>("h2o", small(12));
  test::device_engine e(w.options(test::make("h2o", small(12)), 60), p, p);
  auto const words = w.words(1);
  test::stream s = e.begin(words), other = e.begin(words);
  for (auto* const x : {&s, &other}) e.prompt(*x, 9, {9});
  test::own_batch const both{{s.id, other.id}, {s.row, other.row}};
  auto& session = e.session();
  CHECK(session.confirm(both, nullptr) == status::bad_argument);
  CHECK(session.confirm({}, both.ids.data()) == status::bad_argument);

  SECTION("a third") {
    for (int t = 0; t < 2; ++t) e.step({&s});
    auto const before = e.kept(0, s);
    e.step({&s, &other});
    CHECK(session.faults()[s.id] == bit(device_fault::no_slot));
    CHECK(e.kept(0, s) == before);
    CHECK(session.faults()[other.id] == 0);
  }
  SECTION("confirmed ones that nobody has appended") {
    std::vector<index_t> const counts{GENERATE(2, -1), 1};
    e.step({&s, &other});
    REQUIRE(session.confirm(both, counts.data()) == status::ok);
    test::settle_device();
    CHECK(session.faults()[s.id] == bit(device_fault::bad_order));
    CHECK(session.tokens(0)[s.id] == 9);
    CHECK(session.lengths(1)(s.id, 0) == 10);
    CHECK(session.faults()[other.id] == 0);
    CHECK(session.tokens(1)[other.id] == 10);
  }
  SECTION("before attention") {
    REQUIRE(session.append_at(both.first(1)) == status::ok);
    std::vector<index_t> const one{1};
    REQUIRE(session.confirm(both.first(1), one.data()) == status::ok);
    test::settle_device();
    CHECK(session.faults()[s.id] == bit(device_fault::bad_order));
    CHECK(session.tokens(0)[s.id] == 9);
  }
  SECTION("in a session without drafts") {
    w.draft = 0;
    test::device_engine plain(w.options(test::make("h2o", small(12)), 60), p, p);
    CHECK(plain.session().confirm(both, both.ids.data()) == status::unsupported);
  }
}

TEST_CASE("a token at the tail may be a draft") {
  test::world w;
  w.draft = 3;
  auto const p = make_policy<test::op_context>("knorm", small(12));
  auto o = w.options(test::make("knorm", small(12)), 60);
  o.lim.decode = decode_offer::nothing;
  test::device_engine e(o, p, p);
  auto const words = w.words(1);
  test::stream s = e.begin(words);
  e.prompt(s, 12, {12});
  test::own_batch const b{{s.id}, {s.row}};
  auto& session = e.session();
  for (index_t t = 0; t < 3; ++t) {
    REQUIRE(session.append_at(b) == status::ok);
    for (index_t l = 0; l < w.n_layers; ++l)
      REQUIRE(session.observe(l, b, tokens_only(1)) == status::ok);
    test::settle_device();
    CHECK(session.lengths(0)(s.id, 1) == 13 + t);
    CHECK(session.positions(1)(s.id, 0, 12 + t) == 12 + t);
  }
  std::vector<index_t> const none{0};
  REQUIRE(session.confirm(b, none.data()) == status::ok);
  test::settle_device();
  CHECK(session.faults()[s.id] == 0);
  for (index_t l = 0; l < w.n_layers; ++l)
    for (oracle::kept_set const& head : e.kept(l, s)) CHECK(head == oracle::iota_positions(12));
}
