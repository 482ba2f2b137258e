// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
// Window scoring (op::column_sums): W queries of each head of a group against T keys, with and
// without given log-sum-exps. Floor: the fused multiply-adds of Q K^T, or reading K once.
#include "inputs.hpp"

namespace bench {
namespace {

/// Rotated inputs: caches and queries of some layers.
struct inputs {
  std::vector<layer_cache> caches;
  std::vector<std::vector<float>> queries;
};

inputs make_inputs(point const& p, cache_shape const& shape) {
  random_bits r{7};
  inputs in;
  double const bytes = 2.0 * p.batch * p.kv_heads * p.tokens * p.dim * dtype_bytes(p.type);
  auto const n = static_cast<std::size_t>(std::clamp(80e6 / bytes, 2.0, 12.0));
  for (std::size_t i = 0; i < n; ++i) {
    with_type(p.type, [&](auto t) { in.caches.emplace_back(t, shape, p.where, r); });
    in.queries.push_back(random_rows<float>(product(p.batch, shape.n_q_heads, p.window, p.dim), r));
  }
  return in;
}

void window_score(benchmark::State& state, point const& p, bool given_lse) {
  cache_shape const shape = shape_of(p, p.tokens);
  inputs const in = make_inputs(p, shape);
  layer_slots const slots(p.batch, p.kv_heads, p.tokens);
  std::vector<index_t> rows(static_cast<std::size_t>(p.batch * p.window));
  for (std::size_t i = 0; i < rows.size(); ++i)
    rows[i] = p.tokens - p.window + static_cast<index_t>(i) % p.window;
  // Any value near the real log-sum-exp does: the work does not depend on it.
  std::vector<float> const lse(rows.size() * static_cast<std::size_t>(shape.n_q_heads),
                               std::log(static_cast<float>(p.tokens)) + 0.5F);
  std::vector<float> out(product(p.batch, p.kv_heads, p.tokens));

  cpu::context ctx;
  op::column_sums<> o;
  o.batch.n = p.batch;
  o.layer = {in.caches[0].view, slots.view};
  o.rows.q = row_major(in.queries[0].data(), p.batch, shape.n_q_heads, p.window, p.dim);
  o.rows.position = row_major(static_cast<index_t const*>(rows.data()), p.batch, p.window);
  if (given_lse) o.rows.lse = row_major(lse.data(), p.batch, shape.n_q_heads, p.window);
  o.out = row_major(out.data(), p.batch, p.kv_heads, 1, p.tokens);
  o.clear = true;
  auto memory = scratch_for(ctx, o);

  double const keys = 1.0 * p.batch * p.kv_heads * p.tokens;
  work const w{keys * p.dim * dtype_bytes(p.type), 2 * keys * p.group * p.window * p.dim};
  meter m(w);
  std::size_t turn = 0;
  for (auto _ : state) {
    o.layer.kv = in.caches[turn % in.caches.size()].view;
    o.rows.q.data = in.queries[turn++ % in.queries.size()].data();
    workspace ws(memory);
    double const t = timed([&] { expect(run(ctx, o, ws), "column_sums"); });
    m.add(t, 0);
    state.SetIterationTime(t);
  }
  m.report(state);
}

void add(point const& p, bool given_lse) {
  std::string const name = "window_score" + named("T", p.tokens) + named("W", p.window) +
                           named("B", p.batch) + named("Hkv", p.kv_heads) + named("G", p.group) +
                           named("D", p.dim) + "/" + kvkeep::to_string(p.type) + "/" +
                           to_string(p.where) + (given_lse ? "/lse" : "/no_lse");
  add_row(name, p.tokens * p.kv_heads > 2 * 8192 ? 15 : 60,
          [=](benchmark::State& s) { window_score(s, p, given_lse); });
}

}  // namespace
}  // namespace bench

int main(int argc, char** argv) {
  using namespace bench;
  auto const vary = [](auto change) {
    point p = base;
    p.kv_heads = 2;  // heads do not share work
    change(p);
    add(p, true);
    return p;
  };
  for (index_t t : all_tokens) add(vary([=](point& p) { p.tokens = t; }), false);
  for (index_t w : all_windows) vary([=](point& p) { p.window = w; });
  for (index_t g : all_groups) vary([=](point& p) { p.group = g; });
  for (index_t d : all_dims) vary([=](point& p) { p.dim = d; });
  for (dtype t : all_types) vary([=](point& p) { p.type = t; });
  for (layout l : all_layouts) vary([=](point& p) { p.where = l; });
  add(vary([](point& p) { p.kv_heads = 8; }), false);
  return run_rows(argc, argv);
}
