// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
// Selection (op::select_k) and the move that follows a cut (op::compact, out of place).
#include <kvkeep/cuda.cuh>

#include "reference.hpp"
#include "suite.hpp"

namespace bench {
namespace {

/// Scores of `p.batch` entries with `p.kv_heads` rows each, of which `p.capacity` slots stay.
struct choice_case {
  point p;
  rotated<float> values;
  rotated<index_t> lengths, positions, k, kept, count;

  choice_case(suite& s, point const& shape, std::size_t sets) : p(shape) {
    auto const rows = product(p.batch, p.kv_heads), slots = static_cast<std::size_t>(p.tokens);
    values = {sets, rows * slots};
    positions = {sets, rows * slots};
    lengths = {1, rows};
    k = {1, rows};
    kept = {sets, rows * slots};
    count = {sets, rows};
    fill(s.ctx, values.size(), score_numbers{values.data(), p.values, 5});
    fill(s.ctx, positions.size(), counted{positions.data(), 0, p.tokens});
    fill(s.ctx, rows, counted{lengths.data(), p.tokens, 1});
    fill(s.ctx, rows, counted{k.data(), p.capacity, 1});
    kept.poison();
    count.poison();
  }

  template <class At>
  auto op(At const& at) const {
    using space = typename At::space;
    op::select_k<space> o;
    o.batch.n = p.batch;
    o.slots.lengths = row_major<space>(at(lengths), p.batch, p.kv_heads);
    o.slots.positions = row_major<space>(at(positions), p.batch, p.kv_heads, p.tokens);
    o.scores =
        row_major<space>(static_cast<float const*>(at(values)), p.batch, p.kv_heads, p.tokens);
    o.k = row_major<space>(static_cast<index_t const*>(at(k)), p.batch, p.kv_heads);
    o.guard.recent = p.window;
    o.out.slots = row_major<space>(at(kept), p.batch, p.kv_heads, p.tokens);
    o.out.count = row_major<space>(at(count), p.batch, p.kv_heads);
    return o;
  }

  /// Plans of all sets: as many slots as asked for, ascending, with the protected ones.
  std::string fault() const {
    std::vector<index_t> const n = count.download(), slots = kept.download();
    auto const stride = static_cast<std::size_t>(p.tokens);
    for (std::size_t row = 0; row < n.size(); ++row) {
      if (n[row] != p.capacity) return "a plan does not keep what was asked for";
      index_t const* const first = slots.data() + row * stride;
      for (index_t i = 0; i < p.capacity; ++i)
        if (first[i] < (i > 0 ? first[i - 1] + 1 : 0) || first[i] >= p.tokens)
          return "a plan is not ascending";
      if (first[p.capacity - p.window] != p.tokens - p.window) return "a protected slot is gone";
    }
    return "";
  }
};

void add_select(suite& s, point const& p) {
  std::string const name = "select_k/rows:" + std::to_string(p.batch * p.kv_heads) +
                           named("n", p.tokens) + named("k", p.capacity) + "/" +
                           to_string(p.values);
  add_device_row(s, name, [=](benchmark::State& state, suite& on) {
    double const all = 1.0 * p.batch * p.kv_heads * p.tokens;
    rotation const r = rotate(8 * all, on.rotate_bytes, 8);
    choice_case const c(on, p, r.sets);
    work w;
    w.read = 8 * all;
    w.moved = 4.0 * p.batch * p.kv_heads * p.capacity;
    workspace none(std::span<std::byte>{});
    measure(
        state, on, w, r,
        [&](std::size_t set) { expect(run(on.ctx, c.op(on_device{set}), none), "select_k"); },
        [&] { return c.fault(); });
  });
}

/// A prompt of `p.tokens` cut to `p.capacity` slots of another cache: K, V and positions.
struct move_case {
  choice_case plan;
  point p;
  rotated<std::byte> k, v, to_k, to_v;
  rotated<index_t> to_lengths, to_positions;

  move_case(suite& s, point const& shape, std::size_t sets)
      : plan(s, shape, sets), p(shape), k(sets, plane_bytes(p, p.tokens)), v(sets, k.per_set()) {
    auto const heads = product(p.batch, p.kv_heads);
    std::size_t const to = plane_bytes(p, p.capacity);
    to_k = {sets, to};
    to_v = {sets, to};
    to_lengths = {sets, heads};
    to_positions = {sets, heads * product(p.capacity)};
    std::size_t const n = k.size() / product(dtype_bytes(p.type));
    fill_random(s.ctx, k.data(), p.type, n, 6);
    fill_random(s.ctx, v.data(), p.type, n, 7);
    to_k.poison();
    to_v.poison();
    to_lengths.poison();
    to_positions.poison();
    workspace none(std::span<std::byte>{});
    for (std::size_t set = 0; set < sets; ++set)
      expect(run(s.ctx, plan.op(on_device{set}), none), "the plan of a move");
    wait_for(s.ctx.stream);
  }

  template <class At>
  auto op(At const& at) const {
    using space = typename At::space;
    op::compact<space> o;
    auto const chosen = plan.op(at);
    o.batch.n = o.to_batch.n = p.batch;
    o.from.kv = cache_view<space>(p, p.tokens, at(k), at(v));
    o.from.slots = chosen.slots;
    o.to.kv = cache_view<space>(p, p.capacity, at(to_k), at(to_v));
    o.to.slots.lengths = row_major<space>(at(to_lengths), p.batch, p.kv_heads);
    o.to.slots.positions = row_major<space>(at(to_positions), p.batch, p.kv_heads, p.capacity);
    o.plan = chosen.out;
    return o;
  }
};

void add_compact(suite& s, point const& p) {
  add_device_row(
      s, "compact" + named("T", p.tokens) + named("C", p.capacity) + shape_name(p),
      [=](benchmark::State& state, suite& on) {
        auto const touched = static_cast<double>(2 * plane_bytes(p, p.capacity));
        rotation const r = rotate(2 * touched, on.rotate_bytes, 8);
        move_case const c(on, p, r.sets);
        work w;
        w.moved = 2 * touched + 12.0 * p.batch * p.kv_heads * p.capacity;
        workspace none(std::span<std::byte>{});
        measure(
            state, on, w, r,
            [&](std::size_t set) { expect(run(on.ctx, c.op(on_device{set}), none), "compact"); },
            [&] {
              bool const all = written(c.to_lengths) && written(c.to_positions);
              return all ? "" : "some slots were not written";
            });
      });
}

void check_selection(suite& s, scores kind) {
  point p;
  p.batch = 2;
  p.kv_heads = 2;
  p.tokens = 700;
  p.capacity = 100;
  p.window = 8;
  p.values = kind;
  choice_case const c(s, p, 1);
  on_host const host;
  auto const cpu = c.op(host);
  run_on_cpu(cpu);
  run_once(s.ctx, c.op(on_device{}));
  if (std::string const what = c.fault(); !what.empty())
    throw std::runtime_error("select_k: " + what);
  auto const kept = c.kept.download();
  for (index_t b = 0; b < p.batch; ++b)
    for (index_t h = 0; h < p.kv_heads; ++h) {
      auto const first = kept.begin() + cpu.out.slots.offset(b, h);
      index_t const* const row = cpu.out.slots.at(b, h);
      check_same("select_k", std::vector<index_t>(first, first + p.capacity),
                 std::vector<index_t>(row, row + p.capacity));
    }
}

void check_move(suite& s) {
  point p;
  p.kv_heads = 2;
  p.tokens = 300;
  p.capacity = 50;
  p.window = 8;
  p.type = dtype::bf16;
  move_case const c(s, p, 1);
  on_host const host;
  auto const cpu = c.op(host);
  run_on_cpu(cpu);
  run_once(s.ctx, c.op(on_device{}));
  auto const rows = [&](std::byte const* from) {
    std::vector<float> values(product(p.kv_heads, p.capacity, p.dim));
    for (std::size_t i = 0; i < values.size(); ++i)
      values[i] = to_float(reinterpret_cast<bf16 const*>(from)[i]);
    return values;
  };
  check_same("compact, K", rows(c.to_k.download().data()), rows(cpu.to.kv.k.data));
  check_same("compact, V", rows(c.to_v.download().data()), rows(cpu.to.kv.v.data));
  index_t const* const at = cpu.to.slots.positions.data;
  check_same("compact, positions", c.to_positions.download(),
             std::vector<index_t>(at, at + c.to_positions.per_set()));
}

template <class F>
point point_with(F const& change) {
  point p = base;
  p.type = dtype::bf16;
  change(p);
  return p;
}
point tiny_point() {
  return point_with(
      [](point& p) { p.tokens = 200, p.capacity = 40, p.window = 8, p.kv_heads = 2; });
}

void add_selection_rows(suite& s) {
  if (s.tiny) return add_select(s, tiny_point());
  auto const with = [](auto const& change) { return point_with(change); };
  for (scores kind : all_scores) add_select(s, with([=](point& p) { p.values = kind; }));
  for (index_t n : {32768, 131072}) add_select(s, with([=](point& p) { p.tokens = n; }));
  for (index_t n : {8192, 32768})
    add_select(s, with([=](point& p) { p.batch = 32, p.tokens = n; }));
}

void add_move_rows(suite& s) {
  if (s.tiny) return add_compact(s, tiny_point());
  auto const with = [](auto const& change) { return point_with(change); };
  for (index_t c : {512, 1024, 2048, 4096}) add_compact(s, with([=](point& p) { p.capacity = c; }));
  add_compact(s, with([](point& p) { p.tokens = 131072; }));
  add_compact(s, with([](point& p) { p.batch = 8; }));
}

parts_of_unit const choice({{"selection", add_selection_rows,
                             [](suite& s) {
                               for (scores kind : all_scores) check_selection(s, kind);
                             }},
                            {"moves", add_move_rows, check_move}});

}  // namespace
}  // namespace bench
