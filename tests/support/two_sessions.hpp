// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// A session and a device session that are told the same, over caches of their own.
#pragma once

#include "device_engine.hpp"

namespace kvkeep::test {

/// A session over a cache. What lies at a position is the same in all sequences.
template <class Session, class Space>
struct side {
  engine_options const& o;
  text const& words;
  std::vector<test_cache> caches{};
  std::optional<test_cache> buffer{};  ///< of transient prompts
  std::vector<layer_spec<Space>> specs{};
  std::unique_ptr<aligned_block> memory{};
  std::optional<Session> s{};
  bool backwards = false;  ///< rows, so that they are not ids

  side(engine_options const& options, text const& w) : o(options), words(w) {
    for (index_t l = 0; l < o.n_layers; ++l) caches.emplace_back(o.cache);
    for (auto const& c : caches) specs.push_back({view(c)});
    if (o.lim.max_prompt > 0) buffer.emplace(prompt_cache(o));
  }
  std::span<layer_spec<Space> const> layers() const { return specs; }
  static kv_ref<Space> view(test_cache const& c) { return std::bit_cast<kv_ref<Space>>(c.ref()); }
  static auto as(own_batch const& b) {
    if constexpr (std::is_same_v<Session, any_session>)
      return batch{b.ids, b.rows};
    else
      return b.first(oracle::count(b.ids));
  }
  index_t row(index_t id) const { return backwards ? o.cache.shape.n_seq - 1 - id : id; }

  std::vector<float> floats(oracle::array const& x, index_t h, index_t position) const {
    std::vector<float> f;
    for (double e : x.row(h, position % words.size())) f.push_back(static_cast<float>(e));
    return f;
  }
  void write(test_cache& to, index_t at, index_t l, index_t h, index_t slot,
             index_t position) const {
    to.set_k(at, h, slot, floats(words.layer[uz(l)].k, h, position));
    to.set_v(at, h, slot, floats(words.layer[uz(l)].v, h, position));
  }
  /// Rows of `x`, `[head, position]`, from `first` on.
  std::vector<float> rows(oracle::array const& x, index_t first, index_t n) const {
    std::vector<float> all;
    for (index_t h = 0; h < x.extent(0); ++h)
      for (index_t t = first; t < first + n; ++t) {
        auto const one = floats(x, h, t);
        all.insert(all.end(), one.begin(), one.end());
      }
    return all;
  }

  /// f(slot, position) of the slots in use that are not free.
  template <class F>
  void each_live(index_t l, index_t id, index_t h, F const& f) const {
    auto const& session = *s;
    auto const at = [](auto const& t, auto... i) { return t.data[t.offset(i...)]; };
    for (index_t t = 0; t < at(session.lengths(l), id, h); ++t)
      if (t != at(session.free_slots(l), id, h)) f(t, at(session.positions(l), id, h, t));
  }
  oracle::kept_set kept(index_t l, index_t id, index_t h) const {
    oracle::kept_set set;
    each_live(l, id, h, [&](index_t, index_t p) { set.push_back(p); });
    std::sort(set.begin(), set.end());
    return set;
  }
  /// Whether every live slot holds what belongs to its position.
  bool holds_its_rows(index_t l, index_t id, index_t h) const {
    bool good = true;
    test_cache const& c = caches[uz(l)];
    each_live(l, id, h, [&](index_t slot, index_t p) {
      good = good && c.get_k(row(id), h, slot) == floats(words.layer[uz(l)].k, h, p) &&
             c.get_v(row(id), h, slot) == floats(words.layer[uz(l)].v, h, p);
    });
    return good;
  }
  /// Keys and values of a sequence that took over another one's state.
  void take_rows(index_t id) {
    for (index_t l = 0; l < o.n_layers; ++l)
      for (index_t h = 0; h < o.cache.shape.n_kv_heads; ++h)
        each_live(l, id, h,
                  [&](index_t slot, index_t p) { write(caches[uz(l)], row(id), l, h, slot, p); });
  }

  // -- calls that differ in what lies where -----------------------------------------------------------
  /// A chunk of a prompt, written to the tail; taken back if it is refused.
  status show_prompt(index_t l, index_t id, index_t first, queries const& q) {
    test_cache& to = buffer ? *buffer : caches[uz(l)];
    index_t const at = buffer ? 1 : row(id), heads = o.cache.shape.n_kv_heads;
    index_t const last = std::min(first + q.n_tokens(), to.shape().max_slots);
    std::vector<std::vector<std::byte>> before;
    for (index_t h = 0; h < heads; ++h)
      for (index_t t = first; t < last; ++t) {
        before.push_back(to.k().raw(at, h, t));
        before.push_back(to.v().raw(at, h, t));
        write(to, at, l, h, t, t);
      }
    auto const from = view(to);
    status const said = s->observe(l, id, q, buffer ? &from : nullptr, at);
    std::size_t i = 0;
    for (index_t h = 0; said != status::ok && h < heads; ++h)
      for (index_t t = first; t < last; ++t, i += 2) {
        to.k().set_raw(at, h, t, before[i]);
        to.v().set_raw(at, h, t, before[i + 1]);
      }
    return said;
  }
  status end_layer(index_t l, index_t id) {
    auto const from = view(buffer ? *buffer : caches[uz(l)]);
    return s->end_prompt(l, id, buffer ? &from : nullptr, buffer ? 1 : row(id));
  }
  /// Probabilities by slot, the same at the same positions.
  status show_rows(index_t l, own_batch const& b) {
    index_t const slots = o.cache.shape.max_slots, heads = o.cache.shape.n_q_heads;
    std::vector<float> a(b.ids.size() * uz(heads * slots));
    for (std::size_t i = 0; i < b.ids.size(); ++i)
      for (index_t h = 0; h < heads; ++h)
        each_live(l, b.ids[i], h / o.cache.shape.group(), [&](index_t slot, index_t p) {
          auto const x = floats(words.layer[uz(l)].q, h, p * 7 + l);
          a[(i * uz(heads) + uz(h)) * uz(slots) + uz(slot)] = x[0] * x[0];
        });
    status const said = s->observe(l, as(b), make_attention_rows(a.data(), heads, slots));
    settle_device();
    return said;
  }
};

}  // namespace kvkeep::test
