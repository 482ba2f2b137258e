// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
// Compaction (op::compact): C of T slots, chosen at random per head, move from a prompt into a
// smaller pool (pack), or inside the cache into the holes (fill_holes). Peer: std::memcpy of as
// many contiguous bytes. Floor: reading the moved rows once.
#include <cstring>

#include "inputs.hpp"

namespace bench {
namespace {

/// Random ascending subsets of [0, T), C of them per entry and head.
std::vector<index_t> make_plan(point const& p, random_bits& r) {
  std::vector<index_t> all(static_cast<std::size_t>(p.tokens)), plan;
  for (index_t i = 0; i < p.batch * p.kv_heads; ++i) {
    std::iota(all.begin(), all.end(), 0);
    for (index_t j = 0; j < p.capacity; ++j)
      std::swap(all[static_cast<std::size_t>(j)],
                all[static_cast<std::size_t>(j + r.below(p.tokens - j))]);
    std::sort(all.begin(), all.begin() + p.capacity);
    plan.insert(plan.end(), all.begin(), all.begin() + p.capacity);
  }
  return plan;
}

/// Rows that the plan moves: all of them, or those beyond the new length.
double moved_rows(point const& p, std::vector<index_t> const& plan, bool in_place) {
  double n = 0;
  for (index_t slot : plan) n += !in_place || slot >= p.capacity ? 1 : 0;
  return n;
}

void compact(benchmark::State& state, point const& p, bool in_place) {
  random_bits r{3};
  cache_shape const shape = shape_of(p, p.tokens);
  std::vector<layer_cache> from, to;
  std::vector<std::vector<index_t>> plans;
  for (int i = 0; i < 3; ++i) {
    with_type(p.type, [&](auto t) {
      from.emplace_back(t, shape, p.where, r);
      if (!in_place) to.emplace_back(t, shape_of(p, p.capacity), p.where, r);
    });
    plans.push_back(make_plan(p, r));
  }
  layer_slots slots(p.batch, p.kv_heads, p.tokens), packed(p.batch, p.kv_heads, p.capacity);
  std::vector<index_t> count(static_cast<std::size_t>(p.batch * p.kv_heads), p.capacity);
  double const bytes = 2.0 * p.dim * dtype_bytes(p.type) * moved_rows(p, plans[0], in_place);
  std::vector<std::byte> source(64'000'000 + static_cast<std::size_t>(bytes), std::byte{1});
  std::vector<std::byte> target(source.size(), std::byte{2});

  cpu::context ctx;
  op::compact<> o;
  o.batch.n = o.to_batch.n = p.batch;
  o.how = in_place ? op::move_kind::fill_holes : op::move_kind::pack;
  auto const set = [&](std::size_t turn) {
    o.from = {from[turn % 3].view, slots.view};
    o.to = in_place ? o.from : layer_ref<>{to[turn % 3].view, packed.view};
    o.plan = {row_major(plans[turn % 3].data(), p.batch, p.kv_heads, p.capacity),
              row_major(count.data(), p.batch, p.kv_heads)};
  };
  set(0);
  auto memory = scratch_for(ctx, o);
  meter m({bytes, 0});
  layer_slots const fresh = slots;
  std::size_t turn = 0, at = 0;
  for (auto _ : state) {
    set(turn++);
    slots.lengths = fresh.lengths;
    slots.positions = fresh.positions;
    workspace ws(memory);
    double const t = timed([&] { expect(run(ctx, o, ws), "compact"); });
    double const peer = timed([&] {
      std::memcpy(target.data() + at, source.data() + at, static_cast<std::size_t>(bytes));
    });
    at = (at + static_cast<std::size_t>(bytes) / 64 * 64) % 64'000'000;
    m.add(t, peer);
    state.SetIterationTime(t);
  }
  m.report(state);
}

void add(point const& p, bool in_place) {
  std::string const name = "compact" + named("T", p.tokens) + named("C", p.capacity) +
                           named("B", p.batch) + named("Hkv", p.kv_heads) + named("D", p.dim) +
                           "/" + kvkeep::to_string(p.type) + "/" + to_string(p.where) +
                           (in_place ? "/fill_holes" : "/pack");
  add_row(name, 200, [=](benchmark::State& s) { compact(s, p, in_place); });
}

}  // namespace
}  // namespace bench

int main(int argc, char** argv) {
  using namespace bench;
  for (bool in_place : {false, true}) {
    for (layout l : all_layouts) {
      point p = base;
      p.where = l;
      add(p, in_place);
    }
    for (dtype t : {dtype::bf16}) {
      point p = base;
      p.type = t;
      add(p, in_place);
    }
    for (index_t c : all_capacities) {
      point p = base;
      p.capacity = c;
      p.kv_heads = 4;
      add(p, in_place);
    }
  }
  return run_rows(argc, argv);
}
