// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
// Calls in random orders with random arguments: whatever is refused has changed nothing. A twin that is spared the
// refused calls accepts all others too, and ends the same.
#include <array>

#include <kvkeep/kvkeep.hpp>

#include "../support/plain_model.hpp"

using namespace kvkeep;
using namespace kvkeep::test;

namespace {

constexpr index_t n_layers = 2, n_ids = 3, room = 40;

/// Everything that can be seen of a session and its cache.
struct sight {
  std::vector<std::byte> saved;
  std::vector<index_t> numbers;
  std::vector<std::vector<float>> rows;
  bool operator==(sight const&) const = default;
};

struct few_layers : plain_model {
  explicit few_layers(limits const& l) {
    lim = l;
    n_seq = lim.max_sequences = n_ids;
    for (index_t i = 0; i < n_layers; ++i) add(room);
  }
};

/// A session over a cache of its own.
struct system {
  any_cpu_session::plan_type plan{};
  few_layers m;
  any_cpu_session s;
  std::vector<float> buffer;       ///< of a transient prompt
  std::optional<kv_ref<>> prompt;  ///< ... where there is one

  template <class P>
  system(P const& first, P const& decode, limits const& lim)
      : m(lim), s(m.bind(std::false_type{}, first, decode)), buffer(numbers(room * plain_dim)) {
    cache_shape shape = m.shape(room);
    shape.n_seq = 1;
    if (lim.max_prompt > 0) prompt = contiguous_view(buffer.data(), buffer.data(), shape);
  }
  kv_ref<> const* transient() const { return prompt ? &*prompt : nullptr; }

  sight look() const {
    sight r;
    r.rows = m.rows;
    std::vector<std::byte> one(s.saved_bytes());
    for (index_t id = 0; id < n_ids; ++id) {
      r.numbers.push_back(s.tokens(id));
      if (s.save(id, one) == status::ok) r.saved.insert(r.saved.end(), one.begin(), one.end());
      for (index_t l = 0; l < n_layers; ++l) {
        index_t const n = s.lengths(l)(id, 0);
        r.numbers.insert(r.numbers.end(), {n, s.free_slots(l)(id, 0)});
        for (index_t t = 0; t < n; ++t) r.numbers.push_back(s.positions(l)(id, 0, t));
      }
    }
    counters const c = s.count();
    for (std::int64_t const x : {c.tokens, c.evicted, c.cuts, c.victims})
      r.numbers.push_back(static_cast<index_t>(x));
    return r;
  }
};

/// One call, drawn once and made to both.
class call {
 public:
  call(generator& g, std::vector<float> const& floats, bool sane) : f_(floats.data()) {
    // Ends are few, so that sequences grow old.
    int const kinds[] = {0, 1,  2,  3,  3,  3,  4,  5,  6,  7,  8,  8, 9,
                         9, 10, 11, 12, 12, 13, 13, 14, 14, 14, 15, 16};
    kind_ = g.one_of(kinds);
    layer_ = g.integer(sane ? 0 : -1, n_layers - (sane ? 1 : 0));
    id_ = g.integer(sane ? 0 : -1, n_ids - (sane ? 1 : 0));
    n_ = g.integer(sane ? 1 : 0, 6);
    tokens_ = g.chance(0.5F) ? 0 : n_ + g.integer(0, 6);
    at_ = g.integer(0, 60);
    rows_ = g.chance(0.3F);
    opaque_ = !sane && g.chance(0.1F);
    index_t const entries = g.integer(1, sane ? 2 : n_ids);
    for (index_t i = 0; i < entries; ++i) {
      ids_.push_back(i == 0 ? id_ : g.integer(0, n_ids - 1));
      views_.push_back(g.chance(0.7F) ? ids_.back() : g.integer(0, n_ids - (sane ? 1 : 0)));
    }
  }
  int kind() const { return kind_; }

  status operator()(system& x) const {
    any_cpu_session& s = x.s;
    batch const b{ids_, rows_ ? std::span<index_t const>(views_) : std::span<index_t const>{}};
    std::vector<float> out(2 * plain_dim * n_ids), lse(2 * n_ids);
    queries q = make_queries(f_ + at_, 2, 1, plain_dim);
    if (opaque_) q.type = dtype::opaque;
    token_kv const kv{{f_ + at_, dtype::f32, plain_dim, plain_dim},
                      {f_ + at_ + 7, dtype::f32, plain_dim, plain_dim}};
    index_t id = -1;
    switch (kind_) {
      case 0:
        return s.begin(id, {id_, n_ > 5 ? n_ - 5 : 0});
      case 1:
        return s.end(id_);
      case 2:
        return s.fork(id_, id, {-1, n_ > 4 ? n_ : 0});
      case 3: {
        queries chunk = make_queries(f_ + at_, 2, n_, plain_dim);
        chunk.tokens = tokens_;
        return s.observe(layer_, id_, chunk, opaque_ ? nullptr : x.transient());
      }
      case 4:
        return s.append_at(b);
      case 5:
        return decide(x, b);
      case 6:
        return s.end_prompt(layer_, id_, opaque_ ? nullptr : x.transient());
      case 7:
        return s.end_prompt(id_);
      case 8:
        return s.append(layer_, b, kv);
      case 9:
        return s.attend(layer_, b, q, out.data(), lse.data());
      case 10:
        return s.observe(layer_, b, q);
      case 11:
        return s.observe(layer_, b, make_attention_rows(f_, 2, room));
      case 12:
        return s.decode(layer_, b, {kv, q, out.data()});
      case 13:
        return s.confirm(b, n_ % 4);
      case 14:
        return s.rollback(b, n_ % 3);
      case 15:
        return reload(s);
      default: {
        std::vector<index_t> accepted(ids_.size(), n_ % 3);
        accepted[0] = at_ % 3;
        return s.confirm(b, accepted);
      }
    }
  }

 private:
  /// Chooses, and applies that, or what has been chosen before.
  status decide(system& x, batch const& b) const {
    if (n_ > 2) KVKEEP_TRY(x.s.choose(b, x.plan));
    return x.s.commit(x.plan);
  }
  /// What one sequence has, another one takes on, sometimes damaged.
  status reload(any_cpu_session& s) const {
    std::vector<std::byte> saved(s.saved_bytes());
    KVKEEP_TRY(s.save(id_, saved));
    if (n_ > 3) saved[static_cast<std::size_t>(at_)] ^= std::byte{1};
    return s.load(ids_.back(), saved);
  }

  float const* f_;
  int kind_;
  index_t layer_, id_, n_, tokens_, at_;
  bool rows_, opaque_;
  std::vector<index_t> ids_, views_;
};

/// A sequence from its begin, or its next tokens, all as it should be, so that there is something to spoil. Coupled
/// layers or the buffer of another sequence may be in its way.
status begin_well(system& x, index_t id, std::vector<float> const& f, index_t tokens, bool ends) {
  index_t got = -1;
  KVKEEP_TRY(x.s.begin(got, {id, 0}));
  for (index_t l = 0; l < n_layers; ++l) {
    for (index_t t = 0; t < tokens; t += 8)
      KVKEEP_TRY(x.s.observe(
          l, id, make_queries(f.data() + t, 2, std::min(8, tokens - t), plain_dim), x.transient()));
    if (ends && x.prompt) KVKEEP_TRY(x.s.end_prompt(l, id, x.transient()));
  }
  return ends && !x.prompt ? x.s.end_prompt(id) : status::ok;
}
status proceed(system& x, index_t id, std::vector<float> const& f, index_t n) {
  any_cpu_session& s = x.s;
  limits const& lim = x.m.lim;
  batch const b = {std::span(&id, 1)};
  std::vector<float> out(2 * plain_dim);
  for (index_t t = 0; t < n; ++t) {
    token_kv const kv{{f.data() + t, dtype::f32, plain_dim, plain_dim},
                      {f.data() + 2 * t, dtype::f32, plain_dim, plain_dim}};
    queries const q = make_queries(f.data() + 3 * t, 2, 1, plain_dim);
    if (lim.engine_commits) KVKEEP_TRY(s.append_at(b));
    for (index_t l = 0; l < n_layers; ++l) {
      if (!lim.engine_commits) KVKEEP_TRY(s.append(l, b, kv));
      if (lim.decode == decode_offer::attend) KVKEEP_TRY(s.attend(l, b, q, out.data()));
      if (lim.decode == decode_offer::attention_rows)
        KVKEEP_TRY(s.observe(l, b, make_attention_rows(f.data() + t, 2, room)));
    }
    KVKEEP_TRY(s.confirm(b, 1));
    if (lim.engine_commits && s.due(b)) {
      KVKEEP_TRY(s.choose(b, x.plan));
      KVKEEP_TRY(s.commit(x.plan));
    }
  }
  return status::ok;
}

/// @param accepted  [kind] counts calls
void compare(char const* prompt, char const* decode, limits const& lim, generator& g,
             std::array<int, 17>& accepted) {
  policy_options o;
  o.capacity = 10;
  o.window = std::string_view(decode) == "tova" ? 1 : 4;
  if (std::string_view(decode) == "knorm") o.sinks = 1;
  auto const p = make_policy<cpu::context>(prompt, o);
  auto const d = make_policy<cpu::context>(decode, o);
  few_layers m(lim);
  if (refusal([&] { (void)m.bind(std::false_type{}, p, d); }) != "accepted") return;
  system a(p, d, lim), twin(p, d, lim);
  auto const floats = g.normals(1000);
  for (int i = 0; i < 400; ++i) {
    call const c(g, floats, g.chance(0.8F));
    index_t const id = g.integer(0, n_ids - 1), n = g.integer(1, 20);
    bool const begins = g.chance(0.15F), ends = g.chance(0.6F), goes_on = g.chance(0.2F);
    std::vector<status> said_well;
    for (system* x : {&a, &twin}) {
      if (begins) said_well.push_back(begin_well(*x, id, floats, n, ends));
      if (goes_on) said_well.push_back(proceed(*x, id, floats, n));
    }
    std::size_t const half = said_well.size() / 2;
    REQUIRE(std::equal(said_well.begin(), said_well.begin() + static_cast<std::ptrdiff_t>(half),
                       said_well.begin() + static_cast<std::ptrdiff_t>(half)));
    INFO("call " << i << " of kind " << c.kind());
    sight const before = a.look();
    status const said = c(a);
    if (said != status::ok) {
      INFO(to_string(said));
      REQUIRE(a.look() == before);
      continue;
    }
    ++accepted[uz(c.kind())];
    REQUIRE(c(twin) == status::ok);
    REQUIRE(a.look() == twin.look());
  }
}

}  // namespace

TEST_CASE("what is refused has changed nothing, in any order of calls") {
  std::pair<char const*, char const*> const pairs[] = {{"fullkv", "fullkv"},
                                                       {"snapkv", "morphkv"},
                                                       {"morphkv", "morphkv"},
                                                       {"h2o", "h2o"},
                                                       {"tova", "tova"},
                                                       {"knorm", "knorm"},
                                                       {"streamingllm", "streamingllm"},
                                                       {"dynamickv", "streamingllm"},
                                                       {"cake", "morphkv"},
                                                       {"keydiff", "keydiff"},
                                                       {"expected_attention", "h2o"}};
  limits two;
  two.max_batch = 2;
  std::array<int, 17> accepted{};
  std::uint64_t run = 0;  // each draws other calls
  for (auto const& [prompt, decode] : pairs)
    for (limits const& lim : all_ways(two, room))
      for_seeds(2, [&, p = prompt, d = decode](generator& g) {
        INFO(p << ", " << d << ", drafts " << lim.max_draft << ", " << to_string(lim.decode)
               << (lim.engine_commits ? ", commits" : "")
               << (lim.max_prompt > 0 ? ", buffer" : ""));
        generator own(g.next() + ++run);
        compare(p, d, lim, own, accepted);
      });
  for (int const kind : {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16}) {
    INFO("kind " << kind);
    CHECK(accepted[uz(kind)] > 2);
  }
}
