// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
// Every op of the CPU backend once per layout, element type and thread count, against plain loops.
#include <kvkeep/backend/cpu/cpu.hpp>
#include <kvkeep/view/kv_view.hpp>

#include <cmath>
#include <numeric>
#include <random>

#include "../support/catch.hpp"

namespace {

using namespace kvkeep;

enum class kind { hnd, nhd, paged, ragged, tiled };

constexpr index_t n_seq = 3, n_id = 4, hkv = 2, group = 3, hq = hkv * group, dk = 20, dv = 13,
                  slots = 70;
constexpr cache_shape shape{n_seq, hq, hkv, dk, dv, slots};
constexpr index_t rows[2] = {2, 0}, ids[2] = {1, 3};
constexpr index_t lengths_of[2][hkv] = {{70, 37}, {5, 0}};

std::size_t uz(offset_t i) { return static_cast<std::size_t>(i); }

/// A cache of type T in some layout, and its values as doubles by (seq, head, slot, feature).
template <class T>
struct cache {
  std::vector<T> k, v;
  std::vector<index_t> table, room;
  std::vector<offset_t> k_base, v_base;
  kv_ref<> kv;

  explicit cache(kind layout) : k(uz(n_seq * hkv * 100 * dk)), v(uz(n_seq * hkv * 100 * dv)) {
    kv.shape = shape;
    kv.scale = 0.3F;
    kv.softcap = 20;
    init(kv.k, k, dk);
    init(kv.v, v, dv);
    for (index_t i = 0; i < n_seq * 9; ++i) table.push_back((i * 7 + 3) % 27);
    for (index_t i = 0; i < n_seq * hkv; ++i) {
      room.push_back(slots);
      k_base.push_back((n_seq * hkv - 1 - i) * slots * dk);
      v_base.push_back((n_seq * hkv - 1 - i) * slots * dv);
    }
    page_geometry pages;
    pages.block_size = 8;
    pages.n_blocks = 27;
    pages.table = table.data();
    pages.blocks_per_table = 9;
    auto const set = [&](plane_ref<>& p, index_t dim, offset_t const* base) {
      if (layout == kind::paged)
        p.layout = make_paged_layout(shape, dim, pages);
      else if (layout == kind::ragged)
        p.layout = ragged_layout{base, room.data(), hkv, dim};
      else
        p.layout =
            contiguous_layout(shape, dim, layout == kind::nhd ? axis_order::nhd : axis_order::hnd);
      if (layout == kind::tiled) {  // transposed: features lie a slot count apart
        p.layout.strided.slot_stride = 1;
        p.features.inner = slots;
      }
    };
    set(kv.k, dk, k_base.data());
    set(kv.v, dv, v_base.data());
  }
  cache(cache const&) = delete;

  static void init(plane_ref<>& p, std::vector<T>& data, index_t dim) {
    p.data = reinterpret_cast<std::byte*>(data.data());
    p.type = dtype_of<T>::value;
    p.dim = dim;
    p.row_bytes = dim * static_cast<index_t>(sizeof(T));
  }
  static T& cell(plane_ref<> const& p, index_t s, index_t h, index_t j, index_t d) {
    offset_t const at = visit_layout(p.layout, [&](auto const& l) { return l.offset(s, h, j); });
    return reinterpret_cast<T*>(p.data)[at + p.features(d)];
  }
  double key(index_t s, index_t h, index_t j, index_t d) const {
    return static_cast<double>(to_float(cell(kv.k, s, h, j, d)));
  }
  double value(index_t s, index_t h, index_t j, index_t d) const {
    return static_cast<double>(to_float(cell(kv.v, s, h, j, d)));
  }
  static void put(T& to, float x) {
    if constexpr (std::is_same_v<T, float>)
      to = x;
    else if constexpr (std::is_same_v<T, fp16>)
      to = to_fp16(x);
    else
      to = to_bf16(x);
  }
};

/// State, inputs and outputs around a cache.
template <class T>
struct bench : cache<T> {
  std::mt19937 random{7};
  std::vector<index_t> length, position, k_of, plan, plan_count, victim, row_position;
  std::vector<float> state, q, scores, out, ring, sums;
  layer_ref<> layer;
  batch_ref<> batch{2, rows, ids};
  cpu::thread_pool pool;
  cpu::context ctx;

  bench(kind l, bool shuffled, int threads)
      : cache<T>(l),
        length(n_id * hkv),
        position(uz(n_id * hkv * slots)),
        state(uz(n_id * hkv * 2 * slots)),
        q(uz(n_id * hq * 6 * dk)),
        scores(uz(2 * hkv * slots)),
        out(uz(n_id * hq * slots)),
        pool(threads) {
    if (threads > 1) ctx.pool = &pool;
    for (index_t s = 0; s < n_seq; ++s)
      for (index_t h = 0; h < hkv; ++h)
        for (index_t j = 0; j < slots; ++j) {
          for (index_t d = 0; d < dk; ++d)
            cache<T>::put(this->cell(this->kv.k, s, h, j, d), noise());
          for (index_t d = 0; d < dv; ++d)
            cache<T>::put(this->cell(this->kv.v, s, h, j, d), noise());
        }
    for (auto* x : {&q, &scores, &state})
      for (float& e : *x) e = noise();
    layer.kv = this->kv;
    layer.slots.lengths = row_major(length.data(), n_id, hkv);
    layer.slots.positions = row_major(position.data(), n_id, hkv, slots);
    layer.slots.rows = row_major(state.data(), n_id, hkv, 2, slots);
    for (index_t b = 0; b < 2; ++b)
      for (index_t h = 0; h < hkv; ++h) {
        index_t* p = &layer.slots.positions(ids[b], h, 0);
        layer.slots.lengths(ids[b], h) = lengths_of[b][h];
        for (index_t j = 0; j < slots; ++j) p[j] = 2 * j + (j > 50);
        if (shuffled) std::shuffle(p, p + lengths_of[b][h], random);
      }
  }
  float noise() { return std::normal_distribution<float>(0, 1)(random); }
  index_t n(index_t b, index_t h) const { return lengths_of[b][h]; }
  index_t pos(index_t b, index_t h, index_t j) const { return layer.slots.positions(ids[b], h, j); }
  /// Rank among live positions, from below.
  index_t rank(index_t b, index_t h, index_t j) const {
    index_t r = 0;
    for (index_t i = 0; i < n(b, h); ++i) r += pos(b, h, i) < pos(b, h, j);
    return r;
  }
  bool old(index_t b, index_t h, index_t j, index_t recent) const {
    return rank(b, h, j) < n(b, h) - recent;
  }
  double logit(float const* query, index_t b, index_t h, index_t j) const {
    double z = 0;
    for (index_t d = 0; d < dk; ++d)
      z += static_cast<double>(query[d]) * this->key(rows[b], h, j, d);
    return 20 * std::tanh(z * 0.3F / 20);
  }
  /// Probabilities over the slots for which `see(j)` holds; `lse` gets the normaliser's logarithm.
  template <class See>
  std::vector<double> probs(float const* query, index_t b, index_t h, See see,
                            double* lse = nullptr) const {
    std::vector<double> p(slots, 0.0);
    double sum = 0;
    for (index_t j = 0; j < n(b, h); ++j)
      if (see(j)) sum += p[uz(j)] = std::exp(logit(query, b, h, j));
    for (double& x : p) x /= sum > 0 ? sum : 1;
    if (lse) *lse = std::log(sum);
    return p;
  }
  /// Measures, allocates exactly that much, runs.
  template <class Op>
  void run_op(Op const& op) {
    workspace measure;
    REQUIRE(run(ctx, op, measure) == status::ok);
    std::vector<std::byte> memory(measure.peak() + 63);
    void* at = memory.data();
    std::size_t space = memory.size();
    std::align(64, measure.peak(), at, space);
    workspace ws(std::span(static_cast<std::byte*>(at), measure.peak()));
    REQUIRE(run(ctx, op, ws) == status::ok);
    REQUIRE(ws.used() == 0);
    if (measure.peak() == 0) return;
    workspace small(std::span(static_cast<std::byte*>(at), measure.peak() - 64));
    REQUIRE(run(ctx, op, small) == status::workspace_too_small);
  }
};

bool close(double a, double b, double tolerance = 3e-5) {
  return std::abs(a - b) <= tolerance * (1 + std::abs(b));
}

/// Ring row 0 of weights `[id, kv_head, g, ring row, slot]` as `[id, kv_head, g, slot]`.
tensor_ref<float, 4> ring_rows(float* data, index_t n_first, index_t heads, index_t in_group,
                               index_t ring, index_t row) {
  auto t = row_major(data, n_first, heads, in_group, row);
  for (int axis = 0; axis < 3; ++axis) t.stride[axis] *= ring;
  return t;
}

template <class T>
void check_attend(bench<T>& t) {
  constexpr index_t ring = 2;
  std::vector<float> out(uz(2 * hq * dv)), lse(2 * hq), sum(uz(n_id * hq * ring)),
      w(uz(n_id * hq * ring * slots));
  std::vector<std::uint8_t> see(uz(2 * hq * slots));
  for (auto& x : see) x = t.random() % 3 != 0;
  index_t const ring_row[2] = {1, 0};
  for (bool const masked : {false, true}) {
    op::attend<> o;
    o.batch = t.batch;
    o.layer = t.layer;
    o.q = row_major(t.q.data(), 2, hq, dk);
    o.out = row_major(out.data(), 2, hq, dv);
    o.lse = row_major(lse.data(), 2, hq);
    o.weights = ring_rows(w.data(), n_id, hkv, group, ring, slots);
    o.weight_sum = row_major(sum.data(), n_id, hkv, group, ring);
    o.weight_row = ring_row;
    o.ring_stride = slots;
    if (masked) o.visible = row_major(static_cast<std::uint8_t const*>(see.data()), 2, hq, slots);
    t.run_op(o);
    int wrong = 0;
    for (index_t b = 0; b < 2; ++b)
      for (index_t h = 0; h < hq; ++h) {
        index_t const c = h / group, g = h % group;
        double expected = 0;
        auto const shown = [&](index_t j) {
          return !masked || see[uz((b * hq + h) * slots + j)] != 0;
        };
        auto const p = t.probs(&t.q[uz((b * hq + h) * dk)], b, c, shown, &expected);
        auto const all = t.probs(&t.q[uz((b * hq + h) * dk)], b, c, [](index_t) { return true; });
        if (t.n(b, c) > 0) wrong += !close(static_cast<double>(o.lse(b, h)), expected);
        for (index_t d = 0; d < dv; ++d) {
          double x = 0;
          for (index_t j = 0; j < t.n(b, c); ++j) x += p[uz(j)] * t.value(rows[b], c, j, d);
          wrong += !close(static_cast<double>(o.out(b, h, d)), x);
        }
        for (index_t j = 0; j < t.n(b, c); ++j) {
          float const e = o.weights(ids[b], c, g, j + ring_row[b] * slots) /
                          o.weight_sum(ids[b], c, g, ring_row[b]);
          wrong += !close(static_cast<double>(e), all[uz(j)]);
        }
      }
    REQUIRE(wrong == 0);
  }
}

template <class T>
query_rows<> rows_of(bench<T>& t, index_t n_rows) {
  t.row_position.clear();
  for (index_t b = 0; b < 2; ++b)
    for (index_t r = 0; r < n_rows; ++r) t.row_position.push_back(r == 1 ? -1 : 20 * r + b);
  return {row_major(static_cast<float const*>(t.q.data()), 2, hq, n_rows, dk),
          row_major(static_cast<index_t const*>(t.row_position.data()), 2, n_rows),
          {},
          false};
}

template <class T>
void check_column_sums(bench<T>& t) {
  constexpr index_t n_rows = 5;
  std::vector<float> out(uz(2 * hq * slots)), lse(2 * hq * n_rows);
  for (bool const given : {false, true})
    for (bool const split : {false, true}) {
      op::column_sums<> o;
      o.batch = t.batch;
      o.layer = t.layer;
      o.rows = rows_of(t, n_rows);
      o.clear = o.per_query_head = split;
      o.out = row_major(out.data(), 2, hkv, split ? group : 1, slots);
      std::fill(out.begin(), out.end(), 0.5F);
      std::vector<double> expected(out.size(), split ? 0.0 : 0.5);
      for (index_t b = 0; b < 2; ++b)
        for (index_t h = 0; h < hq; ++h)
          for (index_t r = 0; r < n_rows; ++r) {
            index_t const at = o.rows.position(b, r);
            auto const see = [&](index_t j) { return t.pos(b, h / group, j) <= at; };
            double norm = 0;
            auto const p = t.probs(&o.rows.q(b, h, r, 0), b, h / group, see, &norm);
            lse[uz((b * hq + h) * n_rows + r)] = static_cast<float>(norm);
            for (index_t j = 0; at >= 0 && j < t.n(b, h / group); ++j)
              expected[uz(o.out.offset(b, h / group, split ? h % group : 0, j))] += p[uz(j)];
          }
      if (given) o.rows.lse = row_major(static_cast<float const*>(lse.data()), 2, hq, n_rows);
      t.run_op(o);
      int wrong = 0;
      for (index_t b = 0; b < 2; ++b)
        for (index_t h = 0; h < hkv; ++h)
          for (index_t r = 0; r < o.out.extent[2]; ++r)
            for (index_t j = 0; j < t.n(b, h); ++j)
              wrong += !close(static_cast<double>(o.out(b, h, r, j)),
                              expected[uz(o.out.offset(b, h, r, j))]);
      REQUIRE(wrong == 0);
    }
}

/// MorphKV both ways: the direct form against loops, then cached weights against the direct form.
template <class T>
void check_fused(bench<T>& t, reduction fuse) {
  constexpr index_t n_rows = 6, recent = 9;
  std::vector<float> out(uz(2 * hkv * slots)), heads(uz(2 * hq * slots)), cached(out.size());
  op::fused_rows<> o;
  o.batch = t.batch;
  o.layer = t.layer;
  o.rows = rows_of(t, n_rows);
  o.recent = recent;
  o.fuse = fuse;
  o.out = row_major(out.data(), 2, hkv, slots);
  o.out_heads = row_major(heads.data(), 2, hq, slots);
  t.run_op(o);
  int wrong = 0;
  auto const fold = [&](double a, double x) {
    return fuse == reduction::sum ? a + x : std::max(a, x);
  };
  for (index_t b = 0; b < 2; ++b)
    for (index_t c = 0; c < hkv; ++c) {
      std::vector<double> all(slots, 0.0), own(uz(group * slots), 0.0);
      for (index_t r = 0; r < n_rows; ++r) {
        if (o.rows.position(b, r) < 0) continue;
        std::vector<double> top(slots, 0.0);
        for (index_t g = 0; g < group; ++g) {
          auto const see = [&](index_t j) { return t.old(b, c, j, recent); };
          auto const p = t.probs(&o.rows.q(b, c * group + g, r, 0), b, c, see);
          for (index_t j = 0; j < slots; ++j) {
            top[uz(j)] = std::max(top[uz(j)], p[uz(j)]);
            own[uz(g * slots + j)] = fold(own[uz(g * slots + j)], p[uz(j)]);
          }
        }
        for (index_t j = 0; j < slots; ++j) all[uz(j)] = fold(all[uz(j)], top[uz(j)]);
      }
      for (index_t j = 0; j < t.n(b, c); ++j) {
        if (!t.old(b, c, j, recent)) {
          wrong += !std::isinf(o.out(b, c, j)) || !std::isinf(o.out_heads(b, c * group, j));
          continue;
        }
        wrong += !close(static_cast<double>(o.out(b, c, j)), all[uz(j)]);
        for (index_t g = 0; g < group; ++g)
          wrong +=
              !close(static_cast<double>(o.out_heads(b, c * group + g, j)), own[uz(g * slots + j)]);
      }
    }
  REQUIRE(wrong == 0);

  constexpr index_t ring = 8;
  std::vector<float> w(uz(n_id * hq * ring * slots), NAN), sum(uz(n_id * hq * ring)),
      q(uz(n_id * hq * ring * dk));
  std::vector<index_t> at(uz(2 * n_rows), -1);
  op::row_weights<> fill;
  fill.batch = t.batch;
  fill.layer = t.layer;
  fill.rows = o.rows;
  for (index_t b = 0; b < 2; ++b)  // absent rows come first here
    for (index_t r = 0; r < n_rows; ++r) t.row_position[uz(b * n_rows + r)] = r == 0 ? -1 : 10 + r;
  fill.weights = ring_rows(w.data(), n_id, hkv, group, ring, slots);
  fill.weight_sum = row_major(sum.data(), n_id, hkv, group, ring);
  fill.ring_stride = slots;
  fill.ring = ring;
  t.run_op(fill);
  o.out_heads = {};
  t.run_op(o);
  for (index_t b = 0; b < 2; ++b)
    for (index_t h = 0; h < hq; ++h)
      for (index_t r = 1; r < n_rows; ++r)
        std::copy_n(&o.rows.q(b, h, r, 0), dk,
                    &q[uz(((ids[b] * hq + h) * ring + (10 + r) % ring) * dk)]);
  op::ring_score<> s;
  s.batch = t.batch;
  s.layer = t.layer;
  s.positions = row_major(static_cast<index_t const*>(t.row_position.data()), 2, n_rows);
  s.q = row_major(static_cast<float const*>(q.data()), n_id, hq, ring, dk);
  s.weights = fill.weights;
  s.ring_stride = slots;
  s.ring = ring;
  s.recent = recent;
  s.fuse = fuse;
  s.out = row_major(cached.data(), 2, hkv, slots);
  for (bool const direct : {false, true}) {
    if (direct)  // cached weights that have underflowed
      for (float& e : w) e = 0;
    t.run_op(s);
    for (index_t b = 0; b < 2; ++b)
      for (index_t h = 0; h < hkv; ++h)
        for (index_t j = 0; j < t.n(b, h); ++j)
          wrong += std::isinf(o.out(b, h, j)) ? !std::isinf(s.out(b, h, j))
                                              : !close(static_cast<double>(s.out(b, h, j)),
                                                       static_cast<double>(o.out(b, h, j)));
  }
  REQUIRE(wrong == 0);
  s.positions.extent[1] = 0;  // no rows: the newest old slots win
  t.run_op(s);
  REQUIRE(s.out(0, 0, 0) ==
          (t.old(0, 0, 0, recent) ? static_cast<float>(t.pos(0, 0, 0)) : INFINITY));
}

template <class T>
void check_accumulate(bench<T>& t) {
  std::vector<float> w(uz(n_id * hq * slots), 0.25F), sum(uz(n_id * hq), 2.0F),
      acc(uz(n_id * hkv * slots), 1.0F);
  std::vector<index_t> fresh(uz(n_id * hkv), 3);
  op::accumulate<> o;
  o.batch = t.batch;
  o.slots = t.layer.slots;
  o.weights = row_major(static_cast<float const*>(w.data()), n_id, hkv, group, slots);
  o.weight_sum = row_major(static_cast<float const*>(sum.data()), n_id, hkv, group, 1);
  o.fold.scale = 2;
  o.fold.fresh_slot = row_major(static_cast<index_t const*>(fresh.data()), n_id, hkv);
  o.fold.out = row_major(acc.data(), n_id, hkv, 1, slots);
  o.fold.out_by_id = true;
  t.run_op(o);
  REQUIRE(o.fold.out(ids[0], 0, 0, 2) == 1.75F);
  REQUIRE(o.fold.out(ids[0], 0, 0, 3) == 0.75F);
  REQUIRE(o.fold.out(ids[0], 1, 0, 37) == 1.0F);
  REQUIRE(o.fold.out(ids[1], 1, 0, 3) == 1.0F);
}

/// What a plan must hold, by sorting.
template <class T>
std::vector<index_t> expected_plan(bench<T>& t, index_t b, index_t h, index_t k,
                                   guard_ref<> const& g) {
  index_t const n = t.n(b, h);
  std::vector<index_t> kept, rest;
  for (index_t j = 0; j < n; ++j) {
    index_t const r = t.rank(b, h, j);
    bool const safe = r < g.sinks || r >= n - g.recent || t.pos(b, h, j) < g.frozen[ids[b]];
    (safe ? kept : rest).push_back(j);
  }
  auto const score = [&](index_t j) { return t.scores[uz((b * hkv + h) * slots + j)]; };
  std::sort(rest.begin(), rest.end(), [&](index_t x, index_t y) {
    return score(x) != score(y) ? score(x) > score(y) : t.pos(b, h, x) < t.pos(b, h, y);
  });
  index_t const more = std::clamp<index_t>(k - static_cast<index_t>(kept.size()), 0,
                                           static_cast<index_t>(rest.size()));
  kept.insert(kept.end(), rest.begin(), rest.begin() + more);
  std::sort(kept.begin(), kept.end());
  return kept;
}

template <class T>
void check_select(bench<T>& t) {
  std::vector<index_t> frozen{0, 6, 0, 2}, k(uz(n_id * hkv)), list(uz(2 * hkv * slots)),
      count(uz(2 * hkv)), victim(uz(n_id * hkv));
  for (float& s : t.scores) s = std::round(s * 2);  // many ties
  op::select_k<> o;
  o.batch = t.batch;
  o.slots = t.layer.slots;
  o.scores = row_major(static_cast<float const*>(t.scores.data()), 2, hkv, slots);
  o.k = row_major(static_cast<index_t const*>(k.data()), n_id, hkv);
  o.guard = {2, 7, frozen.data()};
  o.out = {row_major(list.data(), 2, hkv, slots), row_major(count.data(), 2, hkv)};
  op::evict_one<> e{t.batch, o.slots, o.scores, o.guard, row_major(victim.data(), n_id, hkv)};
  for (index_t const wanted : {0, 11, 30, 36, 69, 90}) {
    std::fill(k.begin(), k.end(), wanted);
    t.run_op(o);
    for (index_t b = 0; b < 2; ++b)
      for (index_t h = 0; h < hkv; ++h) {
        auto const all = expected_plan(t, b, h, wanted, o.guard);
        REQUIRE(std::vector<index_t>(o.out.slots.at(b, h, 0),
                                     o.out.slots.at(b, h, count[uz(b * hkv + h)])) == all);
      }
  }
  t.run_op(e);
  for (index_t b = 0; b < 2; ++b)
    for (index_t h = 0; h < hkv; ++h) {
      auto const rest = expected_plan(t, b, h, t.n(b, h) - 1, o.guard);
      index_t out = 0;  // the one that is missing
      while (out < static_cast<index_t>(rest.size()) && rest[uz(out)] == out) ++out;
      REQUIRE(e.victim(ids[b], h) == (static_cast<index_t>(rest.size()) == t.n(b, h) ? -1 : out));
    }
  op::select_blocks<> s{t.batch, o.slots, o.scores, o.k, {0, 3, nullptr}, 8, reduction::sum, o.out};
  std::fill(k.begin(), k.end(), 30);
  t.run_op(s);
  REQUIRE(count[0] % 8 == 70 % 8);
  REQUIRE(count[2] == 5);
}

template <class T>
void check_compact(bench<T>& t, kind layout) {
  for (auto const how : {op::move_kind::pack, op::move_kind::fill_holes, op::move_kind::renumber}) {
    for (bool const other : {false, true}) {
      if (other && how != op::move_kind::pack) continue;
      bench<T> a(layout, true, 1), b(other ? kind::nhd : layout, false, 1);
      std::vector<index_t> list(uz(2 * hkv * slots)), count(uz(2 * hkv));
      index_t const to_rows[2] = {0, 1}, to_ids[2] = {2, 0};
      op::compact<> o{a.batch, a.layer, a.batch, a.layer, {}, how};
      if (other) o.to_batch = {2, to_rows, to_ids}, o.to = b.layer;
      o.plan = {row_major(list.data(), 2, hkv, slots), row_major(count.data(), 2, hkv)};
      for (index_t e = 0; e < 2; ++e)
        for (index_t h = 0; h < hkv; ++h)
          for (index_t j = 0; j < a.n(e, h); ++j)
            if ((j * 5 + h) % 7 > 2) o.plan.slots(e, h, o.plan.count(e, h)++) = j;
      bench<T> const was(layout, true, 1);
      bench<T>& now = other ? b : a;
      t.ctx.pool ? now.ctx.pool = t.ctx.pool : nullptr;
      now.run_op(o);
      int wrong = 0;
      for (index_t e = 0; e < 2; ++e)
        for (index_t h = 0; h < hkv; ++h) {
          index_t const id = o.to_batch.id_of(e), row = o.to_batch.row_of(e),
                        n = o.plan.count(e, h);
          wrong += now.layer.slots.lengths(id, h) != n;
          std::vector<index_t> from(list.begin() + (e * hkv + h) * slots,
                                    list.begin() + (e * hkv + h) * slots + n),
              at(from.size());
          std::iota(at.begin(), at.end(), 0);
          if (how == op::move_kind::fill_holes) {
            std::vector<index_t> stay, late;
            for (index_t j : from) (j < n ? stay : late).push_back(j);
            std::vector<index_t> target(uz(n), -1);
            for (index_t j : stay) target[uz(j)] = j;
            for (index_t j = 0, i = 0; j < n; ++j)
              if (target[uz(j)] < 0) target[uz(j)] = late[uz(i++)];
            from = target;
          }
          for (index_t i = 0; i < n; ++i) {
            index_t const j = from[uz(i)], kv = how == op::move_kind::renumber ? i : j;
            for (index_t d = 0; d < dk; ++d)
              wrong += now.key(row, h, i, d) != was.key(rows[e], h, kv, d);
            for (index_t d = 0; d < dv; ++d)
              wrong += now.value(row, h, i, d) != was.value(rows[e], h, kv, d);
            wrong += now.layer.slots.positions(id, h, i) != was.pos(e, h, j);
            for (index_t r = 0; r < 2; ++r)
              wrong += now.layer.slots.rows(id, h, r, i) != was.layer.slots.rows(ids[e], h, r, j);
          }
        }
      REQUIRE(wrong == 0);
    }
  }
}

template <class T>
void check_rows(bench<T>& t) {
  constexpr index_t recent = 4;
  std::vector<index_t> seen(n_id, 500);
  std::vector<float> values(t.state.begin(), t.state.begin() + 2 * hkv * 2 * slots),
      before = values;
  op::reduce_rows<> r;
  r.batch = t.batch;
  r.slots = t.layer.slots;
  r.in = t.layer.slots.rows;
  r.in_by_id = true;
  r.how = reduction::mean;
  r.scale = 3;
  r.by_age = true;
  r.seen = seen.data();
  r.out = row_major(t.out.data(), 2, hkv, slots);
  t.run_op(r);
  for (index_t j = 0; j < t.n(0, 1); ++j) {
    double const mean =
        (static_cast<double>(r.in(ids[0], 1, 0, j)) + static_cast<double>(r.in(ids[0], 1, 1, j))) /
        2;
    REQUIRE(close(static_cast<double>(r.out(0, 1, j)), 3 * mean / (500 - t.pos(0, 1, j))));
  }
  for (auto const how : {op::pooling::average, op::pooling::maximum}) {
    values = before;
    op::pool_rows<> p{
        t.batch, t.layer.slots, recent, how, 5, row_major(values.data(), 2, hkv, 2, slots)};
    t.run_op(p);
    for (index_t b = 0; b < 2; ++b)
      for (index_t h = 0; h < hkv; ++h)
        for (index_t j = 0; j < t.n(b, h); ++j) {
          double sum = 0, top = -1e30;
          for (index_t i = 0; i < t.n(b, h); ++i)
            if (t.old(b, h, i, recent) && std::abs(t.rank(b, h, i) - t.rank(b, h, j)) <= 2) {
              double const x = static_cast<double>(before[uz(p.values.offset(b, h, 1, i))]);
              sum += x / 5;
              top = std::max(top, x);
            }
          double const same = static_cast<double>(before[uz(p.values.offset(b, h, 1, j))]);
          double const expected = !t.old(b, h, j, recent)       ? same
                                  : how == op::pooling::average ? sum
                                                                : top;
          REQUIRE(close(static_cast<double>(p.values(b, h, 1, j)), expected));
        }
  }
}

struct key_and_value {
  static constexpr bool reads_k = true, reads_v = true;
  float operator()(slot_values const& s) const {
    return s.k[s.dim_k - 1] + s.v[s.dim_v - 1] + static_cast<float>(s.seen - s.position);
  }
};

template <class T>
void check_geometry(bench<T>& t) {
  auto const out = row_major(t.out.data(), 2, hkv, slots);
  std::vector<index_t> seen(n_id, 500);
  t.run_op(op::score_slots<key_and_value>{t.batch, t.layer, {}, seen.data(), 2, {}, out, false});
  REQUIRE(close(static_cast<double>(out(0, 1, 36)),
                t.key(2, 1, 36, dk - 1) + t.value(2, 1, 36, dv - 1) + 500 - t.pos(0, 1, 36)));
  t.run_op(op::key_diff<>{t.batch, t.layer, out});
  for (index_t j = 0; j < t.n(0, 0); ++j) {
    double mean[dk] = {}, dot = 0, a = 0, b = 0;
    for (index_t i = 0; i < t.n(0, 0); ++i) {
      double square = 0;
      for (index_t d = 0; d < dk; ++d) square += t.key(2, 0, i, d) * t.key(2, 0, i, d);
      for (index_t d = 0; d < dk; ++d) mean[d] += t.key(2, 0, i, d) / std::sqrt(square) / t.n(0, 0);
    }
    for (index_t d = 0; d < dk; ++d) {
      dot += mean[d] * t.key(2, 0, j, d);
      a += mean[d] * mean[d];
      b += t.key(2, 0, j, d) * t.key(2, 0, j, d);
    }
    REQUIRE(close(static_cast<double>(out(0, 0, j)), -dot / std::sqrt(a * b)));
  }
  t.run_op(op::lag_score<>{t.batch, t.layer, 3, 10, false, out});
  std::vector<int> seen_rank(10);
  for (index_t j = 0; j < t.n(0, 0); ++j) {
    index_t const r = t.rank(0, 0, j);
    if (r < 3 || r >= 53)
      REQUIRE(out(0, 0, j) == 1.0F);
    else if (r < 13)
      ++seen_rank[uz(std::lround(out(0, 0, j) * 10))];
  }
  REQUIRE(seen_rank == std::vector<int>(10, 1));
  t.run_op(op::lag_score<>{t.batch, t.layer, 3, 10, true, out});
  double total = 0;  // a softmax over the partition
  for (index_t j = 0; j < t.n(0, 0); ++j)
    if (t.rank(0, 0, j) >= 13 && t.rank(0, 0, j) < 23) total += static_cast<double>(out(0, 0, j));
  REQUIRE(close(total, 1));
}

template <class T>
void check_joins(bench<T>& t) {
  std::vector<float> maps(uz(2 * 2 * hkv * slots));
  std::vector<index_t> candidates{60, 31, 4, 0}, out(uz(2 * 2 * hkv));
  for (float& x : maps) x = std::abs(std::round(t.noise() * 3));
  op::layer_counts<> o;
  o.batch = t.batch;
  o.n_maps = 2;
  o.scores = row_major(static_cast<float const*>(maps.data()), 2, 2, hkv, slots);
  o.candidates = row_major(static_cast<index_t const*>(candidates.data()), 2, hkv);
  o.skip = 2;
  o.best_per_head = 9;
  o.out = row_major(out.data(), 2, 2, hkv);
  for (index_t const safe : {0, 4}) {
    o.safe = safe;
    t.run_op(o);
    struct entry {
      float score;
      index_t part;
    };
    for (index_t b = 0; b < 2; ++b) {
      std::vector<entry> all;
      std::vector<index_t> expected(4);
      index_t left = 9 * 4;
      for (index_t part = 0; part < 4; ++part) {
        std::vector<float> s(
            o.scores.at(part / 2, b, part % 2, 2),
            o.scores.at(part / 2, b, part % 2, std::max(2, candidates[uz(b * 2 + part % 2)])));
        std::sort(s.rbegin(), s.rend());
        for (index_t i = 0; i < static_cast<index_t>(s.size()); ++i)
          if (i < safe)
            ++expected[uz(part)], --left;
          else
            all.push_back({s[uz(i)], part});
      }
      std::stable_sort(all.begin(), all.end(), [](entry x, entry y) { return x.score > y.score; });
      for (index_t i = 0; i < std::min(left, static_cast<index_t>(all.size())); ++i)
        ++expected[uz(all[uz(i)].part)];
      for (index_t part = 0; part < 4; ++part)
        REQUIRE(o.out(part / 2, b, part % 2) == expected[uz(part)]);
    }
  }
  o.n_maps = 1;
  o.normalize = true;
  o.safe = 0;
  t.run_op(o);
  REQUIRE(o.out(0, 0, 0) + o.out(0, 0, 1) == 18);

  auto s = row_major(t.scores.data(), 2, hkv, slots);
  float const a = s(0, 0, 4), b = s(0, 1, 4);
  t.run_op(op::mean_layers<>{t.batch, t.layer.slots, s, true, false, 2,
                             row_major(t.out.data(), 2, hkv, slots)});
  t.run_op(op::mean_layers<>{t.batch, t.layer.slots, s, false, true, 2,
                             row_major(t.out.data(), 2, hkv, slots)});
  REQUIRE(t.out[4] == a);
  t.layer.slots.lengths(ids[0], 1) = 70;
  t.run_op(op::mean_heads<>{t.batch, t.layer.slots, s});
  t.layer.slots.lengths(ids[0], 1) = 37;
  REQUIRE(s(0, 0, 4) == (a + b) / 2);
  REQUIRE(s(0, 1, 4) == s(0, 0, 4));
  index_t sum = 0;
  auto const add = [&sum](index_t i) { sum += i; };
  t.run_op(op::for_each<decltype(add), host_space>{5, add});
  REQUIRE(sum == 10);
}

template <class T>
void check_all(kind layout, bool shuffled, int threads) {
  INFO("layout " << static_cast<int>(layout) << ", shuffled " << shuffled << ", threads "
                 << threads);
  bench<T> t(layout, shuffled, threads);
  check_attend(t);
  check_column_sums(t);
  check_fused(t, reduction::max);
  check_fused(t, reduction::sum);
  check_accumulate(t);
  check_select(t);
  check_compact(t, layout);
  check_rows(t);
  check_geometry(t);
  check_joins(t);
}

}  // namespace

TEST_CASE("every op of the CPU backend, fp32", "[cpu]") {
  for (auto const layout : {kind::hnd, kind::nhd, kind::paged, kind::ragged, kind::tiled})
    for (bool const shuffled : {false, true})
      for (int const threads : {1, 2}) check_all<float>(layout, shuffled, threads);
}

TEST_CASE("every op of the CPU backend, 16 bits", "[cpu]") {
  for (auto const layout : {kind::hnd, kind::nhd, kind::paged, kind::ragged, kind::tiled}) {
    check_all<fp16>(layout, true, 2);
    check_all<bf16>(layout, false, 1);
  }
}

TEST_CASE("a pool serves several callers", "[cpu]") {
  cpu::thread_pool pool(3);
  std::atomic<int> total{0};
  auto const work = [&] {
    for (int i = 0; i < 200; ++i) {
      auto const task = [&](index_t n, int) { total.fetch_add(n); };
      pool.parallel_for(5, task);
    }
  };
  std::thread other(work);
  work();
  other.join();
  REQUIRE(total.load() == 2 * 200 * 10);
}

namespace {

/// A layout that the library does not know: slots in reverse order.
struct reverse_layout {
  index_t dim;
  offset_t offset(index_t s, index_t h, index_t j) const {
    return static_cast<offset_t>((s * hkv + h) * slots + slots - 1 - j) * dim;
  }
  index_t capacity(index_t, index_t) const { return slots; }
};

/// Copies a cache into another one of the same shape.
template <class A, class B>
void copy_rows(bench<A> const& from, bench<B>& to) {
  for (index_t s = 0; s < n_seq; ++s)
    for (index_t h = 0; h < hkv; ++h)
      for (index_t j = 0; j < slots; ++j) {
        for (index_t d = 0; d < dk; ++d)
          to.put(to.cell(to.kv.k, s, h, j, d), from.cell(from.kv.k, s, h, j, d));
        for (index_t d = 0; d < dv; ++d)
          to.put(to.cell(to.kv.v, s, h, j, d), from.cell(from.kv.v, s, h, j, d));
      }
  to.layer.kv = to.kv;
}

/// Outputs of the ops that read rows, one after the other.
std::vector<float> read_everything(bench<float>& t) {
  std::vector<float> all(uz(2 * hq * dv + 4 * hkv * slots), 0.0F);
  float* at = all.data();
  auto const q = row_major(static_cast<float const*>(t.q.data()), 2, hq, dk);
  op::attend<> a;
  a.batch = t.batch;
  a.layer = t.layer;
  a.q = q;
  a.out = row_major(at, 2, hq, dv);
  t.run_op(a);
  at += 2 * hq * dv;
  op::column_sums<> c;
  c.batch = t.batch;
  c.layer = t.layer;
  c.rows = rows_of(t, 5);
  c.out = as_rows(row_major(at, 2, hkv, slots));
  t.run_op(c);
  at += 2 * hkv * slots;
  t.run_op(op::key_diff<>{t.batch, t.layer, row_major(at, 2, hkv, slots)});
  return all;
}

}  // namespace

TEST_CASE("layouts and threads do not change a bit", "[cpu]") {
  bench<float> first(kind::hnd, false, 1);
  std::vector<float> const expected = read_everything(first);
  for (auto const layout : {kind::nhd, kind::paged, kind::ragged, kind::tiled})
    for (int const threads : {1, 3}) {
      bench<float> t(layout, false, threads);
      copy_rows(first, t);
      t.q = first.q;
      REQUIRE(read_everything(t) == expected);
    }
  bench<float> t(kind::hnd, false, 1);
  reverse_layout const k{dk}, v{dv};
  t.kv.k.layout = erase_layout(k);
  t.kv.v.layout = erase_layout(v);
  copy_rows(first, t);
  t.q = first.q;
  REQUIRE(read_everything(t) == expected);
  // The same bytes as opaque rows, read by a function.
  auto const read = [](void const*, std::byte const* row, index_t dim, float* out) {
    std::memcpy(out, row, uz(dim) * sizeof(float));
  };
  for (auto* p : {&first.layer.kv.k, &first.layer.kv.v}) {
    p->type = dtype::opaque;
    p->layout.strided.seq_stride *= 4;
    p->layout.strided.head_stride *= 4;
    p->layout.strided.slot_stride *= 4;
  }
  op::key_diff<> const unread{first.batch, first.layer, row_major(first.out.data(), 2, hkv, slots)};
  workspace ws;
  REQUIRE(run(first.ctx, unread, ws) == status::unsupported);
  first.layer.kv.k.reader.read = first.layer.kv.v.reader.read = read;
  REQUIRE(read_everything(first) == expected);
}

TEST_CASE("chunks of a prompt do not change a bit of its column sums", "[cpu]") {
  constexpr index_t n_rows = 60;
  bench<float> t(kind::paged, false, 1);
  std::vector<float> q(uz(hq * n_rows * dk)), whole(uz(hkv * slots)), parts = whole;
  std::vector<index_t> at(n_rows);
  for (float& x : q) x = t.noise();
  op::column_sums<> o;
  o.batch = {1, rows, ids};
  o.layer = t.layer;
  auto const sums = [&](index_t first, index_t count, float* out) {
    for (index_t r = 0; r < n_rows; ++r) at[uz(r)] = t.pos(0, 0, r + 10);
    o.rows.q = row_major(static_cast<float const*>(q.data()), 1, hq, n_rows, dk);
    o.rows.q.data += first * dk;
    o.rows.q.extent[2] = count;
    o.rows.position = row_major(static_cast<index_t const*>(at.data()) + first, 1, count);
    o.out = as_rows(row_major(out, 1, hkv, slots));
    for (index_t h = 0; h < hkv; ++h) t.layer.slots.lengths(ids[0], h) = first + count + 10;
    t.run_op(o);
  };
  sums(0, n_rows, whole.data());
  for (index_t first = 0; first < n_rows; first += 7)
    sums(first, std::min<index_t>(7, n_rows - first), parts.data());
  REQUIRE(parts == whole);
}

TEST_CASE("a sink logit takes its share", "[cpu]") {
  bench<float> t(kind::hnd, false, 1);
  std::vector<float> const sinks{1, 200, -500, 0, 0, 0};
  std::vector<float> out(uz(2 * hq * dv)), plain = out, lse(2 * hq), sunk = lse,
                                           mass(uz(2 * hkv * slots));
  op::attend<> a;
  a.batch = t.batch;
  a.layer = t.layer;
  a.q = row_major(static_cast<float const*>(t.q.data()), 2, hq, dk);
  a.out = row_major(plain.data(), 2, hq, dv);
  a.lse = row_major(lse.data(), 2, hq);
  t.run_op(a);
  a.layer.kv.sink_logits = sinks.data();
  a.out.data = out.data();
  a.lse.data = sunk.data();
  t.run_op(a);
  double const share = std::exp(static_cast<double>(lse[0]) -
                                std::log(std::exp(static_cast<double>(lse[0])) + std::exp(1.0)));
  REQUIRE(close(static_cast<double>(out[0]), share * static_cast<double>(plain[0])));
  REQUIRE(sunk[1] == 200.0F);
  REQUIRE(std::abs(out[dv]) < 1e-20F);
  REQUIRE(out[2 * dv] == plain[2 * dv]);
  op::column_sums<> c;
  c.batch = t.batch;
  c.layer = a.layer;
  c.rows = rows_of(t, 1);
  t.row_position.assign(2, 1000);
  c.rows.position = row_major(static_cast<index_t const*>(t.row_position.data()), 2, 1);
  c.out = as_rows(row_major(mass.data(), 2, hkv, slots));
  t.run_op(c);
  double total = 0;
  for (index_t j = 0; j < slots; ++j) total += static_cast<double>(mass[uz(j)]);
  REQUIRE(close(total, share + 1));  // of three heads one keeps all of its mass, one nothing
}
