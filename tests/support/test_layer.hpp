// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// A layer for op tests: cache in any layout, ragged lengths, shuffled positions, a batch whose rows
/// and ids differ, and outputs with gaps that must stay as they are.
#pragma once

#include <array>

#include "any_layout.hpp"
#include "oracle.hpp"

namespace kvkeep::test {

/// Owns a rank-R array with `gap` canary elements after every row of the last axis.
template <class T, int R>
class padded {
 public:
  explicit padded(std::array<index_t, R> extent, T fill = T{}, index_t gap = 3) : gap_(gap) {
    offset_t step = 1;
    for (int a = R - 1; a >= 0; --a) {
      ref_.extent[a] = extent[uz(a)];
      ref_.stride[a] = step;
      step *= extent[uz(a)] + (a == R - 1 ? gap : 0);
    }
    data_.assign(uz(step), canary());
    for (std::size_t i = 0; i < data_.size(); ++i)
      if (!in_gap(i)) data_[i] = fill;
  }
  padded(padded&&) = default;

  tensor_ref<T, R> ref() const {
    tensor_ref<T, R> r = ref_;
    r.data = const_cast<T*>(data_.data());
    return r;
  }
  tensor_ref<T const, R> cref() const { return ref(); }
  template <class... I>
  T& operator()(I... i) const {
    return ref()(i...);
  }
  std::vector<T>& data() { return data_; }
  std::vector<T> const& data() const { return data_; }
  template <class F>
  void each(F&& f) {
    for (std::size_t i = 0; i < data_.size(); ++i)
      if (!in_gap(i)) f(data_[i]);
  }
  bool intact() const {
    T const c = canary();
    for (std::size_t i = 0; i < data_.size(); ++i)
      if (in_gap(i) && std::memcmp(&data_[i], &c, sizeof c) != 0) return false;
    return true;
  }

 private:
  static T canary() {
    T c;
    std::memset(&c, 0xff, sizeof c);
    return c;
  }
  bool in_gap(std::size_t i) const {
    std::size_t const row = uz(ref_.extent[R - 1]);
    return i % (row + uz(gap_)) >= row;
  }

  index_t gap_;
  tensor_ref<T, R> ref_;
  std::vector<T> data_;
};

template <class T>
bool same_bits(std::vector<T> const& a, std::vector<T> const& b) {
  return a.size() == b.size() &&
         (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0);
}

/// Compares in mixed tolerance; NaN equals NaN and infinities equal themselves.
inline bool near(double a, double b, double relative = 1e-5, double absolute = 1e-6) {
  if (std::isnan(a) || std::isnan(b)) return std::isnan(a) && std::isnan(b);
  if (a == b) return true;
  return std::abs(a - b) <= absolute + relative * std::max(std::abs(a), std::abs(b));
}

struct layer_options {
  cache_options cache{};
  index_t n_batch = 0;       ///< 0: every sequence row
  index_t state_rows = 0;    ///< per-slot rows of the scorer
  index_t min_length = 0;    ///< of each head's slots in use
  bool equal_heads = false;  ///< all heads hold the same positions in the same slots
  bool shuffled = true;      ///< else slots are in position order
  bool dense = false;        ///< positions 0 .. length - 1 without holes
};

/// Content depends on the seed and the shapes alone, so that layouts and types can be compared.
class test_layer {
 public:
  test_cache cache;
  padded<index_t, 2> lengths;
  padded<index_t, 3> positions;
  padded<float, 4> rows;
  std::vector<index_t> row, id;  ///< of the batch
  index_t n_ids;

  explicit test_layer(layer_options const& o, float k_scale = 1)
      : cache(o.cache),
        lengths({o.cache.shape.n_seq + 2, o.cache.shape.n_kv_heads}, 0),
        positions({o.cache.shape.n_seq + 2, o.cache.shape.n_kv_heads, o.cache.shape.max_slots}, -1),
        rows({o.cache.shape.n_seq + 2, o.cache.shape.n_kv_heads, std::max(o.state_rows, 1),
              o.cache.shape.max_slots}),
        n_ids(o.cache.shape.n_seq + 2),
        state_rows_(o.state_rows) {
    generator g(o.cache.seed);
    index_t const n = o.n_batch > 0 ? o.n_batch : o.cache.shape.n_seq;
    row = g.choose(n, o.cache.shape.n_seq);
    id = g.choose(n, n_ids);
    rows.each([&](float& x) { x = g.normal(); });
    for (index_t b = 0; b < n; ++b)
      for (index_t h = 0; h < o.cache.shape.n_kv_heads; ++h) place_head(o, g, b, h, k_scale);
  }

  cache_shape const& shape() const { return cache.shape(); }
  index_t n() const { return static_cast<index_t>(row.size()); }
  batch_ref<> batch() const { return {n(), row.data(), id.data()}; }
  slot_state<> slots() const {
    slot_state<> s{lengths.ref(), positions.ref(), rows.ref()};
    s.rows.extent[2] = state_rows_;
    return s;
  }
  layer_ref<> ref() const { return {cache.ref(), slots()}; }

  /// Of batch entry b.
  index_t length(index_t b, index_t h) const { return lengths(id[uz(b)], h); }
  index_t position(index_t b, index_t h, index_t t) const { return positions(id[uz(b)], h, t); }
  std::vector<index_t> positions_of(index_t b, index_t h) const {
    std::vector<index_t> p;
    for (index_t t = 0; t < length(b, h); ++t) p.push_back(position(b, h, t));
    return p;
  }
  /// Slots in use, by ascending position.
  std::vector<index_t> slots_by_position(index_t b, index_t h) const {
    std::vector<index_t> s = oracle::iota_positions(length(b, h));
    std::sort(s.begin(), s.end(),
              [&](index_t x, index_t y) { return position(b, h, x) < position(b, h, y); });
    return s;
  }
  /// Largest position of the entry, or -1.
  index_t newest(index_t b) const {
    index_t p = -1;
    for (index_t h = 0; h < shape().n_kv_heads; ++h)
      for (index_t x : positions_of(b, h)) p = std::max(p, x);
    return p;
  }

  /// Keys {kv_head, slot, dim} of an entry as stored, zero where no slot is in use; values alike.
  oracle::array keys(index_t b) const { return gather(b, cache.k(), shape().dim_k); }
  oracle::array values(index_t b) const { return gather(b, cache.v(), shape().dim_v); }

  template <class F>
  void each_head(F&& f) const {
    for (index_t b = 0; b < n(); ++b)
      for (index_t h = 0; h < shape().n_kv_heads; ++h) f(b, h);
  }

 private:
  void place_head(layer_options const& o, generator& g, index_t b, index_t h, float k_scale) {
    index_t const cap = cache.capacity(row[uz(b)], h);
    index_t const s = id[uz(b)];
    index_t const length = g.chance(0.1F) ? cap : g.integer(std::min(o.min_length, cap), cap);
    auto p = g.choose(length, o.dense ? length : length + g.integer(0, 2 * cap));
    if (!o.shuffled) std::sort(p.begin(), p.end());
    lengths(s, h) = length;
    std::copy(p.begin(), p.end(), positions.ref().at(s, h));
    if (o.equal_heads && h > 0) {
      lengths(s, h) = lengths(s, 0);
      std::copy_n(positions.ref().at(s, 0), lengths(s, h), positions.ref().at(s, h));
    }
    for (index_t t = 0; t < lengths(s, h); ++t) {
      cache.set_k(row[uz(b)], h, t, g.normals(uz(shape().dim_k), k_scale));
      cache.set_v(row[uz(b)], h, t, g.normals(uz(shape().dim_v)));
    }
  }
  oracle::array gather(index_t b, test_plane const& plane, index_t dim) const {
    oracle::array x({shape().n_kv_heads, shape().max_slots, dim});
    for (index_t h = 0; h < shape().n_kv_heads; ++h)
      for (index_t t = 0; t < length(b, h); ++t) {
        auto const y = plane.get(row[uz(b)], h, t);
        for (index_t d = 0; d < dim; ++d) x.at(h, t, d) = static_cast<double>(y[uz(d)]);
      }
    return x;
  }

  index_t state_rows_;
};

/// Keys of 8 bits: slot t has byte t throughout, so that 256 slots hold every number there is.
inline void fill_with_bytes(test_layer& l) {
  l.each_head([&](index_t b, index_t h) {
    for (index_t t = 0; t < l.length(b, h); ++t)
      l.cache.k().set_raw(l.row[uz(b)], h, t,
                          std::vector<std::byte>(uz(l.shape().dim_k), static_cast<std::byte>(t)));
  });
}

/// A random small shape; `max_group` query heads per KV head at most.
inline cache_shape random_shape(generator& g, index_t max_slots, index_t max_group = 4) {
  index_t const heads = g.integer(1, 3);
  std::array<index_t, 6> const dims{1, 4, 8, 12, 16, 40};
  return {g.integer(1, 3), heads * g.integer(1, max_group), heads, g.one_of(dims),
          g.one_of(dims),  g.integer(1, max_slots)};
}

inline oracle::attention_rule rule_of(kv_ref<> const& kv) {
  oracle::attention_rule r;
  r.scale = static_cast<double>(kv.scale);
  r.softcap = static_cast<double>(kv.softcap);
  if (kv.sink_logits) r.sinks.assign(kv.sink_logits, kv.sink_logits + kv.shape.n_q_heads);
  return r;
}

/// Queries of one entry as an oracle array {q_head, row, dim}.
/// @param q [entry or id, q_head, row, dim]
template <class T>
oracle::array queries_of(tensor_ref<T, 4> const& q, index_t entry) {
  oracle::array x({q.extent[1], q.extent[2], q.extent[3]});
  for (index_t h = 0; h < q.extent[1]; ++h)
    for (index_t r = 0; r < q.extent[2]; ++r)
      for (index_t d = 0; d < q.extent[3]; ++d)
        x.at(h, r, d) = static_cast<double>(q(entry, h, r, d));
  return x;
}

}  // namespace kvkeep::test
