// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
// A chain of ops gives the bits of its ops one by one.
#include <kvkeep/backend/cpu/head_chain.hpp>
#include <kvkeep/backend/cpu/ops.hpp>
#include <kvkeep/backend/cpu/score_slots.hpp>

#include "layers.hpp"

namespace {

using namespace kvkeep;
using test::generator;
using test::padded;
using test::same_bits;
using test::uz;

struct sum_of_key {
  static constexpr bool reads_k = true, reads_v = false;
  KVKEEP_HD float operator()(slot_values const& s) const {
    float sum = static_cast<float>(s.position);
    for (index_t d = 0; d < s.dim_k; ++d) sum += s.k[d];
    return sum;
  }
};

/// Every other head shall lose a slot; index: place * heads of it + head.
struct resolve {
  index_t const* ids;
  tensor_ref<index_t, 2> lengths, keep;
  KVKEEP_HD void operator()(index_t i) const {
    index_t const heads = keep.extent[1], id = ids[i / heads], h = i % heads;
    keep(id, h) = lengths(id, h) - i % 2;
  }
};
/// What a head has lost.
struct settle {
  index_t const* ids;
  tensor_ref<index_t, 2> lengths, keep, victim, free;
  bool one_set;
  KVKEEP_HD void operator()(index_t i) const {
    index_t const heads = keep.extent[1], id = ids[i / heads], h = i % heads;
    free(id, h) = keep(id, h) < lengths(id, h) ? victim(id, one_set ? 0 : h) : -1;
  }
};

/// What a decoded token needs and leaves. Two of them made from one seed begin alike.
struct token {
  test::test_layer const& l;
  padded<float, 3> q, out, scores;
  padded<float, 2> lse;
  padded<float, 4> weights, weight_sum, weight_max, sums;
  padded<index_t, 2> fresh, keep, victim, free;
  padded<std::uint8_t, 3> visible;
  std::vector<bf16> brain;
  op::attend<> attend;

  token(token const&) = delete;
  token(test::test_layer const& layer, generator g)
      : l(layer),
        q({l.n(), l.shape().n_q_heads, l.shape().dim_k}, 0, 0),
        out({l.n(), l.shape().n_q_heads, l.shape().dim_v}, -7),
        scores({l.n(), l.shape().n_kv_heads, l.shape().max_slots}, -7),
        lse({l.n(), l.shape().n_q_heads}, -7),
        weights({l.n_ids, l.shape().n_kv_heads, l.shape().group(), l.shape().max_slots}, -7),
        weight_sum({l.n_ids, l.shape().n_kv_heads, l.shape().group(), 1}, -7),
        weight_max({l.n_ids, l.shape().n_kv_heads, l.shape().group(), 1}, -7),
        sums({l.n_ids, l.shape().n_kv_heads, 1, l.shape().max_slots}, 0.25F),
        fresh({l.n_ids, l.shape().n_kv_heads}, -1),
        keep({l.n_ids, l.shape().n_kv_heads}, -5),
        victim({l.n_ids, l.shape().n_kv_heads}, -5),
        free({l.n_ids, l.shape().n_kv_heads}, -5),
        visible({l.n(), l.shape().n_q_heads, l.shape().max_slots}) {
    q.each([&](float& x) { x = g.normal(); });
    visible.each([&](std::uint8_t& x) { x = g.chance(0.6F) ? 1 : 0; });
    l.each_head(
        [&](index_t b, index_t h) { fresh(l.id[uz(b)], h) = g.integer(-1, l.length(b, h) - 1); });
    attend.batch = l.batch();
    attend.layer = l.ref();
    attend.q = q.cref();
    if (g.chance(0.5F)) {
      q.each([&](float& x) { brain.push_back(to_bf16(x)); });
      attend.raw = make_queries(brain.data(), l.shape().n_q_heads, 1, l.shape().dim_k);
    }
    if (g.chance(0.8F)) attend.out = out.ref();
    if (g.chance(0.5F)) attend.lse = lse.ref();
    if (g.chance(0.6F)) {
      attend.weights = weights.ref();
      attend.weight_sum = weight_sum.ref();
      attend.weight_max = weight_max.ref();
    }
    if (g.chance(0.6F)) {
      attend.fold.out = sums.ref();
      attend.fold.out_by_id = true;
      attend.fold.clear = g.chance(0.3F);
      if (g.chance(0.7F)) attend.fold.fresh_slot = fresh.cref();
    }
    if (g.chance(0.3F)) attend.visible = visible.cref();
  }

  op::for_each<resolve> resolves() const {
    return {l.n() * l.shape().n_kv_heads, {l.id.data(), l.lengths.ref(), keep.ref()}};
  }
  op::score_slots<sum_of_key> newest() const {
    op::score_slots<sum_of_key> o;
    o.batch = l.batch();
    o.layer = l.ref();
    o.only = fresh.cref();
    o.out.data = sums.ref().data;
    int const axis[] = {0, 1, 3};
    for (int a = 0; a < 3; ++a) {
      o.out.extent[a] = sums.ref().extent[axis[a]];
      o.out.stride[a] = sums.ref().stride[axis[a]];
    }
    o.out_by_id = true;
    return o;
  }
  op::reduce_rows<> reduce() const {
    op::reduce_rows<> o{l.batch(), l.slots(), sums.cref(), true};
    o.scale = 0.5F;
    o.out = scores.ref();
    return o;
  }
  op::mean_heads<> mean() const { return {l.batch(), l.slots(), scores.ref()}; }
  op::evict_one<> evict(bool one_set) const {
    op::evict_one<> o{l.batch(), l.slots(), scores.cref(), {1, 2}, victim.ref()};
    if (one_set) o.slots.lengths.extent[1] = 1;
    return o;
  }
  op::for_each<settle> settles(bool one_set) const {
    return {l.n() * l.shape().n_kv_heads,
            {l.id.data(), l.lengths.ref(), keep.ref(), victim.ref(), free.ref(), one_set}};
  }

  template <class Chain>
  void run(Chain const& chain) {
    test::run_op(chain, out, lse, weights, weight_sum, weight_max, sums, scores, keep, victim,
                 free);
  }
  bool same(token const& o) const {
    return same_bits(out.data(), o.out.data()) && same_bits(lse.data(), o.lse.data()) &&
           same_bits(weights.data(), o.weights.data()) &&
           same_bits(weight_sum.data(), o.weight_sum.data()) &&
           same_bits(weight_max.data(), o.weight_max.data()) &&
           same_bits(sums.data(), o.sums.data()) && same_bits(scores.data(), o.scores.data()) &&
           same_bits(keep.data(), o.keep.data()) && same_bits(victim.data(), o.victim.data()) &&
           same_bits(free.data(), o.free.data());
  }
};

template <class... Ops>
void one_by_one(Ops const&... ops) {
  auto const good = [](auto const& o) {
    return test::run_exact(test::one_thread(), o) == status::ok;
  };
  REQUIRE((good(ops) && ...));
}
template <class... Ops>
auto over_heads(test::test_layer const& l, Ops const&... ops) {
  return op::make_chain<host_space>(l.n(), l.shape().n_kv_heads, l.shape().max_slots, ops...);
}

void check_heads(test::test_layer const& l, std::uint64_t seed) {
  token a(l, generator(seed)), b(l, generator(seed)), c(l, generator(seed));
  REQUIRE(a.same(b));
  one_by_one(a.attend, a.resolves(), a.newest(), a.reduce(), a.evict(false), a.settles(false));
  auto const chain = [&](token const& t) {
    return over_heads(l, t.resolves(), t.attend, t.newest(), t.reduce(), t.evict(false),
                      t.settles(false));
  };
  b.run(chain(b));
  CHECK(a.same(b));
  std::vector<index_t> tickets(uz(l.n() * l.shape().n_q_heads));
  c.attend.tickets = tickets.data();
  c.run(chain(c));
  CHECK(a.same(c));
  CHECK(tickets == std::vector<index_t>(tickets.size()));
}

/// A full head's lazy evaluation, step by step.
struct lazy_token {
  test::test_layer& l;
  padded<float, 4> ring_q, rows, weights, weight_max;
  padded<float, 3> head, q;
  padded<index_t, 2> victim;
  std::vector<index_t> seen, from;
  op::attend<> attend;
  op::lazy_enter<> enter;
  op::lazy_victim<> leave;

  lazy_token(test::test_layer& layer, lazy_shape const& s, reduction fuse)
      : l(layer),
        ring_q({l.n_ids, l.shape().n_q_heads, s.n_rows + 1, l.shape().dim_k}, 0.5F),
        rows({l.n_ids, l.shape().n_kv_heads, s.slot_rows(), (l.shape().max_slots + 7) / 8 * 8}, 0,
             0),
        weights({l.n_ids, l.shape().n_kv_heads, s.group, l.shape().max_slots}),
        weight_max({l.n_ids, l.shape().n_kv_heads, s.group, 1}),
        head({l.n_ids, l.shape().n_kv_heads, s.head_floats()}, 0),
        q({l.n(), l.shape().n_q_heads, l.shape().dim_k}, 0, 0),
        victim({l.n_ids, l.shape().n_kv_heads}, -5),
        seen(uz(l.n_ids), l.shape().max_slots),
        from(uz(l.n_ids), 0) {
    attend.batch = enter.batch = leave.batch = l.batch();
    attend.layer = enter.layer = leave.layer = l.ref();
    attend.q = q.cref();
    attend.weights = weights.ref();
    attend.weight_max = weight_max.ref();
    enter.state =
        leave.state = {s, seen.data(), from.data(), ring_q.cref(), rows.ref(), head.ref()};
    enter.weights = weights.cref();
    enter.weight_max = weight_max.cref();
    enter.fuse = leave.fuse = fuse;
    leave.victim = victim.ref();
  }
  /// The token at `position` has these queries.
  void show(padded<float, 3> const& queries, index_t position) {
    index_t const ring = ring_q.ref().extent[2];
    for (index_t b = 0; b < l.n(); ++b) {
      seen[uz(l.id[uz(b)])] = position + 1;
      for (index_t h = 0; h < l.shape().n_q_heads; ++h)
        for (index_t d = 0; d < l.shape().dim_k; ++d)
          q(b, h, d) = ring_q(l.id[uz(b)], h, position % ring, d) = queries(b, h, d);
    }
  }
};

}  // namespace

TEST_CASE("MorphKV's lazy state and victims are the same bits in a chain") {
  test::for_seeds(8, [](generator& g) {
    test::layer_options o;
    o.cache.shape = test::random_shape(g, 1, 4);
    o.cache.shape.max_slots = g.integer(40, 150);
    o.cache.seed = g.next();
    o.min_length = o.cache.shape.max_slots;
    o.dense = true;
    test::test_layer l(o);
    lazy_shape const s{l.shape().group(), g.integer(1, 9), 9};
    reduction const fuse = g.chance(0.5F) ? reduction::max : reduction::sum;
    lazy_token a(l, s, fuse), b(l, s, fuse);
    padded<float, 3> q({l.n(), l.shape().n_q_heads, l.shape().dim_k}, 0, 0);
    for (index_t newest = l.shape().max_slots - 1, end = newest + 20; newest < end; ++newest) {
      q.each([&](float& x) { x = g.normal(); });
      a.show(q, newest);
      b.show(q, newest);
      one_by_one(a.attend, a.enter, a.leave);
      test::run_op(over_heads(l, b.attend, b.enter, b.leave), b.weights, b.weight_max, b.rows,
                   b.head, b.victim);
      REQUIRE(same_bits(a.victim.data(), b.victim.data()));
      REQUIRE(same_bits(a.head.data(), b.head.data()));
      REQUIRE(same_bits(a.rows.data(), b.rows.data()));
      l.each_head([&](index_t entry, index_t h) {
        index_t const id = l.id[uz(entry)], slot = a.victim(id, h);
        REQUIRE(slot >= 0);
        l.positions(id, h, slot) = newest + 1;
        l.cache.set_k(l.row[uz(entry)], h, slot, g.normals(uz(l.shape().dim_k)));
      });
    }
  });
}

TEST_CASE("ops head by head give the bits of ops one by one") {
  test::for_layers(30, 700, 12,
                   [](test::test_layer const& l, generator& g) { check_heads(l, g.next()); });
}

TEST_CASE("heads that are too long for one block give the same bits") {
  test::layer_options o;
  for (index_t const slots : {1500, 8200}) {
    o.cache.shape = {2, 3, 1, 4, 5, slots};
    test::test_layer const l(o);
    check_heads(l, 3);
  }
}

TEST_CASE("ops over the heads of an entry give the bits of ops one by one") {
  test::for_seeds(20, [](generator& g) {
    test::layer_options o;
    o.cache.shape = test::random_shape(g, 300);
    o.cache.seed = g.next();
    o.equal_heads = true;
    test::test_layer const l(o);
    std::uint64_t const seed = g.next();
    token a(l, generator(seed)), b(l, generator(seed));
    one_by_one(a.attend, a.resolves(), a.reduce(), a.mean(), a.evict(true), a.settles(true));
    b.run(over_heads(l, b.attend, b.resolves(), b.reduce()));
    auto const of_entries = [&](token const& t) {
      return op::make_chain<host_space>(l.n(), 1, l.shape().max_slots, t.mean(), t.evict(true),
                                        t.settles(true));
    };
    b.run(of_entries(b));
    CHECK(a.same(b));
    token c(l, generator(seed));
    std::vector<index_t> tickets(uz(l.n()), 0);
    c.run(op::join_chains(over_heads(l, c.resolves(), c.attend, c.reduce()), of_entries(c),
                          tickets.data()));
    CHECK(a.same(c));
    CHECK(tickets == std::vector<index_t>(uz(l.n()), 0));
  });
}

TEST_CASE("what a chain refuses, its ops refuse") {
  test::layer_options o;
  o.cache.shape = {1, 2, 1, 4, 4, 20};
  test::test_layer const l(o);
  token t(l, generator(1));
  auto wrong = t.reduce();
  wrong.out.stride[2] = 2;  // slots do not lie side by side
  test::aligned_block const block(1 << 16);
  workspace w(block.span());
  std::vector<index_t> const before = t.keep.data();
  CHECK(test::call(test::one_thread(), over_heads(l, t.resolves(), wrong), w) ==
        status::bad_argument);
  std::vector<index_t> tickets(1, 0);
  auto const heads = over_heads(l, t.resolves(), t.reduce());
  auto const entries =
      op::make_chain<host_space>(l.n(), 1, l.shape().max_slots, t.mean(), t.evict(true));
  auto two = entries, more = entries;
  two.n_heads = 2;
  ++more.n_entries;
  auto const refused = [&](auto const& of, index_t* ticket) {
    return test::call(test::one_thread(), op::join_chains(heads, of, ticket), w) ==
           status::bad_argument;
  };
  CHECK(refused(two, tickets.data()));
  CHECK(refused(more, tickets.data()));
  if constexpr (!std::is_same_v<test::op_context, cpu::context>) CHECK(refused(entries, nullptr));
  CHECK(before == t.keep.data());
}
