// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// Ops of a backend alone, over arrays of its memory.
#pragma once

#include <kvkeep/budget/apportion.hpp>
#include <kvkeep/op/layer_counts.hpp>
#include <kvkeep/op/select_k.hpp>

#include <numeric>

#include "backend.hpp"

namespace kvkeep::replay {

/// Memory that a backend's ops read and write, and the host between them.
/// @tparam B  a machine: `context ctx`, `allocator<T>`, `wait()`
template <class B, class T>
using array_on = std::vector<T, typename B::template allocator<T>>;
template <class B>
using space_on = space_of<typename B::context>;

template <class B, class T>
array_on<B, T> copy_on(T const* from, std::size_t n) {
  return from == nullptr ? array_on<B, T>{} : array_on<B, T>(from, from + n);
}

/// Measures the scratch of `f(workspace&)`, runs it and waits.
template <class B, class F>
void run_measured(B& b, char const* call, F&& f) {
  workspace counting;
  expect(f(counting), call);
  array_on<B, std::byte> memory(counting.peak() + workspace::alignment);
  workspace placed(std::span<std::byte>(memory.data(), memory.size()));
  expect(f(placed), call);
  b.wait();
}

template <class B>
std::vector<index_t> counts_on(B& b, joint_scores const& s) {
  array_on<B, index_t> out(product(s.n_maps, s.n_seq, s.n_heads));
  array_on<B, index_t> const candidates(product(s.n_seq, s.n_heads), s.candidates);
  auto const scores = copy_on<B>(s.data, product(s.n_maps, s.n_seq, s.n_heads, s.slots));
  using space = space_on<B>;
  op::layer_counts<space> o;
  o.batch.n = s.n_seq;
  o.n_maps = s.n_maps;
  o.scores = row_major<space>(scores.data(), s.n_maps, s.n_seq, s.n_heads, s.slots);
  o.candidates = row_major<space>(candidates.data(), s.n_seq, s.n_heads);
  o.best_per_head = s.best_per_head;
  o.normalize = s.normalize;
  o.out = row_major<space>(out.data(), s.n_maps, s.n_seq, s.n_heads);
  run_measured(b, "layer_counts", [&](workspace& w) { return run(b.ctx, o, w); });
  return {out.begin(), out.end()};
}

template <class B>
int_rows dynamic_on(B& b, dynamic_layers const& budget, index_t window, joint_scores const& s) {
  using space = space_on<B>;
  auto const scores = copy_on<B>(s.data, product(s.n_maps, s.n_heads, s.slots));
  array_on<B, index_t> kept(product(s.n_maps, s.n_heads));
  int_rows history;
  for (index_t l = 0; l < s.n_maps; ++l) {
    budget_input<space> in;
    in.n_layers = s.n_maps;
    in.layer = l;
    in.n_kv_heads = s.n_heads;
    in.tokens = s.candidates + window;
    in.recent = window;
    in.scores = row_major<space>(scores.data(), s.n_maps, 1, s.n_heads, s.slots);
    in.k = row_major<space>(kept.data(), s.n_maps, s.n_heads);
    run_measured(b, "allocate", [&](workspace& w) { return budget.allocate(b.ctx, in, w); });
    history.emplace_back(kept.begin(), kept.end());
  }
  return history;
}

template <class B>
std::vector<index_t> pyramid_on(B& b, pyramid const& budget, index_t n_layers, index_t window,
                                index_t tokens) {
  array_on<B, index_t> kept(uz(n_layers));
  for (index_t l = 0; l < n_layers; ++l) {
    budget_input<space_on<B>> in{n_layers, l, 1, tokens, 0, window, {}, {}};
    in.k = row_major<space_on<B>>(kept.data(), n_layers, 1);
    run_measured(b, "allocate", [&](workspace& w) { return budget.allocate(b.ctx, in, w); });
  }
  return {kept.begin(), kept.end()};
}

/// One row of `splits`; index: row.
struct split_row {
  splits s;
  index_t* out;         ///< [row, width]
  offset_t* remainder;  ///< [row, width]
  KVKEEP_HD void operator()(index_t i) const noexcept {
    offset_t const at = static_cast<offset_t>(i) * s.width;
    apportion(s.total[i], s.weight + at, s.cap + at, s.parts[i], out + at, remainder + at);
  }
};

template <class B>
int_rows parts_on(B& b, splits s) {
  std::size_t const all = product(s.rows, s.width);
  auto const total = copy_on<B>(s.total, uz(s.rows)), parts = copy_on<B>(s.parts, uz(s.rows));
  auto const weight = copy_on<B>(s.weight, all), cap = copy_on<B>(s.cap, all);
  array_on<B, index_t> out(all);
  array_on<B, offset_t> remainder(all);
  s = {s.rows, s.width, total.data(), parts.data(), weight.data(), cap.data()};
  op::for_each<split_row, space_on<B>> const o{s.rows, {s, out.data(), remainder.data()}};
  run_measured(b, "for_each", [&](workspace& w) { return run(b.ctx, o, w); });
  int_rows rows;
  for (index_t r = 0; r < s.rows; ++r) {
    index_t const* const row = out.data() + offset_t{r} * s.width;
    rows.emplace_back(row, row + parts[uz(r)]);
  }
  return rows;
}

template <class B>
int_rows select_on(B& b, float const* scores, index_t const* k, index_t rows, index_t n) {
  using space = space_on<B>;
  array_on<B, index_t> positions(product(rows, n)), slots(product(rows, n)), count(uz(rows)),
      length(uz(rows), n);
  auto const wanted = copy_on<B>(k, uz(rows));
  auto const values = copy_on<B>(scores, product(rows, n));
  for (std::size_t i = 0; i < positions.size(); ++i) positions[i] = static_cast<index_t>(i % uz(n));
  op::select_k<space> o;
  o.batch.n = rows;
  o.slots = {
      row_major<space>(length.data(), rows, 1), row_major<space>(positions.data(), rows, 1, n), {}};
  o.scores = row_major<space>(values.data(), rows, 1, n);
  o.k = row_major<space>(wanted.data(), rows, 1);
  o.out = {row_major<space>(slots.data(), rows, 1, n), row_major<space>(count.data(), rows, 1)};
  run_measured(b, "select_k", [&](workspace& w) { return run(b.ctx, o, w); });
  int_rows kept;
  for (index_t r = 0; r < rows; ++r) {
    index_t const* const row = slots.data() + offset_t{r} * n;
    kept.emplace_back(row, row + count[uz(r)]);
  }
  return kept;
}

}  // namespace kvkeep::replay
