// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// 64 sequences of 128k slots, in address space of which a few pages are used: what a session keeps and
/// computes for the last of them is what it would alone. Indices of 32 bits would miss it.
#pragma once

#include "../support/device_engine.hpp"

#include <sys/mman.h>

namespace kvkeep::test::far {

constexpr index_t n_tokens = 120, prompt = 110, n_layers = 1;
/// 64 * 2 * 131072 rows of 256 floats: more than 2^32 elements of K.
constexpr cache_shape huge{64, 4, 2, 256, 64, 131072};

/// Zeros that cost memory where they are written to.
class sparse_block {
 public:
  explicit sparse_block(std::size_t n) : n_(n) {
    data_ = mmap(nullptr, n, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE,
                 -1, 0);
    REQUIRE(data_ != MAP_FAILED);
  }
  sparse_block(sparse_block const&) = delete;
  sparse_block& operator=(sparse_block const&) = delete;
  ~sparse_block() { munmap(data_, n_); }
  std::span<std::byte> span() const { return {static_cast<std::byte*>(data_), n_}; }
  float* floats() const { return static_cast<float*>(data_); }

 private:
  std::size_t n_;
  void* data_;
};

struct pairing {
  char const* prompt;
  char const* decode;
  policy_options o{};
  bool inherits = false;  ///< decoding keeps what the prompt's policy left
  policy_options decode_options() const {
    policy_options d = o;
    if (inherits) d.budget = "inherit";
    return d;
  }
};

/// A device session that decodes its last sequence.
class last_of {
 public:
  last_of(pairing const& p, cache_shape const& s, limits lim = {})
      : shape_(s),
        id_(s.n_seq - 1),
        prompt_policy_(make_policy<op_context>(p.prompt, p.o)),
        decode_policy_(make_policy<op_context>(p.decode, p.decode_options())) {
    for (index_t l = 0; l < n_layers; ++l) {
      std::size_t const rows = product(s.n_seq, s.n_kv_heads, s.max_slots);
      k_.push_back(std::make_unique<sparse_block>(rows * uz(s.dim_k) * sizeof(float)));
      v_.push_back(std::make_unique<sparse_block>(rows * uz(s.dim_v) * sizeof(float)));
      views_.push_back(contiguous_view<device_space>(k_.back()->floats(), v_.back()->floats(), s));
      specs_.push_back({kv_ref<device_space>(views_.back())});
    }
    lim.max_sequences = s.n_seq;
    std::span<layer_spec<device_space> const> const specs(specs_);
    bytes_ = device_session_bytes(ctx(), prompt_policy_, decode_policy_, specs, lim);
    memory_ = std::make_unique<sparse_block>(bytes_);
    session_.emplace(
        bind_device_session(ctx(), prompt_policy_, decode_policy_, specs, lim, memory_->span()));
  }
  static op_context& ctx() { return one_thread(); }
  std::size_t bytes() const { return bytes_; }

  void begin(text const& t) {
    index_t got = -1;
    REQUIRE(session_->begin(got, {id_}) == status::ok);
    for (index_t l = 0; l < n_layers; ++l) {
      for (index_t i = 0; i < prompt; ++i)
        for (index_t h = 0; h < shape_.n_kv_heads; ++h) write(t, l, h, i, i);
      auto const q = rows_of(t, l, 0, prompt);
      REQUIRE(session_->observe(l, id_,
                                make_queries(q.data(), shape_.n_q_heads, prompt, shape_.dim_k)) ==
              status::ok);
      REQUIRE(session_->end_prompt(l, id_) == status::ok);
    }
  }
  std::vector<float> step(text const& t, index_t position) {
    index_t const heads = shape_.n_kv_heads;
    std::vector<index_t> slots(uz(heads));
    std::vector<float> all;
    for (index_t l = 0; l < n_layers; ++l) {
      std::vector<float> out(uz(shape_.n_q_heads * shape_.dim_v));
      batch_ref<device_space> const b{1, &id_, &id_};
      REQUIRE(session_->append(l, b, slots.data()) == status::ok);
      for (index_t h = 0; h < heads; ++h) {
        REQUIRE(slots[uz(h)] >= 0);
        write(t, l, h, slots[uz(h)], position);
      }
      auto const q = rows_of(t, l, position, 1);
      REQUIRE(session_->attend(l, b, make_queries(q.data(), shape_.n_q_heads, 1, shape_.dim_k),
                               out.data()) == status::ok);
      all.insert(all.end(), out.begin(), out.end());
    }
    return all;
  }
  /// The last sequence's drafts that stay, then a plan for all sequences, of which it alone has tokens.
  void decide(index_t accepted) {
    index_t const n = shape_.n_seq;
    std::vector<index_t> ids(uz(n)), counts(uz(n), 0), lengths(uz(n_layers * shape_.n_kv_heads));
    for (index_t i = 0; i < n; ++i) ids[uz(i)] = i;
    counts.back() = accepted;
    batch_ref<device_space> const b{n, ids.data(), ids.data()};
    plan<device_space> p;
    REQUIRE(session_->confirm(b, counts.data()) == status::ok);
    REQUIRE(session_->choose(b, p) == status::ok);
    REQUIRE(session_->commit(p) == status::ok);
    REQUIRE(session_->verify() == status::ok);
    report_buffer told;
    told.lengths = lengths;
    REQUIRE(session_->report(id_, told) == status::ok);
    CHECK(session_->faults()[id_] == 0);
    for (index_t l = 0; l < n_layers; ++l)
      CHECK(lengths[uz(l * shape_.n_kv_heads)] == session_->lengths(l)(id_, 0));
  }
  std::vector<std::vector<index_t>> kept() const {
    std::vector<std::vector<index_t>> all;
    for (index_t l = 0; l < n_layers; ++l)
      for (index_t h = 0; h < shape_.n_kv_heads; ++h) {
        all.emplace_back();
        for (index_t t = 0; t < session_->lengths(l)(id_, h); ++t)
          if (t != session_->free_slots(l)(id_, h))
            all.back().push_back(session_->positions(l)(id_, h, t));
        std::sort(all.back().begin(), all.back().end());
      }
    return all;
  }
  /// Enqueues a step of all sequences.
  void enqueue_all() {
    index_t const n = shape_.n_seq;
    std::vector<index_t> ids(uz(n)), slots(product(n, shape_.n_kv_heads));
    for (index_t i = 0; i < n; ++i) ids[uz(i)] = i;
    std::vector<float> q(product(n, shape_.n_q_heads, shape_.dim_k)),
        out(product(n, shape_.n_q_heads, shape_.dim_v));
    batch_ref<device_space> const b{n, ids.data(), ids.data()};
    for (index_t l = 0; l < n_layers; ++l) {
      REQUIRE(session_->append(l, b, slots.data()) == status::ok);
      REQUIRE(session_->attend(l, b, make_queries(q.data(), shape_.n_q_heads, 1, shape_.dim_k),
                               out.data()) == status::ok);
    }
  }

 private:
  std::vector<float> rows_of(text const& t, index_t l, index_t first, index_t n) const {
    std::vector<float> q;
    for (index_t h = 0; h < shape_.n_q_heads; ++h)
      for (index_t r = 0; r < n; ++r)
        for (double x : t.layer[uz(l)].q.row(h, first + r)) q.push_back(static_cast<float>(x));
    return q;
  }
  void write(text const& t, index_t l, index_t h, index_t slot, index_t position) {
    std::size_t const row =
        (product(id_, shape_.n_kv_heads) + uz(h)) * uz(shape_.max_slots) + uz(slot);
    auto const put = [&](float* to, auto const& from) {
      for (double x : from) *to++ = static_cast<float>(x);
    };
    put(k_[uz(l)]->floats() + row * uz(shape_.dim_k), t.layer[uz(l)].k.row(h, position));
    put(v_[uz(l)]->floats() + row * uz(shape_.dim_v), t.layer[uz(l)].v.row(h, position));
  }

  cache_shape shape_;
  index_t id_;
  device_any prompt_policy_, decode_policy_;
  std::vector<std::unique_ptr<sparse_block>> k_, v_;
  std::vector<kv_view<float, device_space>> views_;
  std::vector<layer_spec<device_space>> specs_;
  std::size_t bytes_ = 0;
  std::unique_ptr<sparse_block> memory_;
  std::optional<device_session<op_context, device_any, device_any>> session_;
};

std::vector<pairing> pairings() {
  policy_options o;
  o.capacity = 104;
  o.window = 100;  // MorphKV's rows are then more than 2^31 floats
  o.kernel = 5;
  o.lag = 8;
  policy_options cached = o, small = o;
  cached.evaluation = morph_rows::cached;
  small.window = 4;
  std::vector<pairing> all{{"morphkv", "morphkv", o}, {"morphkv", "morphkv", cached}};
  for (char const* name : {"h2o", "tova", "knorm", "keydiff"}) all.push_back({name, name, small});
  for (char const* name : {"snapkv", "dynamickv", "adakv", "lagkv"})
    all.push_back({name, "streamingllm", small});
  for (char const* name : {"snapkv", "pyramidkv", "dynamickv", "cake"})
    all.push_back({name, "h2o", small, true});
  return all;
}

TEST_CASE("the last of 64 sequences of 128k slots is treated as one alone") {
  cache_shape alone = huge;
  alone.n_seq = 1;
  alone.max_slots = 256;
  for (pairing const& p : pairings()) {
    INFO(p.prompt << ", then " << p.decode);
    generator g(3);
    text const t = make_text(g, alone, n_layers, n_tokens);
    last_of far(p, huge), near(p, alone);
    far.begin(t);
    near.begin(t);
    REQUIRE(far.kept() == near.kept());
    for (index_t i = prompt; i < prompt + 2; ++i) {
      REQUIRE(far.step(t, i) == near.step(t, i));
      REQUIRE(far.kept() == near.kept());
    }
    CHECK(near.kept()[0].size() < uz(prompt));
  }
}

TEST_CASE("drafts and plans of 64 sequences of 128k slots are those of one alone") {
  cache_shape alone = huge;
  alone.n_seq = 1;
  alone.max_slots = 256;
  limits lim;
  lim.max_draft = 2;
  lim.engine_commits = true;
  for (pairing const& p : pairings()) {
    std::string const name = p.decode;
    if (name != p.prompt || (name != "h2o" && name != "knorm")) continue;
    INFO(name);
    generator g(3);
    text const t = make_text(g, alone, n_layers, n_tokens);
    last_of far(p, huge, lim), near(p, alone, lim);
    far.begin(t);
    near.begin(t);
    for (index_t i = prompt; i < prompt + 2; ++i) REQUIRE(far.step(t, i) == near.step(t, i));
    far.decide(1);
    near.decide(1);
    REQUIRE(far.kept() == near.kept());
    CHECK(near.kept()[0].size() == uz(p.o.capacity));
  }
}

TEST_CASE("a step of 64 sequences of 128k slots fits every launch") {
  for (pairing const& p : pairings()) {
    INFO(p.prompt << ", then " << p.decode);
    last_of all(p, huge);
    long const before = started_kernels();
    recording graph(last_of::ctx());
    all.enqueue_all();
    CHECK(graph.end());
    long const launches = started_kernels() - before;
    CHECK(launches >= 3);  // slots, attention, decision
    // What the prompt's policy leaves at most is known: grids are cut by it, not by what the cache could hold.
    if (p.inherits) CHECK(launches == 3);
    CHECK(all.bytes() > std::size_t{64} * 2 * 131072 * 4 * n_layers);  // positions alone
  }
}

TEST_CASE("one launch counts over any number of layers, up to what 32 bits count") {
  auto const enqueued = [](index_t n_maps) {
    sparse_block const memory(std::size_t{1} << 24);
    std::vector<index_t> candidates(8, 131072);
    op::layer_counts<device_space> o;
    o.batch.n = 1;
    o.n_maps = n_maps;
    // Addresses that nobody looks at: recorded kernels do not run.
    o.scores =
        row_major<device_space>(static_cast<float const*>(memory.floats()), n_maps, 1, 8, 131072);
    o.candidates = row_major<device_space>(static_cast<index_t const*>(candidates.data()), 1, 8);
    o.best_per_head = 1024;
    o.out = row_major<device_space>(reinterpret_cast<index_t*>(memory.floats()), n_maps, 1, 8);
    workspace w(memory.span());
    recording graph(last_of::ctx());
    status const s = run(last_of::ctx(), o, w);
    CHECK(graph.end());
    return s;
  };
  for (index_t n_maps : {1, 32, 128, 4095}) CHECK(enqueued(n_maps) == status::ok);
  CHECK(enqueued(4096) == status::unsupported);
}

}  // namespace kvkeep::test::far
