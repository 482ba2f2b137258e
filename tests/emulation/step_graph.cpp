// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
// A decode step of a device session is kernel launches alone: recorded once and replayed, it keeps and
// computes what the same steps do that are enqueued one by one.
#include "../support/device_engine.hpp"

#ifdef KVKEEP_EMULATION
#include "far_memory.hpp"
#endif

namespace {

using namespace kvkeep;
using test::generator;
using test::uz;

constexpr index_t n_tokens = 40, n_layers = 2;

struct pairing {
  char const* prompt;
  char const* decode;
  policy_options o{};
  long launches;  ///< of a step in one layer
};

std::vector<pairing> pairings() {
  policy_options o;
  o.capacity = 16;
  o.window = 4;
  o.sinks = 1;
  policy_options burst = o, cached = o, direct = o, lazy = o, current = o, masks = o, sequence = o;
  sequence.per = scope::sequence;
  current.include_current = true;
  masks.per_head_mask = true;
  burst.evict_after = 1.3;
  cached.evaluation = morph_rows::cached;
  direct.evaluation = morph_rows::direct;
  lazy.window = lazy_shape::ahead;
  lazy.evaluation = morph_rows::lazy;
  return {{"fullkv", "fullkv", o, 3},
          {"streamingllm", "streamingllm", o, 3},
          {"h2o", "h2o", o, 3},
          {"tova", "tova", o, 3},
          {"knorm", "knorm", o, 3},
          {"knorm", "knorm", burst, 8},
          {"knorm", "knorm", sequence, 8},
          {"keydiff", "keydiff", o, 8},
          {"morphkv", "morphkv", lazy, 3},
          {"morphkv", "morphkv", cached, 10},
          {"morphkv", "morphkv", direct, 8},
          {"morphkv", "morphkv", burst, 13},
          {"morphkv", "morphkv", current, 12},
          {"morphkv", "morphkv", masks, 16},
          {"snapkv", "morphkv", lazy, 3}};
}

enum class decisions { in_step, aside, by_plan, of_drafts };

/// Fixed addresses for whatever changes from step to step.
struct step_memory {
  std::vector<index_t> ids, rows, lengths, accepted;
  std::vector<float> q, k, v, out;
};

/// A device session over sequences of different lengths.
class stepper {
 public:
  stepper(pairing const& p, test::layout_id layout, decisions how = decisions::in_step,
          index_t drafts = 1)
      : how_(how),
        prompt_policy_(make_policy<test::op_context>(p.prompt, p.o)),
        decode_policy_(make_policy<test::op_context>(p.decode, p.o)) {
    generator g(7);
    for (index_t s = 0; s < shape_.n_seq; ++s)
      texts_.push_back(test::make_text(g, shape_, n_layers, n_tokens));
    shape_.max_slots = p.o.capacity + n_tokens;
    test::cache_options o;
    o.layout = layout;
    o.shape = shape_;
    for (index_t l = 0; l < n_layers; ++l) caches_.emplace_back(o);
    for (auto const& c : caches_) specs_.push_back({test::to_device(c.ref())});
    limits lim;
    lim.max_sequences = shape_.n_seq;
    lim.engine_commits = how == decisions::by_plan;
    lim.max_draft = how == decisions::of_drafts ? drafts : 0;
    std::span<layer_spec<device_space> const> const specs(specs_);
    memory_ = std::make_unique<test::aligned_block>(
        device_session_bytes(ctx(), prompt_policy_, decode_policy_, specs, lim));
    session_.emplace(
        bind_device_session(ctx(), prompt_policy_, decode_policy_, specs, lim, memory_->span()));
    index_t const n = shape_.n_seq;
    for (index_t s = 0; s < n; ++s) at_.ids.push_back(n - 1 - s), at_.rows.push_back(s);
    at_.q.resize(uz(n_layers * n * shape_.n_q_heads * shape_.dim_k));
    at_.k.resize(uz(n_layers * n * shape_.n_kv_heads * shape_.dim_k));
    at_.v.resize(uz(n_layers * n * shape_.n_kv_heads * shape_.dim_v));
    at_.out.resize(uz(n_layers * n * shape_.n_q_heads * shape_.dim_v));
    at_.accepted.assign(uz(n), 1);
    at_.lengths.resize(uz(n * n_layers * shape_.n_kv_heads));
    if (how == decisions::aside) {
      auto& other = test::other_context();
      memory_aside_ = std::make_unique<test::aligned_block>(session_->aside_bytes(other));
      REQUIRE(session_->decide_in(other, memory_aside_->span()) == status::ok);
    }
    for (index_t s = 0; s < n; ++s) begin(s, s == 0 ? 0 : 5 + 7 * s);
  }

  stepper(stepper const&) = delete;
  stepper& operator=(stepper const&) = delete;
  /// What has been enqueued is done before memory goes.
  ~stepper() {
    CHECK(session_->join() == status::ok);
    test::settle_device();
  }

  /// One token for every sequence, by one call or by two. Nothing here depends on how many there were before.
  void enqueue_step(bool by_two = false) {
    index_t const n = shape_.n_seq, heads = shape_.n_kv_heads, hq = shape_.n_q_heads;
    batch_ref<device_space> const b{n, at_.rows.data(), at_.ids.data()};
    for (index_t l = 0; l < n_layers; ++l) {
      token_kv const rows = make_token_kv(at_.k.data() + l * n * heads * shape_.dim_k,
                                          at_.v.data() + l * n * heads * shape_.dim_v, shape_);
      queries const q = make_queries(at_.q.data() + l * n * hq * shape_.dim_k, hq, 1, shape_.dim_k);
      float* const out = at_.out.data() + l * n * hq * shape_.dim_v;
      if (!by_two) {
        REQUIRE(session_->decode(l, b, {rows, q, out}) == status::ok);
        continue;
      }
      REQUIRE(session_->append(l, b, rows) == status::ok);
      REQUIRE(session_->attend(l, b, q, out) == status::ok);
    }
    if (how_ == decisions::by_plan) enqueue_plan(b);
    if (how_ == decisions::of_drafts)
      REQUIRE(session_->confirm(b, at_.accepted.data()) == status::ok);
  }
  /// What has been decided aside is there for what is enqueued next.
  void join() { REQUIRE(session_->join() == status::ok); }
  /// The next tokens, at the fixed addresses.
  void show_next() {
    auto const fill = [&](std::vector<float>& to, index_t heads, index_t dim, auto const& of) {
      auto next = to.begin();
      for (index_t l = 0; l < n_layers; ++l)
        for (index_t s = 0; s < shape_.n_seq; ++s)
          for (index_t h = 0; h < heads; ++h)
            for (double x : of(texts_[uz(s)].layer[uz(l)]).row(h, tokens_[uz(s)]))
              *next++ = static_cast<float>(x);
      REQUIRE(to.size() == uz(n_layers * shape_.n_seq * heads * dim));
    };
    fill(
        at_.q, shape_.n_q_heads, shape_.dim_k, [](auto const& t) -> auto const& { return t.q; });
    fill(
        at_.k, shape_.n_kv_heads, shape_.dim_k, [](auto const& t) -> auto const& { return t.k; });
    fill(
        at_.v, shape_.n_kv_heads, shape_.dim_v, [](auto const& t) -> auto const& { return t.v; });
    std::fill(at_.out.begin(), at_.out.end(), -77.0F);
    ++shown_;
    for (std::size_t s = 0; s < tokens_.size(); ++s) {
      if (how_ == decisions::of_drafts)
        at_.accepted[s] = (shown_ + static_cast<index_t>(s)) % 3 == 0 ? 0 : 1;
      tokens_[s] += at_.accepted[s];
    }
  }

  /// [layer, sequence, head] live positions.
  std::vector<std::vector<index_t>> kept() const {
    std::vector<std::vector<index_t>> all;
    for (index_t l = 0; l < n_layers; ++l)
      for (index_t id = 0; id < shape_.n_seq; ++id)
        for (index_t h = 0; h < shape_.n_kv_heads; ++h) {
          index_t const hole = session_->free_slots(l)(id, h);
          all.emplace_back();
          for (index_t t = 0; t < session_->lengths(l)(id, h); ++t)
            if (t != hole) all.back().push_back(session_->positions(l)(id, h, t));
          std::sort(all.back().begin(), all.back().end());
        }
    return all;
  }
  std::vector<float> const& out() const { return at_.out; }
  bool sound() const {
    bool good = true;
    for (index_t id = 0; id < shape_.n_seq; ++id) good = good && session_->faults()[id] == 0;
    for (auto const& c : caches_) good = good && c.canaries_intact();
    return good;
  }
  static test::op_context& ctx() { return test::one_thread(); }

  /// What the reports have said: [sequence, layer, head].
  std::vector<index_t> const& lengths() const { return at_.lengths; }

 private:
  void enqueue_plan(batch_ref<device_space> const& b) {
    plan<device_space> chosen;
    REQUIRE(session_->choose(b, chosen) == status::ok);
    REQUIRE(session_->commit(chosen) == status::ok);
    std::size_t const each = at_.lengths.size() / at_.ids.size();
    report_buffer told;
    for (std::size_t s = 0; s < at_.ids.size(); ++s) {
      told.lengths = std::span(at_.lengths).subspan(s * each, each);
      REQUIRE(session_->report(at_.ids[s], told, at_.rows[s]) == status::ok);
    }
  }
  void begin(index_t s, index_t n) {
    index_t const id = at_.ids[uz(s)];
    index_t got = -1;
    REQUIRE(session_->begin(got, {id}) == status::ok);
    for (index_t l = 0; l < n_layers; ++l) {
      auto const& t = texts_[uz(s)].layer[uz(l)];
      auto const floats = [](auto const& x) { return std::vector<float>(x.begin(), x.end()); };
      std::vector<float> q;
      for (index_t h = 0; h < shape_.n_q_heads; ++h)
        for (index_t i = 0; i < n; ++i)
          for (double x : t.q.row(h, i)) q.push_back(static_cast<float>(x));
      for (index_t h = 0; h < shape_.n_kv_heads; ++h)
        for (index_t i = 0; i < n; ++i) {
          caches_[uz(l)].set_k(s, h, i, floats(t.k.row(h, i)));
          caches_[uz(l)].set_v(s, h, i, floats(t.v.row(h, i)));
        }
      REQUIRE(session_->observe(l, id, make_queries(q.data(), shape_.n_q_heads, n, shape_.dim_k),
                                nullptr, s) == status::ok);
      test::settle_device();  // the queries die here
      REQUIRE(session_->end_prompt(l, id, nullptr, s) == status::ok);
      test::settle_device();
    }
    tokens_.push_back(n);
  }

  decisions how_;
  cache_shape shape_{3, 4, 2, 8, 6, 1};
  test::device_any prompt_policy_, decode_policy_;
  std::vector<test::text> texts_;
  std::vector<test::test_cache> caches_;
  std::vector<layer_spec<device_space>> specs_;
  std::unique_ptr<test::aligned_block> memory_, memory_aside_;
  std::optional<device_session<test::op_context, test::device_any, test::device_any>> session_;
  std::vector<index_t> tokens_;  ///< of each sequence, written so far
  index_t shown_ = 0;
  step_memory at_;
};

std::string describe(pairing const& p) {
  return std::string(p.prompt) + ", then " + p.decode + ", evict_after " +
         std::to_string(p.o.evict_after) + ", per " + to_string(p.o.per) + ", rows " +
         (p.o.evaluation ? std::to_string(static_cast<int>(*p.o.evaluation)) : "any");
}

}  // namespace

TEST_CASE("a recorded decode step, replayed, keeps and computes what enqueued steps do") {
  bool pages = false;
  for (pairing const& p : pairings()) {
    test::layout_id const layout = pages ? test::layout_id::paged : test::layout_id::hnd;
    pages = !pages;
    INFO(describe(p) << ", " << layout);
    stepper direct(p, layout), replayed(p, layout);
    std::optional<test::recording> graph;
    // Sequences of 0, 12 and 19 tokens at first: one is past the capacity of 16, the others come to it on
    // the way.
    for (int step = 0; step < 18; ++step) {
      direct.show_next();
      direct.enqueue_step(true);
      test::settle_device();
      if (!graph) {  // now that a device has loaded the kernels
        auto const before = replayed.kept();
        graph.emplace(stepper::ctx());
        replayed.enqueue_step();
        REQUIRE(graph->end());
        REQUIRE(replayed.kept() == before);
      }
      replayed.show_next();
      REQUIRE(graph->replay());
      REQUIRE(direct.kept() == replayed.kept());
      REQUIRE(direct.out() == replayed.out());
    }
    CHECK(direct.sound());
    CHECK(replayed.sound());
    if (std::string(p.decode) != "fullkv")
      for (auto const& head : replayed.kept())
        CHECK(static_cast<double>(head.size()) <= p.o.evict_after * (p.o.capacity + 1));
  }
}

TEST_CASE("plans and drafts of a graph are those of enqueued calls") {
  auto const how = GENERATE(decisions::by_plan, decisions::of_drafts);
  for (pairing const& p : pairings()) {
    if (std::string(p.decode) == "fullkv" || p.o.include_current || p.o.per_head_mask) continue;
    INFO(describe(p) << (how == decisions::by_plan ? ", plans" : ", drafts"));
    stepper direct(p, test::layout_id::paged, how), replayed(p, test::layout_id::paged, how);
    std::optional<test::recording> graph;
    for (int step = 0; step < 12; ++step) {
      direct.show_next();
      direct.enqueue_step();
      test::settle_device();
      if (!graph) {
        graph.emplace(stepper::ctx());
        replayed.enqueue_step();
        REQUIRE(graph->end());
      }
      replayed.show_next();
      REQUIRE(graph->replay());
      auto const kept = replayed.kept();
      REQUIRE(direct.kept() == kept);
      REQUIRE(direct.out() == replayed.out());
      REQUIRE(direct.lengths() == replayed.lengths());
      for (auto const& head : kept)
        CHECK(static_cast<double>(head.size()) <= p.o.evict_after * (p.o.capacity + 1));
    }
    for (stepper* const s : {&direct, &replayed}) CHECK(s->sound());
  }
}

TEST_CASE("decisions beside what follows them are the same, enqueued or recorded") {
  for (pairing const& p : pairings()) {
    if (std::string(p.decode) == "fullkv") continue;  // decides nothing
    INFO(describe(p));
    stepper plain(p, test::layout_id::paged), direct(p, test::layout_id::paged, decisions::aside),
        replayed(p, test::layout_id::paged, decisions::aside);
    std::optional<test::recording> graph;
    for (int step = 0; step < 8; ++step) {
      for (stepper* const s : {&plain, &direct, &replayed}) s->show_next();
      plain.enqueue_step();
      direct.enqueue_step(step % 3 == 0);  // waits for its own decisions where it must
      test::settle_device();
      if (!graph) {
        graph.emplace(stepper::ctx());
        replayed.enqueue_step();
        replayed.join();
        REQUIRE(graph->end());
      }
      if (step % 4 != 3) {
        REQUIRE(graph->replay());
      } else {  // a step of its own between replays: nothing but join tells a graph of its decisions
        replayed.enqueue_step();
        replayed.join();
        test::settle_device();
      }
      REQUIRE(plain.out() == direct.out());
      REQUIRE(plain.out() == replayed.out());
      REQUIRE(plain.kept() == replayed.kept());
    }
    direct.join();
    test::settle_device();
    REQUIRE(plain.kept() == direct.kept());
    for (stepper* const s : {&direct, &replayed}) CHECK(s->sound());
  }
}

#ifdef KVKEEP_EMULATION
TEST_CASE("a decode step launches kernels and does nothing else, as many as it says") {
  for (pairing const& p : pairings()) {
    INFO(describe(p));
    stepper s(p, test::layout_id::paged);
    for (int step = 0; step < 3; ++step) {
      s.show_next();
      emulation::calls const before = emulation::count();
      s.enqueue_step();
      emulation::calls const after = emulation::count();
      CHECK(after.others == before.others);
      long const launches = (after.launches - before.launches) / n_layers;
      CHECK((after.launches - before.launches) % n_layers == 0);
      CHECK(launches == p.launches);
    }
    CHECK(s.sound());
  }
}

TEST_CASE("more drafts cost launches where their evidence is folded, and nowhere else") {
  for (pairing const& p : pairings()) {
    std::string const name = p.decode;
    if (p.o.per != scope::head || p.o.include_current || p.o.per_head_mask) continue;
    INFO(describe(p));
    bool const folds = name != "fullkv" && name != "keydiff" && name != "morphkv";
    long launches[2] = {};
    for (index_t const drafts : {1, 4}) {
      stepper s(p, test::layout_id::hnd, decisions::of_drafts, drafts);
      s.show_next();
      long const before = emulation::count().launches;
      s.enqueue_step();
      launches[drafts / 4] = emulation::count().launches - before;
      if (name == "fullkv") CHECK(launches[drafts / 4] == 3 * n_layers + 1);
      test::settle_device();
      CHECK(s.sound());
    }
    CHECK(launches[1] - launches[0] == (folds ? 3 * n_layers : 0));
  }
}

TEST_CASE("two launches come before a decision that runs aside") {
  for (pairing const& p : pairings()) {
    if (p.launches != 3 || std::string(p.decode) == "fullkv") continue;
    INFO(describe(p));
    stepper s(p, test::layout_id::hnd, decisions::aside);
    s.show_next();
    cudaStream_t const main = stepper::ctx().stream, aside = test::other_context().stream;
    long const in_main = emulation::launches(main), in_aside = emulation::launches(aside);
    s.enqueue_step();
    CHECK(emulation::launches(main) - in_main == 2 * n_layers);
    CHECK(emulation::launches(aside) - in_aside == n_layers);
    s.join();
    test::settle_device();
  }
}

TEST_CASE("a recording is spoilt by what a graph must not hold") {
  auto& ctx = stepper::ctx();
  cuda::context null(nullptr);
  struct nothing {
    void operator()(index_t) const {}
  };
  workspace none{std::span<std::byte>()};
  {
    test::recording fine(ctx);
    CHECK(run(ctx, op::for_each<nothing, device_space>{1, {}}, none) == status::ok);
    CHECK(fine.end());
  }
  {
    test::recording waits(ctx);
    CHECK(cudaStreamSynchronize(ctx.stream) != cudaSuccess);
    CHECK(!waits.end());
  }
  {
    test::recording allocates(ctx);
    void* p = nullptr;
    CHECK(cudaMallocManaged(&p, 64) != cudaSuccess);
    CHECK(!allocates.end());
  }
  {
    test::recording elsewhere(ctx);
    CHECK(run(null, op::for_each<nothing, device_space>{1, {}}, none) == status::backend_error);
    CHECK(!elsewhere.end());
  }
  {
    test::recording forgotten(ctx);
    auto& other = test::other_context();
    CHECK(follow(other, ctx) == status::ok);
    CHECK(run(other, op::for_each<nothing, device_space>{1, {}}, none) == status::ok);
    CHECK(!forgotten.end());  // nobody waits for the other stream
  }
  {
    auto& other = test::other_context();
    CHECK(run(other, op::for_each<nothing, device_space>{1, {}}, none) == status::ok);
    CHECK(cudaEventRecord(other.mark, other.stream) == cudaSuccess);
    test::recording outside(ctx);
    CHECK(cudaStreamWaitEvent(ctx.stream, other.mark, 0) !=
          cudaSuccess);  // for what is no part of it
    CHECK(!outside.end());
  }
}
#endif
