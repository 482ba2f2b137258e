// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
// Drafts: appended tokens that are dropped again leave no trace, for every draft-safe policy.
#include <array>

#include <kvkeep/engine/device_session.hpp>

#include "../support/catch.hpp"
#include "../support/session_run.hpp"

using namespace kvkeep;
using namespace kvkeep::test;

namespace {

/// How what is accepted and what is dropped are told.
enum class settled : std::uint8_t { confirm_first, rollback_first, at_once };

/// Drafts `n` tokens of which the first `good` belong to the text, then confirms those and drops
/// the rest.
/// Returns the records of the good ones.
std::vector<std::vector<token_record>> round_of(engine& e, stream& s, text const& wrong, index_t n,
                                                index_t good, settled how) {
  std::vector<std::vector<token_record>> records;
  text const* const right = s.words;
  for (index_t t = 0; t < n; ++t) {
    if (t >= good) s.words = &wrong;
    auto r = e.token({&s});
    if (t < good) records.push_back(std::move(r));
    REQUIRE(e.session().verify() == status::ok);
  }
  s.words = right;
  auto const b = engine::batch_of({&s});
  s.tokens -= n - good;
  if (how == settled::at_once) {
    REQUIRE(e.session().confirm(b.batch(), std::array{good}) == status::ok);
  } else {
    bool const first = how == settled::confirm_first;
    if (first && good > 0) REQUIRE(e.session().confirm(b.batch(), good) == status::ok);
    if (n > good) REQUIRE(e.session().rollback(b.batch(), n - good) == status::ok);
    if (!first && good > 0) REQUIRE(e.session().confirm(b.batch(), good) == status::ok);
  }
  e.check({&s});
  return records;
}

}  // namespace

TEST_CASE("dropped drafts leave no trace") {
  for (decode_case const& c : all_decode_cases()) {
    if (!is_plain(c)) continue;
    for (layout_id const layout : {layout_id::hnd, layout_id::paged})
      for_seeds(2, [&](generator& g) {
        INFO(c.name << ", " << layout);
        world w;
        w.draft = 4;
        w.layout = layout;
        w.prompt = g.integer(3, 30);
        w.seed = g.next();
        text const words = w.words(), wrong = w.words(1);
        engine drafting(w.options(c.policy), c.policy), plain(w.options(c.policy), c.policy);
        stream a = drafting.begin(words), b = plain.begin(words);
        drafting.prompt(a, w.prompt);
        plain.prompt(b, w.prompt);
        while (a.tokens + 4 < words.size()) {
          index_t const n = g.integer(1, 4), good = g.integer(0, n);
          settled const all[] = {settled::confirm_first, settled::rollback_first, settled::at_once};
          auto const x = round_of(drafting, a, wrong, n, good, g.one_of(all));
          if (good == 0) continue;
          auto const y = round_of(plain, b, wrong, good, good, settled::confirm_first);
          INFO("token " << a.tokens);
          REQUIRE(x.size() == y.size());
          for (std::size_t i = 0; i < x.size(); ++i) require_same(x[i], y[i], false);
          for (index_t l = 0; l < w.n_layers; ++l) REQUIRE(drafting.kept(l, a) == plain.kept(l, b));
        }
      });
  }
}

TEST_CASE("one draft at a time is plain decoding") {
  for (decode_case const& c : all_decode_cases()) {
    if (!is_plain(c)) continue;
    INFO(c.name);
    world w, d;
    d.draft = 3;
    text const words = w.words();
    engine plain(w.options(c.policy), c.policy), drafting(d.options(c.policy), c.policy);
    stream a = plain.begin(words), b = drafting.begin(words);
    plain.prompt(a, w.prompt);
    drafting.prompt(b, w.prompt);
    while (a.tokens < words.size()) {
      INFO("token " << a.tokens);
      require_same(plain.step({&a}), drafting.step({&b}), false);
    }
  }
}

TEST_CASE("some drafts may stay unconfirmed") {
  for (decode_case const& c : all_decode_cases()) {
    if (!is_plain(c)) continue;
    INFO(c.name);
    world w;
    w.draft = 4;
    text const words = w.words(), wrong = w.words(1);
    engine e(w.options(c.policy), c.policy), plain(w.options(c.policy), c.policy);
    stream a = e.begin(words), b = plain.begin(words);
    e.prompt(a, w.prompt);
    plain.prompt(b, w.prompt);
    // Four drafts, confirmed one, one and two; nothing leaves before the last of them.
    while (a.tokens + 4 < words.size()) {
      auto const batch = engine::batch_of({&a});
      for (int t = 0; t < 4; ++t) (void)e.token({&a});
      for (index_t const n : {1, 1, 2}) {
        REQUIRE(e.session().confirm(batch.batch(), n) == status::ok);
        REQUIRE(e.session().verify() == status::ok);
      }
      (void)round_of(plain, b, wrong, 4, 4, settled::confirm_first);
      for (index_t l = 0; l < w.n_layers; ++l) REQUIRE(e.kept(l, a) == plain.kept(l, b));
      CHECK(e.session().tokens(a.id) == a.tokens);
    }
  }
}

TEST_CASE("limits of drafts") {
  decode_case const c = all_decode_cases()[2];
  world w;
  w.draft = 2;
  text const words = w.words();
  engine e(w.options(c.policy), c.policy);
  stream s = e.begin(words);
  e.prompt(s, w.prompt);
  auto const b = engine::batch_of({&s});
  CHECK(e.session().confirm(b.batch(), 1) == status::bad_order);
  CHECK(e.session().rollback(b.batch(), 1) == status::bad_order);
  (void)e.token({&s});
  (void)e.token({&s});
  CHECK(e.session().append(0, b.batch()) == status::capacity_exceeded);
  CHECK(e.session().confirm(b.batch(), 3) == status::bad_order);
  CHECK(e.session().rollback(b.batch(), 3) == status::bad_order);
  CHECK(e.session().confirm(b.batch(), 0) == status::bad_argument);
  CHECK(e.session().rollback(b.batch(), 0) == status::bad_argument);
  CHECK(e.session().confirm(b.batch(), std::array{3}) == status::bad_order);
  CHECK(e.session().confirm(b.batch(), std::array{-1}) == status::bad_argument);
  CHECK(e.session().confirm(b.batch(), std::array{1, 1}) == status::bad_argument);
  CHECK(e.session().rollback(b.batch(), 2) == status::ok);
  s.tokens -= 2;
  e.check({&s});
  CHECK(e.session().confirm(b.batch(), std::array{0}) == status::ok);  // there is none
  REQUIRE(e.session().append(0, b.batch()) == status::ok);
  CHECK(e.session().confirm(b.batch(), std::array{0}) == status::bad_order);  // in one layer alone

  world one;
  engine plain(one.options(c.policy), c.policy);
  stream t = plain.begin(words);
  plain.prompt(t, one.prompt);
  CHECK(plain.session().confirm(engine::batch_of({&t}).batch(), std::array{0}) ==
        status::unsupported);
}

TEST_CASE("a batch's drafts are accepted by numbers of their own") {
  for (decode_case const& c : all_decode_cases()) {
    if (!is_plain(c)) continue;
    for_seeds(2, [&](generator& g) {
      INFO(c.name);
      world w;
      w.draft = 4;
      w.seed = g.next();
      text const words[] = {w.words(), w.words(1), w.words(2)};
      engine together(w.options(c.policy), c.policy), apart(w.options(c.policy), c.policy);
      std::vector<stream> a, b;
      for (index_t i = 0; i < 3; ++i) {
        a.push_back(together.begin(words[i]));
        b.push_back(apart.begin(words[i]));
        index_t const n = g.integer(3, w.prompt);
        together.prompt(a.back(), n);
        apart.prompt(b.back(), n);
      }
      std::vector<stream*> const all{&a[0], &a[1], &a[2]};
      for (int round = 0; round < 6; ++round) {
        index_t const n = g.integer(1, 4);
        for (index_t t = 0; t < n; ++t) {
          (void)together.token(all);
          for (stream& s : b) (void)apart.token({&s});
        }
        std::vector<index_t> good;
        for (std::size_t i = 0; i < 3; ++i) {
          good.push_back(g.integer(0, n));
          auto const one = engine::batch_of({&b[i]});
          index_t const dropped = n - good[i];
          if (good[i] > 0) REQUIRE(apart.session().confirm(one.batch(), good[i]) == status::ok);
          if (dropped > 0) REQUIRE(apart.session().rollback(one.batch(), dropped) == status::ok);
          a[i].tokens -= dropped;
          b[i].tokens -= dropped;
        }
        REQUIRE(together.session().confirm(engine::batch_of(all).batch(), good) == status::ok);
        together.check({&a[0], &a[1], &a[2]});
        for (std::size_t i = 0; i < 3; ++i)
          for (index_t l = 0; l < w.n_layers; ++l)
            REQUIRE(together.kept(l, a[i]) == apart.kept(l, b[i]));
      }
    });
  }
}

namespace {

/// A score that says of which token it is, and when it was made.
struct folded_at_fn {
  static constexpr char const* name = "folded_at";
  static constexpr bool reads_k = false;
  static constexpr bool reads_v = false;
  float operator()(slot_values const& s) const noexcept {
    return static_cast<float>((s.seen * 37 + s.position * 11) % 101);
  }
};
using folded_at = policy<slot_score<folded_at_fn>>;

/// Positions that are left in layer 1, head 1.
template <class Session>
std::vector<index_t> kept(Session const& s, index_t id) {
  std::vector<index_t> all;
  for (index_t t = 0; t < s.lengths(1)(id, 1); ++t)
    if (t != s.free_slots(1)(id, 1)) all.push_back(s.positions(1)(id, 1, t));
  std::sort(all.begin(), all.end());
  return all;
}

}  // namespace

TEST_CASE("a draft is folded as of its own token, whoever counts") {
  cache_shape const shape{1, 2, 2, 4, 4, 40};
  test_cache const cache = test_cache::make(layout_id::hnd, dtype::f32, shape);
  layer_spec<> const specs[] = {cache.ref(), cache.ref()};
  folded_at const p{"folded_at", {}, {12}};
  limits lim;
  lim.max_draft = 3;
  lim.decode = decode_offer::nothing;
  cpu::context ctx;
  auto host = bind_session(ctx, p, p, std::span<layer_spec<> const>(specs), lim);
  std::vector<std::byte> memory(device_session_bytes(ctx, p, p, specs, lim));
  auto device = bind_device_session(ctx, p, p, specs, lim, memory);
  index_t id = 0, row = 0;
  REQUIRE(host.begin(id) == status::ok);
  REQUIRE(device.begin(id) == status::ok);
  for (index_t l = 0; l < 2; ++l) {
    REQUIRE(host.observe(l, id, tokens_only(9)) == status::ok);
    REQUIRE(device.observe(l, id, tokens_only(9)) == status::ok);
  }
  REQUIRE(host.end_prompt(id) == status::ok);
  REQUIRE(device.end_prompt(id) == status::ok);
  index_t const ids[] = {id};
  for (index_t const accepted : {3, 1, 2, 0, 3, 3, 2}) {
    for (index_t t = 0; t < 3; ++t)
      for (index_t l = 0; l < 2; ++l) {
        index_t a[2], b[2];
        REQUIRE(host.append(l, {ids}, a) == status::ok);
        REQUIRE(device.append(l, {1, &row, &id}, b) == status::ok);
        REQUIRE(device.observe(l, {1, &row, &id}, tokens_only(1)) == status::ok);
      }
    if (accepted < 3) REQUIRE(host.rollback({ids}, 3 - accepted) == status::ok);
    if (accepted > 0) REQUIRE(host.confirm({ids}, accepted) == status::ok);
    REQUIRE(device.confirm({1, &row, &id}, &accepted) == status::ok);
    CHECK(kept(host, id) == kept(device, id));
  }
  CHECK(device.faults()[id] == 0);
  CHECK(device.tokens(0)[id] == host.tokens(id));
}
