// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// A small engine around a device session: on the CPU backend, or on that for CUDA (KVKEEP_TEST_CUDA).
#pragma once

#include <bit>

#if defined(KVKEEP_TEST_CUDA)
#include <kvkeep/engine/cuda_engine.cuh>
#else
#include <kvkeep/engine/device_session.hpp>
#endif

#include "run_op.hpp"
#include "session_run.hpp"

namespace kvkeep::test {

using device_any = any_policy<op_context>;
using device_memory = space_of<op_context>;

/// A policy over a small cache.
inline policy_options small(index_t capacity) {
  policy_options o;
  o.capacity = capacity;
  o.window = 4;
  o.sinks = 1;
  o.kernel = 3;
  o.lag = 4;
  return o;
}
constexpr index_t bit(device_fault f) { return static_cast<index_t>(f); }

/// The tests' memory is the backend's: see op_cuda.hpp.
template <template <class> class T>
T<device_memory> to_device(T<host_space> const& x) {
  if constexpr (std::is_same_v<device_memory, host_space>)
    return x;
  else
    return std::bit_cast<T<device_memory>>(x);
}

/// A batch, its numbers on the heap: a device reads what the tests' allocator gives (gpu_main.cpp), but no stack.
struct own_batch {
  std::vector<index_t> ids, rows;
  operator batch_ref<device_memory>() const { return first(oracle::count(ids)); }
  /// The first n entries.
  batch_ref<device_memory> first(index_t n) const { return {n, rows.data(), ids.data()}; }
};

/// Waits for what was enqueued, so that the host may look.
inline void settle_device() {
#if defined(KVKEEP_TEST_CUDA)
  REQUIRE(cudaStreamSynchronize(one_thread().stream) == cudaSuccess);
#endif
}

class device_engine {
 public:
  device_engine(engine_options o, device_any const& prompt, device_any const& decode)
      : options_(std::move(o)), shape_(options_.cache.shape) {
    (void)
        other_context();  // from here on streams are late in emulation: nobody reads without waiting
    for (index_t l = 0; l < options_.n_layers; ++l) {
      cache_options c = options_.cache;
      c.seed = c.seed * 31 + static_cast<std::uint64_t>(l);
      caches_.emplace_back(c);
    }
    for (auto const& c : caches_) specs_.push_back({to_device(c.ref())});
    if (options_.lim.max_prompt > 0) transient_.emplace(prompt_cache(options_));
    options_.lim.max_sequences = std::max(options_.lim.max_sequences, shape_.n_seq);
    std::span<layer_spec<device_memory> const> const specs(specs_);
    memory_ = std::make_unique<aligned_block>(
        device_session_bytes(one_thread(), prompt, decode, specs, options_.lim));
    session_.emplace(
        bind_device_session(one_thread(), prompt, decode, specs, options_.lim, memory_->span()));
  }

  device_engine(device_engine const&) = delete;
  device_engine& operator=(device_engine const&) = delete;
  /// What has been enqueued is done before memory goes.
  ~device_engine() {
    if (!session_) return;
    CHECK(session_->join() == status::ok);
    settle_device();
  }

  auto& session() { return *session_; }
  std::span<layer_spec<device_memory> const> specs() const { return specs_; }
  /// The session writes keys and values itself.
  void append_rows() { appends_rows_ = true; }
  /// Decisions run beside what follows them.
  void decide_aside() {
    aside_ = std::make_unique<aligned_block>(session_->aside_bytes(other_context()));
    REQUIRE(session_->decide_in(other_context(), aside_->span()) == status::ok);
  }
  /// Decoded tokens' queries are shown as bf16. Precondition: they are such numbers.
  void show_bf16() { brain_ = true; }

  /// Rows run backwards, so that rows and ids differ, but where prompts are transient: these come into row `id`.
  stream begin(text const& t, index_t id = -1) {
    stream s;
    s.words = &t;
    sequence_options o;
    o.id = id;
    REQUIRE(session_->begin(s.id, o) == status::ok);
    s.row = row_of(s.id);
    return s;
  }
  /// The buffer for prompts to come.
  void transient_slots(index_t n) {
    cache_options c = prompt_cache(options_);
    c.shape.max_slots = n;
    transient_.emplace(c);
  }
  void prompt(stream& s, index_t n, std::vector<index_t> const& chunks) {
    for (index_t l = 0; l < options_.n_layers; ++l) {
      index_t first = s.tokens;
      for (index_t size : chunks) {
        observe_prompt(s, l, first, size);
        first += size;
      }
      REQUIRE(end_layer(s, l) == status::ok);
    }
    s.tokens += n;
  }
  /// Tokens [first, first + n) of the text as a chunk of the prompt of one layer.
  void observe_prompt(stream const& s, index_t l, index_t first, index_t n) {
    test_cache& to = transient_ ? *transient_ : caches_[uz(l)];
    index_t const row = transient_ ? 1 : s.row;
    for (index_t h = 0; h < shape_.n_kv_heads; ++h)
      for (index_t t = first; t < first + n; ++t) write(to, row, s, l, h, t, t);
    auto const q = rows(s, l, first, n);
    auto const view = to_device(to.ref());
    REQUIRE(session_->observe(l, s.id, make_queries(q.data(), shape_.n_q_heads, n, shape_.dim_k),
                              transient_ ? &view : nullptr, row) == status::ok);
    settle_device();  // the queries die here
  }
  /// Done when it returns: others look at what is kept, and write over a transient prompt.
  status end_layer(stream const& s, index_t l) {
    auto const view = to_device((transient_ ? *transient_ : caches_[uz(l)]).ref());
    status const result =
        session_->end_prompt(l, s.id, transient_ ? &view : nullptr, transient_ ? 1 : s.row);
    settle_device();
    return result;
  }
  /// One token for each stream: `[layer * entries + entry]`.
  std::vector<token_record> step(std::vector<stream*> const& who) {
    index_t const n = oracle::count(who), heads = shape_.n_kv_heads;
    std::vector<index_t> ids, at;
    for (stream const* s : who) ids.push_back(s->id), at.push_back(s->row);
    batch_ref<device_memory> const b{n, at.data(), ids.data()};
    std::vector<token_record> r;
    for (index_t l = 0; l < options_.n_layers; ++l) {
      std::vector<index_t> slots(uz(n) * uz(heads), -7);
      std::vector<float> q, out(uz(n) * uz(shape_.n_q_heads) * uz(shape_.dim_v));
      append(l, b, who, slots);
      for (index_t i = 0; i < n; ++i) {
        stream const& s = *who[uz(i)];
        for (index_t h = 0; h < heads; ++h)
          if (index_t const slot = slots[uz(i * heads + h)]; slot >= 0) bring(s, l, h, slot);
        token_record t;
        t.appended = kept(l, s);
        auto const mine = rows(s, l, s.tokens, 1);
        q.insert(q.end(), mine.begin(), mine.end());
        r.push_back(std::move(t));
      }
      std::vector<bf16> halves;
      for (float const x : q) halves.push_back(to_bf16(x));
      queries const shown = brain_ ? make_queries(halves.data(), shape_.n_q_heads, 1, shape_.dim_k)
                                   : make_queries(q.data(), shape_.n_q_heads, 1, shape_.dim_k);
      REQUIRE(session_->attend(l, b, shown, out.data()) == status::ok);
      settle_device();
      std::size_t const each = out.size() / uz(n);
      for (std::size_t i = 0; i < uz(n); ++i) {
        auto const from = out.begin() + static_cast<std::ptrdiff_t>(i * each);
        r[uz(l) * uz(n) + i].out.assign(from, from + static_cast<std::ptrdiff_t>(each));
      }
    }
    REQUIRE(session_->verify() == status::ok);  // waits for decisions, too
    settle_device();
    for (index_t l = 0; l < options_.n_layers; ++l)
      for (std::size_t i = 0; i < uz(n); ++i) r[uz(l) * uz(n) + i].done = kept(l, *who[i]);
    for (stream* s : who) ++s->tokens;
    return r;
  }
  /// A slot for a stream's next token in the first layer, and its rows.
  void append(stream const& s) {
    own_batch const b{{s.id}, {s.row}};
    std::vector<index_t> slots(uz(shape_.n_kv_heads), -7);
    REQUIRE(session_->append(0, b, slots.data()) == status::ok);
    settle_device();
    for (index_t h = 0; h < shape_.n_kv_heads; ++h)
      write(caches_[0], s.row, s, 0, h, slots[uz(h)], s.tokens);
  }
  oracle::attention_rule rule() const { return rule_of(caches_[0].ref()); }
  /// A copy of a sequence, keys and values too.
  stream fork(stream const& from) {
    stream s = from;
    REQUIRE(session_->fork(from.id, s.id) == status::ok);
    settle_device();
    s.row = row_of(s.id);
    copy_rows(*this, from, s);
    return s;
  }
  /// Keys and values of a sequence, of another engine, too.
  void copy_rows(device_engine& of, stream const& from, stream const& to) {
    for (index_t l = 0; l < options_.n_layers; ++l)
      for (index_t h = 0; h < shape_.n_kv_heads; ++h)
        for (index_t t = 0; t < session_->lengths(l)(to.id, h); ++t) {
          auto &mine = caches_[uz(l)], &other = of.caches_[uz(l)];
          mine.k().set_raw(to.row, h, t, other.k().raw(from.row, h, t));
          mine.v().set_raw(to.row, h, t, other.v().raw(from.row, h, t));
        }
  }
  /// Live positions per head, ascending.
  oracle::kept_sets kept(index_t l, stream const& s) {
    oracle::kept_sets sets(uz(shape_.n_kv_heads));
    for (index_t h = 0; h < shape_.n_kv_heads; ++h) {
      index_t const hole = session_->free_slots(l).data[session_->free_slots(l).offset(s.id, h)];
      for (index_t t = 0; t < session_->lengths(l)(s.id, h); ++t)
        if (t != hole) sets[uz(h)].push_back(session_->positions(l)(s.id, h, t));
      std::sort(sets[uz(h)].begin(), sets[uz(h)].end());
    }
    return sets;
  }
  bool intact() const {
    bool good = !transient_ || transient_->canaries_intact();
    for (auto const& c : caches_) good = good && c.canaries_intact();
    return good;
  }

 private:
  index_t row_of(index_t id) const { return transient_ ? id : shape_.n_seq - 1 - id; }
  void append(index_t l, batch_ref<device_memory> const& b, std::vector<stream*> const& who,
              std::vector<index_t>& slots) {
    std::vector<float> k, v;
    if (appends_rows_)
      for (stream const* s : who)
        for (index_t h = 0; h < shape_.n_kv_heads; ++h) {
          auto const& words = s->words->layer[uz(l)];
          for (double x : words.k.row(h, s->tokens)) k.push_back(4 * static_cast<float>(x));
          for (double x : words.v.row(h, s->tokens)) v.push_back(4 * static_cast<float>(x));
        }
    token_kv kv = make_token_kv(k.data(), v.data(), shape_);
    kv.k.scale = kv.v.scale = 0.25F;
    REQUIRE((appends_rows_ ? session_->append(l, b, kv, slots.data())
                           : session_->append(l, b, slots.data())) == status::ok);
    settle_device();
  }
  /// The newest token's rows lie in their slot: by now, or because the session has put them there.
  void bring(stream const& s, index_t l, index_t h, index_t slot) {
    auto const stored = [&] {
      return std::pair{caches_[uz(l)].k().raw(s.row, h, slot),
                       caches_[uz(l)].v().raw(s.row, h, slot)};
    };
    auto const before = stored();
    write(caches_[uz(l)], s.row, s, l, h, slot, s.tokens);
    if (appends_rows_) REQUIRE(stored() == before);
  }
  std::vector<float> rows(stream const& s, index_t l, index_t first, index_t n) const {
    std::vector<float> q;
    for (index_t h = 0; h < shape_.n_q_heads; ++h)
      for (index_t r = 0; r < n; ++r)
        for (double x : s.words->layer[uz(l)].q.row(h, first + r))
          q.push_back(static_cast<float>(x));
    return q;
  }
  static void write(test_cache& to, index_t row, stream const& s, index_t l, index_t h,
                    index_t slot, index_t position) {
    auto const floats = [](auto const& x) {
      std::vector<float> f;
      for (double e : x) f.push_back(static_cast<float>(e));
      return f;
    };
    auto const& w = s.words->layer[uz(l)];
    to.set_k(row, h, slot, floats(w.k.row(h, position)));
    to.set_v(row, h, slot, floats(w.v.row(h, position)));
  }

  engine_options options_;
  cache_shape shape_;
  bool brain_ = false, appends_rows_ = false;
  std::vector<test_cache> caches_;
  std::optional<test_cache> transient_;
  std::vector<layer_spec<device_memory>> specs_;
  std::unique_ptr<aligned_block> memory_, aside_;
  std::optional<device_session<op_context, device_any, device_any>> session_;
};

}  // namespace kvkeep::test
