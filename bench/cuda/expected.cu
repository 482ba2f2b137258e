// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
// ExpectedAttention's ops: moments of a prompt's queries, turned back (op::query_moments), and logits that are
// quadratic in a key (op::quadratic_logits). Their floors are those of fp32 arithmetic.
#include <algorithm>
#include <cmath>

#include <kvkeep/cuda.cuh>

#include "reference.hpp"
#include "suite.hpp"

namespace bench {
namespace {

/// Cosines and sines of any angles: [2, pair] in turns.
struct turned {
  float* out;
  index_t pairs;
  KVKEEP_HD void operator()(index_t i) const noexcept {
    float const x = static_cast<float>(i / (2 * pairs) % 17) / 17.0F, c = 1 - x * x;
    out[i] = i / pairs % 2 == 0 ? c : std::sqrt(1 - c * c);
  }
};

/// All queries of a prompt, and where their moments go.
struct query_case {
  point p;
  moment_layout layout;
  rotated<float> q, turns, to;
  rotated<index_t> positions;

  query_case(suite& s, point const& shape, std::size_t sets)
      : p(shape), layout{p.group, p.dim, true} {
    q = {sets, product(p.batch, p.kv_heads, p.group, p.tokens, p.dim)};
    turns = {1, product(p.batch, p.tokens, p.dim)};
    to = {sets, product(p.batch, p.kv_heads, layout.floats())};
    positions = {1, product(p.batch, p.tokens)};
    fill_queries(s.ctx, q, p.type, 3);
    fill(s.ctx, turns.size(), turned{turns.data(), p.dim / 2});
    fill(s.ctx, positions.size(), counted{positions.data(), 0, p.tokens});
    to.poison();
  }
  template <class At>
  auto op_of(At const& at) const {
    using space = typename At::space;
    op::query_moments<space> o;
    o.batch.n = p.batch;
    o.rows.q = row_major<space>(static_cast<float const*>(at(q)), p.batch, p.kv_heads * p.group,
                                p.tokens, p.dim);
    o.rows.position =
        row_major<space>(static_cast<index_t const*>(at(positions)), p.batch, p.tokens);
    o.first = 4;
    o.layout = layout;
    o.pairs = {p.dim, false};
    o.turns =
        row_major<space>(static_cast<float const*>(at(turns)), p.batch, p.tokens, 2, p.dim / 2);
    o.to = row_major<space>(at(to), p.batch, p.kv_heads, layout.floats());
    return o;
  }
  /// What the op defines of moments.
  std::vector<float> defined(std::vector<float> moments) const {
    std::vector<float> r;
    for (std::size_t h = 0; h < product(p.batch, p.kv_heads); ++h) {
      float* const head = moments.data() + h * product(layout.floats());
      r.push_back(head[0]);
      for (index_t g = 0; g < p.group; ++g) {
        r.insert(r.end(), layout.mean(head, g), layout.mean(head, g) + p.dim);
        for (index_t d = 0; d < p.dim; ++d)
          r.insert(r.end(), layout.spread(head, g, d), layout.spread(head, g, d) + d + 1);
      }
    }
    return r;
  }
  bool complete(std::size_t set) const {
    auto const all = defined(to.download(set));
    return std::all_of(all.begin(), all.end(), [](float x) { return std::isfinite(x); });
  }
  work needs() const {
    double const rows = 1.0 * p.batch * p.kv_heads * p.group * p.tokens;
    work w;
    w.read = 4 * rows * p.dim;
    w.moved = 4.0 * static_cast<double>(to.per_set()) / 2;
    w.fma = rows * p.dim * (p.dim + 1.0);
    return w;
  }
};

/// Keys, a form per query head, and where logits go.
struct form_case {
  point p;
  rotated<std::byte> k;
  rotated<float> form, out;
  rotated<index_t> lengths, positions;

  form_case(suite& s, point const& shape, std::size_t sets)
      : p(shape), k(sets, plane_bytes(p, p.tokens)) {
    auto const heads = product(p.batch, p.kv_heads), rows = product(heads, p.group);
    form = {1, rows * product(p.dim, p.dim + 1)};
    out = {sets, rows * product(p.tokens)};
    lengths = {1, heads};
    positions = {1, heads * product(p.tokens)};
    fill_random(s.ctx, k.data(), p.type, k.size() / product(dtype_bytes(p.type)), 2);
    fill_random(s.ctx, form.data(), dtype::f32, form.size(), 5);
    fill(s.ctx, form.size(), triangle{form.data(), p.dim});
    fill(s.ctx, lengths.size(), counted{lengths.data(), p.tokens, 1});
    fill(s.ctx, positions.size(), counted{positions.data(), 0, p.tokens});
    out.poison();
  }
  /// What lies above the diagonal of a form is 0.
  struct triangle {
    float* form;
    index_t dim;
    KVKEEP_HD void operator()(index_t i) const noexcept {
      if (i % (dim + 1) > 1 + i / (dim + 1) % dim) form[i] = 0;
    }
  };
  template <class At>
  auto op_of(At const& at) const {
    using space = typename At::space;
    index_t const heads = p.kv_heads * p.group;
    op::quadratic_logits<space> o;
    o.batch.n = p.batch;
    o.layer.kv = cache_view<space>(p, p.tokens, at(k), nullptr);
    o.layer.slots.lengths = row_major<space>(at(lengths), p.batch, p.kv_heads);
    o.layer.slots.positions = row_major<space>(at(positions), p.batch, p.kv_heads, p.tokens);
    o.form =
        row_major<space>(static_cast<float const*>(at(form)), p.batch, heads, p.dim, p.dim + 1);
    o.out = row_major<space>(at(out), p.batch, heads, p.tokens);
    return o;
  }
  bool complete(std::size_t) const { return written(out); }
  work needs() const {
    double const logits = 1.0 * p.batch * p.kv_heads * p.group * p.tokens;
    work w;
    w.read = static_cast<double>(plane_bytes(p, p.tokens)) + 2.0 * static_cast<double>(form.size());
    w.moved = 4 * logits;
    w.fma = logits * p.dim * (p.dim + 3.0);
    return w;
  }
};

template <class Case>
void add_case(suite& s, char const* kind, point const& p) {
  add_device_row(
      s, kind + named("T", p.tokens) + shape_name(p), [=](benchmark::State& state, suite& on) {
        work const w = Case(on, p, 1).needs();
        rotation const r = rotate(w.bytes(), on.rotate_bytes, 1);
        Case const c(on, p, r.sets);
        auto const memory = scratch_for(on.ctx, c.op_of(on_device{}));
        measure(
            state, on, w, r,
            [&](std::size_t set) {
              workspace ws = placed_in(memory);
              expect(run(on.ctx, c.op_of(on_device{set}), ws), kind);
            },
            [&] { return c.complete(r.sets - 1) ? "" : "some numbers were not written"; });
      });
}

void check_all(suite& s) {
  point p;
  p.tokens = 300;
  p.kv_heads = 2;
  p.group = 2;
  p.dim = 72;
  query_case const m(s, p, 1);
  on_host host;
  auto const moments = m.op_of(host);
  run_on_cpu(moments);
  run_once(s.ctx, m.op_of(on_device{}));
  std::vector<float> const cpu(moments.to.data, moments.to.data + m.to.per_set());
  check_same("query_moments", m.defined(m.to.download()), m.defined(cpu), 2e-2);
  for (dtype t : cache_types) {
    p.type = t;
    form_case const c(s, p, 1);
    auto const logits = c.op_of(host);
    run_on_cpu(logits);
    run_once(s.ctx, c.op_of(on_device{}));
    check_same("quadratic_logits", c.out.download(),
               std::vector<float>(logits.out.data, logits.out.data + c.out.per_set()), 1e-1);
  }
}

void add_expected_rows(suite& s) {
  for (index_t t : s.tiny ? std::vector<index_t>{100} : std::vector<index_t>{8192, 32768}) {
    point p = base;
    p.type = dtype::bf16;
    p.tokens = t;
    if (s.tiny) p.kv_heads = 1, p.dim = 16;
    add_case<query_case>(s, "query_moments", p);
    add_case<form_case>(s, "quadratic_logits", p);
  }
}

parts_of_unit const expected({{"expected attention", add_expected_rows, check_all}});

}  // namespace
}  // namespace bench
