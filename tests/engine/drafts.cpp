// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
// Drafts: appended tokens that are dropped again leave no trace, for every draft-safe policy.
#include <kvkeep/engine/device_session.hpp>

#include "../support/catch.hpp"
#include "../support/session_run.hpp"

using namespace kvkeep;
using namespace kvkeep::test;

namespace {

/// Drafts `n` tokens of which the first `good` belong to the text, then confirms those and drops
/// the rest.
/// Returns the records of the good ones.
std::vector<std::vector<token_record>> round_of(engine& e, stream& s, text const& wrong, index_t n,
                                                index_t good, bool confirm_first) {
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
  if (confirm_first && good > 0) REQUIRE(e.session().confirm(b.batch(), good) == status::ok);
  if (n > good) REQUIRE(e.session().rollback(b.batch(), n - good) == status::ok);
  s.tokens -= n - good;
  if (!confirm_first && good > 0) REQUIRE(e.session().confirm(b.batch(), good) == status::ok);
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
          auto const x = round_of(drafting, a, wrong, n, good, g.chance(0.5F));
          if (good == 0) continue;
          auto const y = round_of(plain, b, wrong, good, good, true);
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
      (void)round_of(plain, b, wrong, 4, 4, true);
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
  CHECK(e.session().rollback(b.batch(), 2) == status::ok);
  s.tokens -= 2;
  e.check({&s});
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
