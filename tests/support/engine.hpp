// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// A small engine around a session: caches in any layout, prompts in chunks or from a transient view,
/// decoding, and the state as sets of positions.
#pragma once

#include <memory>
#include <optional>

#include "aligned_block.hpp"
#include "engine_types.hpp"

namespace kvkeep::test {

/// Caches of all layers and one session over them.
class engine {
 public:
  engine(engine_options o, any const& prompt, std::optional<any> const& decode = {})
      : options_(std::move(o)), shape_(options_.cache.shape) {
    for (index_t l = 0; l < options_.n_layers; ++l) {
      cache_options c = options_.cache;
      c.seed = c.seed * 31 + static_cast<std::uint64_t>(l);
      if (!options_.slots.empty()) c.shape.max_slots = options_.slots[uz(l)];
      caches_.emplace_back(c);
    }
    for (index_t l = 0; l < options_.n_layers; ++l)
      specs_.push_back({caches_[uz(l)].ref(), skipped(l)});
    if (options_.lim.max_prompt > 0) transient_.emplace(prompt_cache(options_));
    options_.lim.max_sequences = std::max(options_.lim.max_sequences, shape_.n_seq);
    if (options_.ctx == nullptr) options_.ctx = &plain();
    memory_ = std::make_unique<aligned_block>(
        session_bytes(*options_.ctx, prompt, decode.value_or(prompt), specs(), options_.lim));
    session_.emplace(bind_session(*options_.ctx, prompt, decode.value_or(prompt), specs(),
                                  options_.lim, memory_->span()));
  }

  any_session& session() { return *session_; }
  test_cache& cache(index_t layer) { return caches_[uz(layer)]; }
  std::span<layer_spec<> const> specs() const { return specs_; }
  bool skipped(index_t layer) const { return !options_.skip.empty() && options_.skip[uz(layer)]; }
  index_t n_layers() const { return options_.n_layers; }

  /// Rows run backwards, so that rows and ids differ.
  stream begin(text const& t, sequence_options const& o = {}, index_t row = -1) {
    stream s;
    s.words = &t;
    REQUIRE(session_->begin(s.id, o) == status::ok);
    s.row = row >= 0 ? row : options_.lim.max_prompt > 0 ? s.id : shape_.n_seq - 1 - s.id;
    for (s.tokens = 0; s.tokens < o.frozen; ++s.tokens)
      for (index_t l = 0; l < options_.n_layers; ++l)
        for (index_t h = 0; h < shape_.n_kv_heads; ++h)
          write(caches_[uz(l)], s, s.row, l, h, s.tokens, s.tokens);
    return s;
  }

  /// Queries of positions [first, first + n) of one layer, `[q_head, n, dim]`.
  std::vector<float> query_rows(stream const& s, index_t l, index_t first, index_t n) const {
    std::vector<float> q;
    for (index_t h = 0; h < shape_.n_q_heads; ++h)
      for (index_t r = 0; r < n; ++r)
        for (double x : s.words->layer[uz(l)].q.row(h, first + r))
          q.push_back(static_cast<float>(x));
    return q;
  }
  /// Log-sum-exp of causal rows over all earlier tokens, `[q_head, n]`.
  std::vector<float> log_sums(stream const& s, index_t l, index_t first, index_t n) const {
    std::vector<float> out;
    auto const& w = s.words->layer[uz(l)];
    for (index_t h = 0; h < shape_.n_q_heads; ++h)
      for (index_t r = 0; r < n; ++r) {
        double lse = 0;
        oracle::row_probs(w.q, h, first + r, w.k, oracle::iota_positions(first + r + 1),
                          rule_of(specs_[0].kv), true, &lse);
        out.push_back(static_cast<float>(lse));
      }
    return out;
  }

  /// Tokens [tokens, tokens + n) of the text as the prompt of one layer, without its end.
  void observe_prompt(stream const& s, index_t l, index_t n, prompt_options const& o = {}) {
    std::vector<index_t> const chunks = o.chunks.empty() ? std::vector<index_t>{n} : o.chunks;
    bool const transient = transient_.has_value();
    test_cache& to = transient ? *transient_ : caches_[uz(l)];
    index_t first = s.tokens;
    kv_ref<> const view = to.ref();
    for (index_t size : chunks) {
      for (index_t h = 0; h < shape_.n_kv_heads; ++h)
        for (index_t t = first; t < first + size; ++t)
          write(to, s, transient ? 1 : s.row, l, h, t, t);
      index_t const rows = !o.queries ? 0 : o.last_rows < 0 ? size : std::min(size, o.last_rows);
      auto const q = query_rows(s, l, first + size - rows, rows);
      auto lse = o.lse ? log_sums(s, l, first + size - rows, rows) : std::vector<float>{};
      if (o.base == log_base::two)
        for (float& x : lse) x *= 1.4426950408889634F;
      queries e = tokens_only(size);
      if (rows > 0)
        e = make_queries(q.data(), shape_.n_q_heads, rows, shape_.dim_k,
                         o.lse ? lse.data() : nullptr, o.base);
      e.tokens = size;
      REQUIRE(session_->observe(l, s.id, e, transient ? &view : nullptr, transient ? 1 : s.row) ==
              status::ok);
      first += size;
    }
  }
  status end_layer(stream const& s, index_t l) {
    if (!transient_) return session_->end_prompt(l, s.id, nullptr, s.row);
    kv_ref<> const view = transient_->ref();
    return session_->end_prompt(l, s.id, &view, 1);
  }
  /// The whole prompt, layer after layer.
  void prompt(stream& s, index_t n, prompt_options const& o = {}) {
    for (index_t l = 0; l < options_.n_layers; ++l) {
      if (skipped(l)) continue;
      observe_prompt(s, l, n, o);
      REQUIRE(end_layer(s, l) == status::ok);
    }
    s.tokens += n;
  }

  struct entries {
    std::vector<index_t> ids, rows;
    kvkeep::batch batch() const { return {ids, rows}; }
  };
  static entries batch_of(std::vector<stream*> const& who) {
    entries e;
    for (stream const* s : who) e.ids.push_back(s->id), e.rows.push_back(s->row);
    return e;
  }

  /// Appends and attends one token everywhere. `[layer * entries + entry]`; `done` is not filled.
  std::vector<token_record> token(std::vector<stream*> const& who) {
    entries const e = batch_of(who);
    index_t const n = oracle::count(who), heads = shape_.n_kv_heads;
    std::vector<token_record> r;
    for (index_t l = 0; l < options_.n_layers; ++l) {
      std::vector<index_t> slots(uz(n) * uz(heads));
      std::vector<float> q, out(uz(n) * uz(shape_.n_q_heads) * uz(shape_.dim_v));
      bool const brought = !skipped(l) && append(l, e, who, slots);
      for (index_t i = 0; i < n; ++i) {
        stream const& s = *who[uz(i)];
        token_record t;
        for (index_t h = 0; h < heads && !skipped(l); ++h) {
          index_t const slot = slots[uz(i * heads + h)];
          auto const before = caches_[uz(l)].raw(s.row, h, slot);
          write(caches_[uz(l)], s, s.row, l, h, slot, s.tokens);
          if (brought) REQUIRE(caches_[uz(l)].raw(s.row, h, slot) == before);
        }
        if (!skipped(l)) t.appended = kept(l, s);
        auto const mine = query_rows(s, l, s.tokens, 1);
        q.insert(q.end(), mine.begin(), mine.end());
        r.push_back(std::move(t));
      }
      if (skipped(l)) continue;
      if (options_.lim.decode == decode_offer::attend)
        REQUIRE(session_->attend(l, e.batch(),
                                 make_queries(q.data(), shape_.n_q_heads, 1, shape_.dim_k),
                                 out.data()) == status::ok);
      std::size_t const each = out.size() / uz(n);
      for (std::size_t i = 0; i < uz(n); ++i)
        r[uz(l) * uz(n) + i].out.assign(out.begin() + static_cast<std::ptrdiff_t>(i * each),
                                        out.begin() + static_cast<std::ptrdiff_t>((i + 1) * each));
    }
    for (stream* s : who) ++s->tokens;
    return r;
  }
  /// One plain decode step.
  std::vector<token_record> step(std::vector<stream*> const& who) {
    auto r = token(who);
    entries const e = batch_of(who);
    REQUIRE(session_->confirm(e.batch(), 1) == status::ok);
    for (index_t l = 0; l < options_.n_layers; ++l)
      for (std::size_t i = 0; i < who.size(); ++i)
        if (!skipped(l)) r[uz(l) * who.size() + i].done = kept(l, *who[i]);
    return r;
  }

  /// Live positions per head, ascending.
  oracle::kept_sets kept(index_t l, stream const& s) {
    oracle::kept_sets sets(uz(shape_.n_kv_heads));
    for (index_t h = 0; h < shape_.n_kv_heads; ++h) {
      index_t const hole = session_->free_slots(l)(s.id, h);
      for (index_t t = 0; t < session_->lengths(l)(s.id, h); ++t)
        if (t != hole) sets[uz(h)].push_back(session_->positions(l)(s.id, h, t));
      std::sort(sets[uz(h)].begin(), sets[uz(h)].end());
    }
    return sets;
  }

  /// Every live slot holds the K and V of its position, nothing else was written, and the session
  /// agrees.
  void check(std::vector<stream const*> const& who) {
    REQUIRE(session_->verify() == status::ok);
    for (index_t l = 0; l < options_.n_layers; ++l) {
      REQUIRE(caches_[uz(l)].canaries_intact());
      for (stream const* s : who)
        for (index_t h = 0; h < shape_.n_kv_heads && !skipped(l); ++h) {
          index_t const hole = session_->free_slots(l)(s->id, h);
          for (index_t t = 0; t < session_->lengths(l)(s->id, h); ++t)
            if (t != hole && !holds(*s, l, h, t, session_->positions(l)(s->id, h, t)))
              FAIL("layer " << l << " id " << s->id << " head " << h << " slot " << t
                            << " does not hold position " << session_->positions(l)(s->id, h, t));
        }
    }
    counters const c = session_->count();
    REQUIRE(c.scratch_peak <= c.scratch_bytes);
  }

  /// K and V of a sequence's slots in another row (the engine's part of a fork).
  void copy_rows(stream const& from, stream const& to) {
    for (index_t l = 0; l < options_.n_layers; ++l)
      for (index_t h = 0; h < shape_.n_kv_heads && !skipped(l); ++h)
        for (index_t t = 0; t < session_->lengths(l)(from.id, h); ++t) {
          caches_[uz(l)].k().set_raw(to.row, h, t, caches_[uz(l)].k().raw(from.row, h, t));
          caches_[uz(l)].v().set_raw(to.row, h, t, caches_[uz(l)].v().raw(from.row, h, t));
        }
  }

  static oracle::attention_rule rule_of(kv_ref<> const& kv) {
    oracle::attention_rule r;
    r.scale = static_cast<double>(kv.scale);
    r.softcap = static_cast<double>(kv.softcap);
    if (kv.sink_logits) r.sinks.assign(kv.sink_logits, kv.sink_logits + kv.shape.n_q_heads);
    return r;
  }
  oracle::attention_rule rule() const { return rule_of(specs_[0].kv); }

  void write(test_cache& to, stream const& s, index_t row, index_t l, index_t h, index_t slot,
             index_t position) const {
    auto const& w = s.words->layer[uz(l)];
    to.set_k(row, h, slot, floats(w.k.row(h, position)));
    to.set_v(row, h, slot, floats(w.v.row(h, position)));
  }

 private:
  /// In turn: slots alone, and with rows in fp32, four times as large, or as they are stored. Returns whether rows were
  /// brought.
  bool append(index_t l, entries const& e, std::vector<stream*> const& who,
              std::vector<index_t>& slots) {
    int const way = turn_++ % 3;
    if (way == 0) {
      REQUIRE(session_->append(l, e.batch(), slots.data()) == status::ok);
      return false;
    }
    dtype const stored = options_.cache.type;
    bool const raises = way == 1 && stored != dtype::opaque;
    test_cache const rows =
        new_rows(who, l, shape_, raises ? dtype::f32 : stored, raises ? 4.0F : 1.0F);
    token_kv const token = token_of(rows.ref(), raises ? 0.25F : 1.0F);
    REQUIRE(session_->append(l, e.batch(), token, slots.data()) == status::ok);
    return true;
  }
  static cpu::context& plain() {
    static cpu::context c;
    return c;
  }
  static std::vector<float> floats(std::vector<double> const& x) {
    std::vector<float> f;
    for (double e : x) f.push_back(static_cast<float>(e));
    return f;
  }
  bool holds(stream const& s, index_t l, index_t h, index_t slot, index_t position) const {
    auto const& w = s.words->layer[uz(l)];
    auto const same = [](std::vector<float> const& a, std::vector<double> const& b) {
      for (std::size_t d = 0; d < a.size(); ++d)
        if (!near(static_cast<double>(a[d]), b[d], 1e-6, 0)) return false;
      return true;
    };
    return position >= 0 && position < s.tokens &&
           same(caches_[uz(l)].get_k(s.row, h, slot), w.k.row(h, position)) &&
           same(caches_[uz(l)].get_v(s.row, h, slot), w.v.row(h, position));
  }
  static bool near(double a, double b, double relative, double absolute) {
    if (std::isnan(a) || std::isnan(b)) return std::isnan(a) && std::isnan(b);
    return a == b || std::abs(a - b) <= absolute + relative * std::abs(b);
  }

  engine_options options_;
  cache_shape shape_;
  std::vector<test_cache> caches_;
  std::vector<layer_spec<>> specs_;
  std::optional<test_cache> transient_;
  std::unique_ptr<aligned_block> memory_;
  std::optional<any_session> session_;
  int turn_ = 0;  ///< of the ways to append
};

}  // namespace kvkeep::test
