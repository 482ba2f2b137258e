// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
// Selection: the k best of n slots per head (op::select_k) against std::nth_element over slot
// numbers, each sample on scores that it has not seen before; and the one victim (op::evict_one)
// against std::min_element. Floor: reading scores and positions once.
#include "inputs.hpp"

namespace bench {
namespace {

constexpr index_t guarded = 32;  ///< the newest tokens stay

/// Score rows for `sets` samples of one row per head.
std::vector<float> make_scores(point const& p, index_t sets) {
  random_bits r{11};
  std::vector<float> v(product(sets, p.kv_heads, p.tokens));
  for (float& x : v) x = random_score(p.values, r);
  return v;
}

/// As many sets as fit 96 MB, so that a set comes back only after thousands of others.
index_t sets_of(point const& p) {
  return std::max<index_t>(8, 24'000'000 / (p.kv_heads * p.tokens));
}

void select_k(benchmark::State& state, point const& p) {
  index_t const n = p.tokens, k = p.capacity, sets = sets_of(p);
  std::vector<float> const scores = make_scores(p, sets);
  layer_slots const slots(1, p.kv_heads, n);
  std::vector<index_t> keep(static_cast<std::size_t>(p.kv_heads), k), count = keep;
  std::vector<index_t> plan(static_cast<std::size_t>(p.kv_heads * k)),
      list(static_cast<std::size_t>(n));

  cpu::context ctx;
  op::select_k<> o;
  o.batch.n = 1;
  o.slots = slots.view;
  o.scores = row_major(scores.data(), 1, p.kv_heads, n);
  o.k = row_major(static_cast<index_t const*>(keep.data()), 1, p.kv_heads);
  o.guard.recent = guarded;
  o.out = {row_major(plan.data(), 1, p.kv_heads, k), row_major(count.data(), 1, p.kv_heads)};
  auto memory = scratch_for(ctx, o);

  meter m({8.0 * p.kv_heads * n, 0});
  std::size_t const size = static_cast<std::size_t>(p.kv_heads) * static_cast<std::size_t>(n);
  std::size_t turn = 0;
  for (auto _ : state) {
    // The two take different sets: neither may warm a cache or a predictor for the other.
    float const* const mine = scores.data() + turn++ % static_cast<std::size_t>(sets) * size;
    float const* const other = scores.data() + turn++ % static_cast<std::size_t>(sets) * size;
    o.scores.data = mine;
    workspace ws(memory);
    double const t = timed([&] { expect(run(ctx, o, ws), "select_k"); });
    double const peer = timed([&] {
      for (index_t h = 0; h < p.kv_heads; ++h) {
        float const* const s = other + product(h, n);
        std::iota(list.begin(), list.end(), 0);
        std::nth_element(list.begin(), list.begin() + (k - guarded), list.end() - guarded,
                         [=](index_t a, index_t b) { return s[a] != s[b] ? s[a] > s[b] : a < b; });
        benchmark::DoNotOptimize(list.data());
      }
    });
    m.add(t, peer);
    state.SetIterationTime(t);
  }
  m.report(state);
  state.counters["us_per_head"] = state.counters["us"] / p.kv_heads;
}

void evict_one(benchmark::State& state, point const& p) {
  index_t const n = p.capacity + 1;
  point q = p;
  q.tokens = n;
  index_t const sets = sets_of(q);
  std::vector<float> const scores = make_scores(q, sets);
  layer_slots const slots(1, p.kv_heads, n);
  std::vector<index_t> victim(static_cast<std::size_t>(p.kv_heads));

  cpu::context ctx;
  op::evict_one<> o;
  o.batch.n = 1;
  o.slots = slots.view;
  o.scores = row_major(scores.data(), 1, p.kv_heads, n);
  o.guard.recent = guarded;
  o.victim = row_major(victim.data(), 1, p.kv_heads);
  auto memory = scratch_for(ctx, o);

  meter m({8.0 * p.kv_heads * n, 0});
  std::size_t const size = static_cast<std::size_t>(p.kv_heads) * static_cast<std::size_t>(n);
  std::vector<float> mine(size), other(size);
  std::size_t turn = 0;
  for (auto _ : state) {
    // Scores come from the op before: they lie in a near cache.
    auto const take = [&](std::vector<float>& to) {
      std::copy_n(scores.data() + turn++ % static_cast<std::size_t>(sets) * size, size, to.data());
    };
    take(mine);
    o.scores.data = mine.data();
    workspace ws(memory);
    double const t = timed([&] { expect(run(ctx, o, ws), "evict_one"); });
    take(other);
    double const peer = timed([&] {
      for (index_t h = 0; h < p.kv_heads; ++h) {
        float const* const s = other.data() + product(h, n);
        float const* const least = std::min_element(s, s + (n - guarded));
        benchmark::DoNotOptimize(least);
      }
    });
    m.add(t, peer);
    state.SetIterationTime(t);
  }
  m.report(state);
  state.counters["us_per_head"] = state.counters["us"] / p.kv_heads;
}

template <class F>
void add(std::string const& what, point const& p, int samples, F f) {
  add_row(what + named("T", p.tokens) + named("C", p.capacity) + named("Hkv", p.kv_heads) + "/" +
              to_string(p.values),
          samples, [=](benchmark::State& s) { f(s, p); });
}

}  // namespace
}  // namespace bench

int main(int argc, char** argv) {
  using namespace bench;
  for (scores d : all_scores) {
    point p = base;
    p.values = d;
    add("select_k", p, 300, select_k);
  }
  for (index_t t : {index_t{2048}, index_t{32768}, index_t{131072}}) {
    point p = base;
    p.tokens = t;
    p.kv_heads = t > 65536 ? 2 : 8;
    add("select_k", p, 300, select_k);
  }
  for (index_t c : {index_t{128}, index_t{512}, index_t{4096}}) {
    point p = base;
    p.capacity = c;
    add("select_k", p, 300, select_k);
  }
  for (index_t c : all_capacities)
    for (scores d : {scores::heavy_tailed, scores::all_equal}) {
      point p = base;
      p.capacity = p.tokens = c;
      p.values = d;
      add("evict_one", p, 1500, evict_one);
    }
  return run_rows(argc, argv);
}
