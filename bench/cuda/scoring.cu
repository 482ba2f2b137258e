// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
// Scoring by query rows: SnapKV's window (op::column_sums of W rows), CAKE's (op::column_moments), H2O's prompt (of all
// rows), MorphKV's direct form (op::fused_rows). Where warpgroups multiply, rows window_mma and h2o_prompt_mma are what
// warps take for the same (KVKEEP_CUDA_SM90A; nobody has run either on a device yet, so the choice waits for these
// rows). They come first: should warpgroups fail, these figures are there.
#include <kvkeep/backend/cuda/window_plan.hpp>
#include <kvkeep/cuda.cuh>

#include "reference.hpp"
#include "suite.hpp"

namespace bench {
namespace {

/// Keys, the last `n_rows` queries of every head, and where scores go.
struct scoring_case {
  point p;
  index_t n_rows;
  bool given_lse;
  rotated<std::byte> k;
  rotated<float> q, lse, out;
  rotated<index_t> row_positions, lengths, positions;

  scoring_case(suite& s, point const& shape, index_t rows, bool lse_given, std::size_t sets)
      : p(shape), n_rows(rows), given_lse(lse_given), k(sets, plane_bytes(p, p.tokens)) {
    auto const heads = product(p.batch, p.kv_heads), queries = heads * product(p.group, rows);
    auto const slots = static_cast<std::size_t>(p.tokens);
    q = {sets, queries * product(p.dim)};
    lse = {1, queries};
    out = {sets, heads * slots};
    row_positions = {1, product(p.batch, rows)};
    lengths = {1, heads};
    positions = {sets, heads * slots};
    fill_random(s.ctx, k.data(), p.type, k.size() / product(dtype_bytes(p.type)), 2);
    fill_queries(s.ctx, q, p.type, 3);
    // Any value near the real log-sum-exp does: the work does not depend on it.
    fill(s.ctx, lse.size(), constant{lse.data(), std::log(static_cast<float>(p.tokens)) + 0.5F});
    fill(s.ctx, row_positions.size(), counted{row_positions.data(), p.tokens - rows, rows});
    fill(s.ctx, lengths.size(), counted{lengths.data(), p.tokens, 1});
    fill(s.ctx, positions.size(), counted{positions.data(), 0, p.tokens});
    out.poison();
  }

  /// What both ops share.
  template <class Op, class At>
  Op with_rows(At const& at) const {
    using space = typename Op::space;
    cache_shape const shape = shape_of(p, p.tokens);
    Op o;
    o.batch.n = p.batch;
    o.layer.kv = cache_view<space>(p, p.tokens, at(k), nullptr);
    o.layer.slots.lengths = row_major<space>(at(lengths), p.batch, p.kv_heads);
    o.layer.slots.positions = row_major<space>(at(positions), p.batch, p.kv_heads, p.tokens);
    o.rows.q =
        row_major<space>(static_cast<float const*>(at(q)), p.batch, shape.n_q_heads, n_rows, p.dim);
    o.rows.position =
        row_major<space>(static_cast<index_t const*>(at(row_positions)), p.batch, n_rows);
    return o;
  }
  template <class At>
  auto sums(At const& at) const {
    using space = typename At::space;
    auto o = with_rows<op::column_sums<space>>(at);
    if (given_lse)
      o.rows.lse = row_major<space>(static_cast<float const*>(at(lse)), p.batch,
                                    p.kv_heads * p.group, n_rows);
    o.out = row_major<space>(at(out), p.batch, p.kv_heads, 1, p.tokens);
    o.clear = true;
    return o;
  }
  template <class At>
  auto fused(At const& at) const {
    using space = typename At::space;
    auto o = with_rows<op::fused_rows<space>>(at);
    o.recent = p.window;
    o.fuse = reduction::sum;
    o.out = row_major<space>(at(out), p.batch, p.kv_heads, p.tokens);
    return o;
  }
};

/// The same with three moments per query head.
struct moments_case : scoring_case {
  rotated<float> moments;

  moments_case(suite& s, point const& shape, std::size_t sets)
      : scoring_case(s, shape, shape.window, false, sets) {
    moments = {sets, product(p.batch, p.kv_heads, rows(), p.tokens)};
    moments.poison();
  }
  index_t rows() const { return op::column_moments<>::moments * p.group; }
  template <class At>
  auto op_of(At const& at) const {
    using space = typename At::space;
    auto o = with_rows<op::column_moments<space>>(at);
    o.out = row_major<space>(at(moments), p.batch, p.kv_heads, rows(), p.tokens);
    return o;
  }
};

/// Which instructions multiply 16-bit keys: the op's choice, or warps in any case, as on an older device.
enum class products { chosen, warps };
cuda::context with_products(cuda::context ctx, products which) {
  if (which == products::warps) ctx.capability = 80;
  return ctx;
}
bool by_warpgroups(cuda::context const& ctx, point const& p) {
  return p.type != dtype::f32 && cuda::warpgroups_multiply(ctx.capability, p.dim);
}

/// @param pairs   of a query row and a visible key, per query head, over the batch
/// @param passes  1 with log-sum-exps, else 2
/// @param wide    how many of these warpgroups multiply
work work_of(point const& p, index_t n_rows, double pairs, double passes, double wide) {
  double const heads = 1.0 * p.batch * p.kv_heads;
  double const keys = heads * p.tokens * p.dim * dtype_bytes(p.type);
  work w;
  w.read = passes * keys + heads * p.group * n_rows * p.dim * 4;
  w.moved = heads * p.tokens * 4;
  double const flops = 2 * p.dim * pairs * p.kv_heads * p.group;
  w.wgmma = wide * flops;
  (p.type == dtype::f32 ? w.fma : w.mma) = (passes - wide) * flops;
  w.exps = passes * pairs * p.kv_heads * p.group;
  return w;
}

std::size_t set_bytes(point const& p, index_t n_rows) {
  return plane_bytes(p, p.tokens) + product(p.batch, p.kv_heads, p.group, n_rows, p.dim, 4);
}

template <class Op>
void measure_scores(benchmark::State& state, suite& s, rotated<float> const& out, work const& w,
                    rotation const& turns, Op const& op_of) {
  auto const memory = scratch_for(s.ctx, op_of(std::size_t{0}));
  measure(
      state, s, w, turns,
      [&](std::size_t set) {
        workspace ws = placed_in(memory);
        expect(run(s.ctx, op_of(set), ws), "scoring");
      },
      [&] { return written(out) ? "" : "some scores were not written"; });
}

void add_window(suite& s, point const& p, bool given_lse, products which = products::chosen) {
  char const* const kind = which == products::warps ? "window_mma" : "window";
  add_device_row(
      s,
      kind + named("T", p.tokens) + named("W", p.window) + shape_name(p) +
          (given_lse ? "/lse" : "/no_lse"),
      [=](benchmark::State& state, suite& any) {
        suite on = any;
        on.ctx = with_products(any.ctx, which);
        rotation const r = rotate(static_cast<double>(set_bytes(p, p.window)), on.rotate_bytes, 4);
        scoring_case const c(on, p, p.window, given_lse, r.sets);
        double const pairs = 1.0 * p.batch * p.window * p.tokens;
        bool const wide = by_warpgroups(on.ctx, p);
        double const passes = given_lse ? 1 : 2;
        measure_scores(state, on, c.out, work_of(p, p.window, pairs, passes, wide ? passes : 0), r,
                       [&](std::size_t set) { return c.sums(on_device{set}); });
        if (wide) state.counters["warpgroups"] = 1;
      });
}

/// All queries of a prompt, each of which sees the keys before it.
void add_prompt(suite& s, point const& p, products which = products::chosen) {
  char const* const kind = which == products::warps ? "h2o_prompt_mma" : "h2o_prompt";
  add_device_row(s, kind + named("T", p.tokens) + shape_name(p) + "/lse",
                 [=](benchmark::State& state, suite& any) {
                   suite on = any;
                   on.ctx = with_products(any.ctx, which);
                   rotation const r =
                       rotate(static_cast<double>(set_bytes(p, p.tokens)), on.rotate_bytes, 1);
                   scoring_case const c(on, p, p.tokens, true, r.sets);
                   double const pairs = 0.5 * p.batch * p.tokens * (p.tokens + 1.0);
                   bool const wide = by_warpgroups(on.ctx, p);
                   measure_scores(state, on, c.out, work_of(p, p.tokens, pairs, 1, wide ? 1 : 0), r,
                                  [&](std::size_t set) { return c.sums(on_device{set}); });
                   if (wide) state.counters["warpgroups"] = 1;
                 });
}

void add_fused(suite& s, point const& p) {
  add_device_row(s, "fused_rows" + named("T", p.tokens) + named("W", p.window) + shape_name(p),
                 [=](benchmark::State& state, suite& on) {
                   index_t const rows = p.window - 1;
                   rotation const r =
                       rotate(static_cast<double>(set_bytes(p, rows)), on.rotate_bytes, 1);
                   scoring_case const c(on, p, rows, false, r.sets);
                   double const pairs = 1.0 * p.batch * rows * (p.tokens - p.window);
                   double const wide = by_warpgroups(on.ctx, p) ? 1 : 0;  // log-sum-exps alone
                   measure_scores(state, on, c.out, work_of(p, rows, pairs, 2, wide), r,
                                  [&](std::size_t set) { return c.fused(on_device{set}); });
                 });
}

/// The floor is that of matrix products, which the op does without.
void add_moments(suite& s, point const& p) {
  add_device_row(s, "moments" + named("T", p.tokens) + named("W", p.window) + shape_name(p),
                 [=](benchmark::State& state, suite& on) {
                   rotation const r =
                       rotate(static_cast<double>(set_bytes(p, p.window)), on.rotate_bytes, 1);
                   moments_case const c(on, p, r.sets);
                   double const pairs = 1.0 * p.batch * p.window * p.tokens;
                   work w = work_of(p, p.window, pairs, 2, by_warpgroups(on.ctx, p) ? 2 : 0);
                   w.moved *= c.rows();
                   measure_scores(state, on, c.moments, w, r,
                                  [&](std::size_t set) { return c.op_of(on_device{set}); });
                 });
}

void check_case(suite& s, dtype type, bool given_lse, products which) {
  point p;
  p.tokens = 300;
  p.window = 8;
  p.kv_heads = 2;
  p.type = type;
  scoring_case const c(s, p, p.window, given_lse, 1);
  on_host host;
  auto const cpu = [&](auto const& o) {
    run_on_cpu(o);
    return std::vector<float>(o.out.data, o.out.data + c.out.per_set());
  };
  auto const sums = cpu(c.sums(host));
  cuda::context ctx = with_products(s.ctx, which);
  run_once(ctx, c.sums(on_device{}));
  check_same("column_sums", c.out.download(), sums, 1e-3);
  if (given_lse) return;
  auto const fused = cpu(c.fused(host));
  run_once(ctx, c.fused(on_device{}));
  check_same("fused_rows", c.out.download(), fused, 1e-3);
  moments_case const m(s, p, 1);
  auto const on_cpu = m.op_of(host);
  run_on_cpu(on_cpu);
  std::vector<float> const moments(on_cpu.out.data, on_cpu.out.data + m.moments.per_set());
  run_once(ctx, m.op_of(on_device{}));
  check_same("column_moments", m.moments.download(), moments, 1e-3);
}

void check_all(suite& s, products which) {
  for (dtype t : cache_types)
    for (bool lse : {true, false}) check_case(s, t, lse, which);
}

template <class F>
point point_with(suite const& s, F const& change) {
  point p = base;
  p.type = dtype::bf16;
  if (s.tiny) p.tokens = 100, p.kv_heads = 1, p.window = 8;
  change(p);
  return p;
}
void same(point&) {}

/// By warps, where warpgroups would do it.
void add_warp_rows(suite& s) {
  auto const with = [&](auto const& change) { return point_with(s, change); };
  if (!by_warpgroups(s.ctx, with(same))) return;
  if (s.tiny) {
    add_window(s, with(same), false, products::warps);
    return add_prompt(s, with(same), products::warps);
  }
  for (index_t w : {16, 32, 64})
    for (bool lse : {true, false})
      add_window(s, with([=](point& p) { p.tokens = 32768, p.window = w; }), lse, products::warps);
  add_prompt(s, with([](point& p) { p.tokens = 8192; }), products::warps);
}

void add_scoring_rows(suite& s) {
  auto const with = [&](auto const& change) { return point_with(s, change); };
  if (s.tiny) {
    for (bool lse : {true, false}) add_window(s, with(same), lse);
    add_prompt(s, with(same));
    add_moments(s, with(same));
    return add_fused(s, with(same));
  }
  for (index_t t : {8192, 32768, 131072})
    for (index_t w : {16, 32, 64})
      for (bool lse : {true, false})
        add_window(s, with([=](point& p) { p.tokens = t, p.window = w; }), lse);
  for (dtype t : {dtype::f16, dtype::f32, dtype::e4m3})
    add_window(s, with([=](point& p) { p.type = t; }), true);
  for (index_t b : {8, 64}) add_window(s, with([=](point& p) { p.batch = b; }), true);
  for (index_t t : {8192, 32768}) add_prompt(s, with([=](point& p) { p.tokens = t; }));
  for (index_t t : {8192, 32768}) add_moments(s, with([=](point& p) { p.tokens = t; }));
  for (index_t t : {1024, 8192, 32768}) add_fused(s, with([=](point& p) { p.tokens = t; }));
}

parts_of_unit const scoring(
    {{"scoring by warps", add_warp_rows, [](suite& s) { check_all(s, products::warps); }},
     {"scoring", add_scoring_rows, [](suite& s) { check_all(s, products::chosen); }, true}});

}  // namespace
}  // namespace bench
