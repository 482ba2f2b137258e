// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
// Decode attention (op::attend): plain, and with its weights folded into per-slot sums (H2O, TOVA). `attend_apart` is
// the first one without tickets: what follows the splits is a launch of its own.
#include <kvkeep/cuda.cuh>

#include "reference.hpp"
#include "suite.hpp"

namespace bench {
namespace {

enum class attention_kind { plain, folded, apart };

/// Caches of `p.capacity` slots and a query per head.
struct attention_case {
  point p;
  bool fold, tickets_given;
  rotated<std::byte> k, v;
  rotated<float> q, out, sums;
  rotated<index_t> lengths, positions, tickets;

  attention_case(suite& s, point const& shape, attention_kind kind, std::size_t sets)
      : p(shape),
        fold(kind == attention_kind::folded),
        tickets_given(kind != attention_kind::apart),
        k(sets, plane_bytes(p, p.capacity)),
        v(sets, k.per_set()) {
    auto const heads = product(p.batch, p.kv_heads), rows = heads * product(p.group);
    auto const slots = static_cast<std::size_t>(p.capacity);
    q = {sets, rows * product(p.dim)};
    out = {sets, rows * product(p.dim)};
    sums = {sets, heads * slots};
    tickets = {1, rows};
    lengths = {1, heads};
    positions = {1, heads * slots};
    std::size_t const n = k.size() / product(dtype_bytes(p.type));
    fill_random(s.ctx, k.data(), p.type, n, 8);
    fill_random(s.ctx, v.data(), p.type, n, 9);
    fill_queries(s.ctx, q, p.type, 10);
    fill(s.ctx, heads, counted{lengths.data(), p.capacity, 1});
    fill(s.ctx, positions.size(), counted{positions.data(), 0, p.capacity});
    fill(s.ctx, sums.size(), constant{sums.data(), 0});
    fill(s.ctx, rows, counted{tickets.data(), 0, 1});
    out.poison();
  }

  template <class At>
  auto op(At const& at) const {
    using space = typename At::space;
    index_t const q_heads = p.kv_heads * p.group;
    op::attend<space> o;
    o.batch.n = p.batch;
    o.layer.kv = cache_view<space>(p, p.capacity, at(k), at(v));
    o.layer.slots.lengths = row_major<space>(at(lengths), p.batch, p.kv_heads);
    o.layer.slots.positions = row_major<space>(at(positions), p.batch, p.kv_heads, p.capacity);
    o.q = row_major<space>(static_cast<float const*>(at(q)), p.batch, q_heads, p.dim);
    o.out = row_major<space>(at(out), p.batch, q_heads, p.dim);
    if (tickets_given) o.tickets = at(tickets);
    if (!fold) return o;
    o.fold.out = row_major<space>(at(sums), p.batch, p.kv_heads, 1, p.capacity);
    o.fold.scale = 1.0F / static_cast<float>(p.group);
    return o;
  }
};

void add_attend(suite& s, point const& p, attention_kind kind) {
  bool const fold = kind == attention_kind::folded;
  char const* const name = fold                            ? "attend_fold"
                           : kind == attention_kind::plain ? "attend"
                                                           : "attend_apart";
  add_device_row(
      s, name + named("C", p.capacity) + shape_name(p), [=](benchmark::State& state, suite& on) {
        auto const cache = static_cast<double>(2 * plane_bytes(p, p.capacity));
        rotation const r = rotate(cache, on.rotate_bytes, 8);
        attention_case const c(on, p, kind, r.sets);
        double const rows = 1.0 * p.batch * p.kv_heads * p.group;
        work w;
        w.read = cache + rows * p.dim * 4;
        w.moved = rows * p.dim * 4 + (fold ? 8.0 * p.batch * p.kv_heads * p.capacity : 0);
        (p.type == dtype::f32 ? w.fma : w.mma) = 4 * rows * p.capacity * p.dim;
        w.exps = rows * p.capacity;
        auto const memory = scratch_for(on.ctx, c.op(on_device{}));
        measure(
            state, on, w, r,
            [&](std::size_t set) {
              workspace ws = placed_in(memory);
              expect(run(on.ctx, c.op(on_device{set}), ws), "attend");
            },
            [&] { return written(c.out) ? "" : "some outputs were not written"; });
      });
}

void check_attend(suite& s, dtype type) {
  point p;
  p.batch = 2;
  p.kv_heads = 2;
  p.capacity = 300;
  p.type = type;
  attention_case const c(s, p, attention_kind::folded, 1);
  on_host const host;
  auto const cpu = c.op(host);
  run_on_cpu(cpu);
  run_once(s.ctx, c.op(on_device{}));
  check_same("attend", c.out.download(),
             std::vector<float>(cpu.out.data, cpu.out.data + c.out.per_set()), 1e-3);
  check_same("attend, sums", c.sums.download(),
             std::vector<float>(cpu.fold.out.data, cpu.fold.out.data + c.sums.per_set()), 1e-3);
}

void check_attention(suite& s) {
  for (dtype t : cache_types) check_attend(s, t);
}

void add_attention_rows(suite& s) {
  auto const with = [&](index_t c, index_t b, dtype t) {
    point p = base;
    p.capacity = c;
    p.batch = b;
    p.type = t;
    if (s.tiny) p.kv_heads = 1;
    return p;
  };
  if (s.tiny) {
    for (auto kind : {attention_kind::plain, attention_kind::folded, attention_kind::apart})
      add_attend(s, with(100, 2, dtype::bf16), kind);
    return;
  }
  for (index_t b : {1, 8, 64})
    for (index_t c : {512, 1024, 2048, 4096})
      for (auto kind : {attention_kind::plain, attention_kind::folded})
        add_attend(s, with(c, b, dtype::bf16), kind);
  for (index_t b : {1, 8, 64}) add_attend(s, with(1024, b, dtype::bf16), attention_kind::apart);
  for (dtype t : {dtype::f16, dtype::f32, dtype::e4m3})
    add_attend(s, with(1024, 8, t), attention_kind::plain);
}

parts_of_unit const attention({{"attention", add_attention_rows, check_attention}});

}  // namespace
}  // namespace bench
