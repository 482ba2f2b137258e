// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
// Calls in random orders: what a session accepts a device session accepts too, and both keep the same tokens. What a
// session refuses of sequences and prompts a device session refuses as well, and has changed nothing; or it is a fault.
#include <map>

#include "../support/two_sessions.hpp"

namespace {

using namespace kvkeep;
using test::generator;
using test::own_batch;
using test::uz;

constexpr index_t n_layers = 2, n_ids = 3, room = 44;

/// What whoever calls knows of a sequence.
struct known {
  bool alive = false;
  bool over = false;              ///< its prompt
  index_t tokens[n_layers] = {};  ///< observed or appended
  bool decodes[n_layers] = {};    ///< has been appended to
  void append(index_t l) {
    ++tokens[l];
    decodes[l] = over = true;
  }
};

/// The two, and what whoever calls them knows.
class pair {
 public:
  pair(test::engine_options const& o, test::text const& w, std::string const& prompt,
       std::string const& decode, policy_options const& options)
      : shape_(o.cache.shape), lim_(o.lim), host(o, w), device(o, w) {
    auto const hp = test::make(prompt, options), hd = test::make(decode, options);
    auto const dp = make_policy<test::op_context>(prompt, options),
               dd = make_policy<test::op_context>(decode, options);
    host.memory =
        std::make_unique<test::aligned_block>(session_bytes(ctx_, hp, hd, host.layers(), lim_));
    host.s.emplace(bind_session(ctx_, hp, hd, host.layers(), lim_, host.memory->span()));
    auto& ctx = test::one_thread();
    device.memory = std::make_unique<test::aligned_block>(
        device_session_bytes(ctx, dp, dd, device.layers(), lim_));
    device.s.emplace(
        bind_device_session(ctx, dp, dd, device.layers(), lim_, device.memory->span()));
  }
  ~pair() { settle(); }
  pair(pair const&) = delete;
  pair& operator=(pair const&) = delete;

  void decide_aside() {
    aside_ = std::make_unique<test::aligned_block>(device.s->aside_bytes(test::other_context()));
    REQUIRE(device.s->decide_in(test::other_context(), aside_->span()) == status::ok);
  }
  own_batch batch_of(std::vector<index_t> ids) const {
    own_batch b{std::move(ids), {}};
    for (index_t const id : b.ids) b.rows.push_back(host.row(id));
    return b;
  }

  // -- calls, all of which say whether they were accepted ---------------------------------------------
  bool begin(index_t id, index_t frozen) {
    said("begin", id, frozen);
    index_t got[2] = {-1, -1};
    bool const done = same(host.s->begin(got[0], {id, frozen}), [&] {
      return device.s->begin(got[1], {id, frozen});
    });
    if (!done) return false;
    REQUIRE(got[0] == got[1]);
    of_[got[0]] = {};
    std::fill_n(of_[got[0]].tokens, n_layers, frozen);
    take_rows(got[0]);
    return true;
  }
  bool end(index_t id) {
    said("end", id);
    bool const done = same(host.s->end(id), [&] { return device.s->end(id); });
    if (done) of_[id].alive = false;
    return done;
  }
  bool fork(index_t from, index_t frozen) {
    said("fork", from, frozen);
    index_t got[2] = {-1, -1};
    status const host_said = host.s->fork(from, got[0], {-1, frozen});
    // A device session copies what is in the middle of a token too.
    if (host_said == status::bad_order) return false;
    bool const done = same_or_fault(
        host_said,
        [&] {
          return device.s->fork(from, got[1], {-1, frozen});
        },
        got[1], true);
    if (!done) return false;
    REQUIRE(got[0] == got[1]);
    of_[got[0]] = of_[from];
    take_rows(got[0]);
    return true;
  }
  bool reload(index_t from, index_t to) {
    said("reload", from, to);
    std::vector<std::byte> h(host.s->saved_bytes()), d(device.s->saved_bytes());
    // What has had no token takes no prompt once it is loaded, and a session saves prompts, too.
    if (!of_[from].over) return false;
    status const saved = device.s->save(from, d);
    settle();
    if (saved != status::ok || host.s->save(from, h) != status::ok) return false;
    if (!same(host.s->load(to, h), [&] { return device.s->load(to, d); })) return false;
    of_[to] = of_[from];
    take_rows(to);
    return true;
  }
  /// @param rows  query rows, of the chunk's last tokens
  bool prompt(index_t l, index_t id, index_t tokens, index_t rows) {
    said("prompt", l, id, tokens, rows);
    index_t const first = of_[id].tokens[l];
    auto const all = host.rows(host.words.layer[uz(l)].q, first + tokens - rows, rows);
    queries q = make_queries(all.data(), shape_.n_q_heads, rows, shape_.dim_k);
    q.tokens = tokens;
    bool const done = same_or_fault(
        host.show_prompt(l, id, first, q), [&] { return device.show_prompt(l, id, first, q); }, id,
        of_[id].decodes[l]);
    if (done) of_[id].tokens[l] += tokens;
    return done;
  }
  bool end_layer(index_t l, index_t id) {
    said("end_layer", l, id);
    bool const done = same_or_fault(
        host.end_layer(l, id), [&] { return device.end_layer(l, id); }, id, of_[id].decodes[l]);
    if (done && l + 1 == n_layers) of_[id].over = true;
    return done;
  }
  /// Rows are ids where all layers end at once.
  bool end_prompt(index_t id) {
    if (host.backwards) return false;
    said("end_prompt", id);
    bool const seen =
        std::any_of(of_[id].decodes, of_[id].decodes + n_layers, [](bool x) { return x; });
    bool const done = same_or_fault(
        host.s->end_prompt(id), [&] { return device.s->end_prompt(id); }, id, seen);
    if (done) of_[id].over = true;
    return done;
  }

  // What follows is not called on the device where the session refuses it.

  /// Whether a token comes to a layer before it has come to all earlier ones. Where a sequence keeps one set, a device
  /// session takes the last layer's for the last one.
  bool skips_a_layer(index_t l, own_batch const& b) const {
    return std::any_of(b.ids.begin(), b.ids.end(), [&](index_t id) {
      return std::any_of(of_[id].tokens, of_[id].tokens + l,
                         [&](index_t n) { return n <= of_[id].tokens[l]; });
    });
  }
  bool append(index_t l, own_batch const& b) {
    said("append", l, b);
    auto const k = of_newest(host.words.layer[uz(l)].k, l, b, 0),
               v = of_newest(host.words.layer[uz(l)].v, l, b, 0);
    token_kv const kv = make_token_kv(k.data(), v.data(), shape_);
    if (host.s->append(l, host.as(b), kv) != status::ok) return false;
    REQUIRE(device.s->append(l, device.as(b), kv) == status::ok);
    settle();
    for (index_t const id : b.ids) of_[id].append(l);
    if (lim_.decode == decode_offer::nothing) confirm_plainly(b);
    return true;
  }
  bool append_at(own_batch const& b) {
    said("append_at", b);
    if (host.s->append_at(host.as(b)) != status::ok) return false;
    REQUIRE(device.s->append_at(device.as(b)) == status::ok);
    settle();
    for (index_t const id : b.ids)
      for (index_t l = 0; l < n_layers; ++l) {
        bring(host, l, id);
        bring(device, l, id);
        of_[id].append(l);
      }
    return true;
  }
  /// Attention, or its queries alone.
  bool attend(index_t l, own_batch const& b, bool alone) {
    said("attend", l, b, alone);
    auto const rows = of_newest(host.words.layer[uz(l)].q, l, b, 1);
    queries const q = make_queries(rows.data(), shape_.n_q_heads, 1, shape_.dim_k);
    std::size_t const size = b.ids.size() * uz(shape_.n_q_heads * shape_.dim_v);
    std::vector<float> h(size), d(size);
    auto const call = [&](auto& x, std::vector<float>& out) {
      return alone ? x.s->observe(l, x.as(b), q) : x.s->attend(l, x.as(b), q, out.data());
    };
    if (call(host, h) != status::ok) return false;
    REQUIRE(call(device, d) == status::ok);
    settle();
    require_close(h, d);
    confirm_plainly(b);
    return true;
  }
  bool show_rows(index_t l, own_batch const& b) {
    said("rows", l, b);
    if (host.show_rows(l, b) != status::ok) return false;
    REQUIRE(device.show_rows(l, b) == status::ok);
    settle();
    confirm_plainly(b);
    return true;
  }
  bool decode(index_t l, own_batch const& b) {
    said("decode", l, b);
    auto const& w = host.words.layer[uz(l)];
    auto const k = of_newest(w.k, l, b, 0), v = of_newest(w.v, l, b, 0),
               rows = of_newest(w.q, l, b, 0);
    std::vector<float> h(b.ids.size() * uz(shape_.n_q_heads * shape_.dim_v)), d(h);
    token_io io{make_token_kv(k.data(), v.data(), shape_),
                make_queries(rows.data(), shape_.n_q_heads, 1, shape_.dim_k), h.data()};
    if (host.s->decode(l, host.as(b), io) != status::ok) return false;
    io.out = d.data();
    REQUIRE(device.s->decode(l, device.as(b), io) == status::ok);
    settle();
    require_close(h, d);
    for (index_t const id : b.ids) of_[id].append(l);
    confirm_plainly(b);
    return true;
  }
  bool confirm(own_batch const& b, std::vector<index_t> const& accepted) {
    said("confirm", b);
    if (host.s->confirm(host.as(b), accepted) != status::ok) return false;
    REQUIRE(device.s->confirm(device.as(b), accepted.data()) == status::ok);
    settle();
    for (index_t const id : b.ids) std::fill_n(of_[id].tokens, n_layers, host.s->tokens(id));
    return true;
  }
  bool plan(own_batch const& b) {
    said("plan", b);
    kvkeep::plan<> p;
    if (!host.s->due(host.as(b)) || host.s->choose(host.as(b), p) != status::ok) return false;
    REQUIRE(host.s->commit(p) == status::ok);
    kvkeep::plan<test::device_memory> q;
    REQUIRE(device.s->choose(device.as(b), q) == status::ok);
    REQUIRE(device.s->commit(q) == status::ok);
    settle();
    return true;
  }

  /// Both have the same tokens, where their positions say, and nothing went wrong.
  void compare() {
    INFO("calls:" << calls);
    settle();
    REQUIRE(host.s->verify() == status::ok);
    REQUIRE(device.s->verify() == status::ok);
    settle();
    for (index_t id = 0; id < n_ids; ++id) {
      INFO("sequence " << id);
      if (!of_[id].alive) continue;
      REQUIRE(device.s->faults()[id] == 0);
      for (index_t l = 0; l < n_layers; ++l)
        for (index_t h = 0; h < shape_.n_kv_heads; ++h) {
          INFO("layer " << l << ", head " << h);
          REQUIRE(host.kept(l, id, h) == device.kept(l, id, h));
          REQUIRE(host.holds_its_rows(l, id, h));
          REQUIRE(device.holds_its_rows(l, id, h));
        }
    }
  }

 private:
  /// Notes a call, for messages.
  template <class... A>
  void said(char const* name, A const&... a) {
    if (calls.size() > 1000) calls.erase(0, 500);
    calls += std::string(" ") + name + "(";
    (say(a), ...);
    calls += ")";
  }
  void say(index_t i) { calls += std::to_string(i) + " "; }
  void say(own_batch const& b) {
    for (index_t const id : b.ids) say(id);
  }
  void settle() {
    CHECK(device.s->join() == status::ok);
    test::settle_device();
  }
  void take_rows(index_t id) {
    settle();
    host.take_rows(id);
    device.take_rows(id);
    of_[id].alive = true;
  }
  void require_close(std::vector<float> const& a, std::vector<float> const& b) const {
    INFO("calls:" << calls);
    for (std::size_t i = 0; i < a.size(); ++i)
      REQUIRE(std::abs(a[i] - b[i]) <= 2e-5F + 1e-4F * std::abs(b[i]));
  }
  /// What the token `back` tokens before the next one brings, `[entry, head]`.
  std::vector<float> of_newest(oracle::array const& x, index_t l, own_batch const& b,
                               index_t back) const {
    std::vector<float> all;
    for (index_t const id : b.ids) {
      auto const mine = host.rows(x, std::max(0, of_[id].tokens[l] - back), 1);
      all.insert(all.end(), mine.begin(), mine.end());
    }
    return all;
  }
  /// The newest token's rows at the tail.
  template <class Side>
  void bring(Side& x, index_t l, index_t id) {
    for (index_t h = 0; h < shape_.n_kv_heads; ++h)
      x.each_live(l, id, h, [&](index_t slot, index_t p) {
        if (p == of_[id].tokens[l]) x.write(x.caches[uz(l)], x.row(id), l, h, slot, p);
      });
  }
  /// A device session confirms by itself, and a session is told as soon as it can be.
  void confirm_plainly(own_batch const& b) {
    if (lim_.max_draft > 0) return;
    for (index_t const id : b.ids) {
      own_batch const one = batch_of({id});
      if (host.s->confirm(host.as(one), 1) != status::ok) continue;
      for (index_t l = 0; lim_.decode == decode_offer::nothing && l < n_layers; ++l)
        REQUIRE(device.s->observe(l, device.as(one), tokens_only(1)) == status::ok);
      settle();
    }
  }
  /// All that can be seen of the device session.
  std::vector<std::byte> look() {
    std::vector<std::byte> all, one(device.s->saved_bytes());
    settle();
    auto const add = [&](void const* data, std::size_t bytes) {
      auto const* const at = static_cast<std::byte const*>(data);
      all.insert(all.end(), at, at + bytes);
    };
    add(device.s->faults(), n_ids * sizeof(index_t));
    for (index_t id = 0; id < n_ids; ++id) {
      if (device.s->save(id, one) == status::ok) {
        settle();
        add(one.data(), one.size());
      }
      for (index_t l = 0; l < n_layers; ++l)
        for (index_t h = 0; h < shape_.n_kv_heads; ++h) {
          auto const set = device.kept(l, id, h);
          add(set.data(), set.size() * sizeof set[0]);
        }
    }
    return all;
  }
  /// The device session says what the session has said; where both refuse, nothing has changed there.
  /// @return whether they have accepted
  template <class F>
  bool same(status said, F const& call) {
    bool faulty = false;
    bool const done = compare_status(said, call, faulty);
    REQUIRE(!faulty);
    return done;
  }
  /// Or it takes the call for a fault of `id` in place of what it cannot know when called. The sequence ends then.
  /// @param seen  whether it sees what is wrong: not tokens of other layers, nor some that have come and gone
  template <class F>
  bool same_or_fault(status said, F const& call, index_t const& id, bool seen) {
    bool faulty = false;
    bool const done = compare_status(said, call, faulty);
    if (!faulty) return done;
    if (seen && lim_.max_draft == 0) REQUIRE(device.s->faults()[id] != 0);
    REQUIRE(device.s->end(id) == status::ok);
    (void)host.s->end(id);
    of_[id].alive = false;
    return false;
  }
  /// @param faulty  set where the device session alone has accepted
  template <class F>
  bool compare_status(status said, F const& call, bool& faulty) {
    auto const before = said == status::ok ? std::vector<std::byte>{} : look();
    status const device_said = call();
    settle();  // its arguments may die, or be written over
    INFO(calls << ": " << to_string(said) << ", device session: " << to_string(device_said));
    if (said == status::ok) REQUIRE(device_said == status::ok);
    if (said != status::ok && device_said != status::ok) REQUIRE(look() == before);
    faulty = said != status::ok && device_said == status::ok;
    return said == status::ok;
  }

  cpu::context ctx_{};
  cache_shape shape_;
  limits lim_;

 public:
  test::side<test::any_session, host_space> host;
  test::side<device_session<test::op_context, test::device_any, test::device_any>,
             test::device_memory>
      device;
  std::string calls{};  ///< the newest ones

 private:
  known of_[n_ids] = {};
  std::unique_ptr<test::aligned_block> aside_{};
};

/// Draws calls.
class caller {
 public:
  caller(pair& p, generator& g, limits const& lim, bool wide, std::map<std::string, int>& accepted)
      : p_(p), g_(g), lim_(lim), wide_(wide), accepted_(accepted) {}

  void one_call() {
    index_t const id = g_.integer(0, n_ids - 1), l = g_.integer(0, n_layers - 1);
    switch (g_.integer(0, 15)) {
      case 0:
        return note("begin", p_.begin(id, frozen()));
      case 1:
        return note("end", g_.chance(0.3F) && p_.end(id));
      case 2:
        return note("fork", p_.fork(id, frozen()));
      case 3:
        return note("reload", p_.reload(id, g_.integer(0, n_ids - 1)));
      case 4:
      case 5:
        return chunk(l, id, g_.integer(1, 9));
      case 6:
        return note("end_layer", p_.end_layer(l, id));
      case 7:
        return note("end_prompt", p_.end_prompt(id));
      case 8:
        return drafts(some());
      case 9:
        return note("plan", p_.plan(some()));
      case 10:
        return whole_prompt(id);
      default:
        return tokens();
    }
  }

 private:
  void note(char const* name, bool accepted) {
    if (accepted) ++accepted_[name];
  }
  index_t frozen() { return g_.chance(0.2F) ? g_.integer(1, 4) : 0; }
  own_batch some() {
    auto ids = g_.choose(g_.integer(1, 2), n_ids);
    return p_.batch_of(std::move(ids));
  }
  /// After a gap there are the queries of a whole window.
  void chunk(index_t l, index_t id, index_t n) {
    bool const gap = n >= 4 && g_.chance(0.2F);
    note("prompt", p_.prompt(l, id, gap ? n + 5 : n, n));
  }
  void drafts(own_batch const& b) {
    std::vector<index_t> accepted;
    for (std::size_t i = 0; i < b.ids.size(); ++i) accepted.push_back(g_.integer(0, 2));
    if (lim_.max_draft > 0) note("confirm", p_.confirm(b, accepted));
  }
  void whole_prompt(index_t id) {
    note("begin", p_.begin(id, frozen()));
    bool const layers = p_.host.backwards || lim_.max_prompt > 0 || g_.chance(0.5F);
    index_t const n = g_.integer(1, 30), first = g_.integer(1, n);
    for (index_t l = 0; l < n_layers; ++l) {
      note("prompt", p_.prompt(l, id, first, first));
      if (first < n) note("prompt", p_.prompt(l, id, n - first, n - first));
      if (layers) note("end_layer", p_.end_layer(l, id));
    }
    if (!layers) note("end_prompt", p_.end_prompt(id));
  }
  void tokens() {
    own_batch const b = some();
    for (index_t t = g_.integer(1, 6); t > 0; --t) token(b);
  }
  /// In all layers, or, where it is left or comes to, in some.
  void token(own_batch const& b) {
    if (lim_.engine_commits) note("append_at", p_.append_at(b));
    index_t const left = g_.chance(0.1F) ? g_.integer(0, n_layers - 1) : -1;
    for (index_t l = 0; l < n_layers; ++l)
      if (l != left && !(wide_ && p_.skips_a_layer(l, b))) in_layer(l, b);
    if (lim_.max_draft > 0 && g_.chance(0.4F)) drafts(b);
    if (lim_.engine_commits && g_.chance(0.7F)) note("plan", p_.plan(b));
  }
  void in_layer(index_t l, own_batch const& b) {
    bool const attends = lim_.decode == decode_offer::attend;
    if (attends && !lim_.engine_commits && g_.chance(0.3F)) return note("decode", p_.decode(l, b));
    if (!lim_.engine_commits) note("append", p_.append(l, b));
    if (attends) note("attend", p_.attend(l, b, g_.chance(0.2F)));
    if (lim_.decode == decode_offer::attention_rows) note("rows", p_.show_rows(l, b));
  }

  pair& p_;
  generator& g_;
  limits const& lim_;
  bool wide_;
  std::map<std::string, int>& accepted_;
};

struct policies {
  char const* prompt;
  char const* decode;
  bool current = false, masks = false;
  scope per = scope::head;
};

void run(policies const& p, limits const& lim, generator& g, std::map<std::string, int>& accepted) {
  policy_options o = test::small(12);
  o.include_current = p.current;
  o.per_head_mask = p.masks;
  o.per = p.per;
  test::world w;
  w.shape.n_seq = n_ids;
  w.n_layers = n_layers;
  w.lim = lim;
  w.draft = lim.max_draft;
  do  // a device session does not write behind host functions
    w.layout = g.one_of(test::all_layouts());
  while (w.layout == test::layout_id::custom);
  w.seed = g.next();
  auto e = w.options(test::make(p.decode, o), room);
  e.lim.max_sequences = n_ids;
  auto const words = w.words();
  std::string const refused =
      test::refusal([&] { pair const tried(e, words, p.prompt, p.decode, o); });
  INFO("refused: " << refused);
  if (refused != "accepted") return;
  pair both(e, words, p.prompt, p.decode, o);
  both.host.backwards = both.device.backwards = lim.max_prompt == 0 && g.chance(0.5F);
  if (g.chance(0.3F)) both.decide_aside();
  caller c(both, g, e.lim, p.per == scope::sequence, accepted);
  int const calls = test::host_reads_rows ? 150 : 40;
  for (int i = 0; i < calls; ++i) {
    INFO("call " << i);
    c.one_call();
    both.compare();
  }
}

}  // namespace

TEST_CASE("a device session does what a session does, in any order of calls") {
  policies const all[] = {{"fullkv", "fullkv"},
                          {"snapkv", "morphkv"},
                          {"morphkv", "morphkv"},
                          {"morphkv", "morphkv", true},
                          {"morphkv", "morphkv", true, true},
                          {"h2o", "h2o"},
                          {"tova", "tova"},
                          {"knorm", "knorm"},
                          {"knorm", "knorm", false, false, scope::sequence},
                          {"h2o", "h2o", false, false, scope::sequence},
                          {"streamingllm", "streamingllm"},
                          {"dynamickv", "streamingllm"},
                          {"cake", "morphkv"},
                          {"keydiff", "keydiff"},
                          {"expected_attention", "h2o"}};
  std::map<std::string, int> accepted;
  std::uint64_t n = 0;  // each draws other calls
  for (policies const& p : all)
    for (limits const& lim : test::all_ways({}, room))
      test::for_seeds(1, [&](generator& g) {
        INFO(p.prompt << ", " << p.decode << (p.current ? ", include_current" : "")
                      << (p.masks ? ", per_head_mask" : "") << ", per " << to_string(p.per)
                      << ", drafts " << lim.max_draft << ", " << to_string(lim.decode)
                      << (lim.engine_commits ? ", commits" : "")
                      << (lim.max_prompt > 0 ? ", buffer" : ""));
        generator own(g.next() + ++n);
        run(p, lim, own, accepted);
      });
  for (char const* name : {"begin", "end", "fork", "reload", "prompt", "end_layer", "end_prompt",
                           "append", "attend", "rows", "decode", "confirm", "append_at", "plan"}) {
    INFO(name << " " << accepted[name]);
    CHECK(accepted[name] > 2);
  }
}
