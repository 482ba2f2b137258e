// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
// A prompt policy beside a decode policy, and every kind of evidence that an engine may bring.
#include "../support/catch.hpp"
#include "../support/prompt_reference.hpp"
#include "../support/session_run.hpp"

using namespace kvkeep;
using namespace kvkeep::test;

namespace {

struct pair_case {
  char const* prompt;
  policy_options p;
  char const* decode;
  policy_options d;
};

/// The decode policy's oracle, starting from what the prompt policy left.
std::unique_ptr<reference> decode_reference(pair_case const& c, oracle::tokens const& t, index_t n,
                                            oracle::kept_sets const& live,
                                            oracle::counts const& capacity,
                                            oracle::attention_rule const& rule) {
  oracle::decode_rule r;
  r.head_capacity = capacity;
  r.attention = rule;
  std::string const name = c.decode;
  if (name == "morphkv") {
    oracle::morph_rule m;
    m.window = c.d.window.value();
    m.n_rows = m.window - 1;
    m.evict_after = c.d.evict_after;
    return make_reference<oracle::morph_decode>(false, t, r, m, live);
  }
  if (name == "h2o") {
    r.keep.recent = c.d.window.value();
    return make_reference<oracle::h2o_decode>(
        true, t, r, live, oracle::h2o_decode::prompt_acc(t, n, oracle::reduction::mean, rule));
  }
  if (name == "knorm") {
    r.keep = {c.d.sinks.value_or(0), c.d.window.value(), 0};
    return make_reference<oracle::knorm_decode>(true, t, r, live);
  }
  r.keep.sinks = c.d.sinks.value_or(4);
  return make_reference<oracle::streaming_decode>(false, t, r, live, true);
}

std::vector<pair_case> pairs() {
  policy_options p, d;
  p.capacity = 18;
  p.window = 6;
  p.r_max = 3;
  p.every = 2;
  d.capacity = 14;
  d.window = 4;
  d.sinks = 2;
  policy_options inherits = d, burst = d;
  inherits.budget = "inherit";
  burst.evict_after = 1.3;
  std::vector<pair_case> cases;
  for (char const* prompt :
       {"snapkv", "pyramidkv", "dynamickv", "cake", "adakv", "lagkv", "h2o", "expected_attention"})
    for (char const* decode : {"morphkv", "streamingllm", "h2o", "knorm"}) {
      policy_options x = p;
      if (std::string(prompt) == "lagkv") x.lag = 4, x.sinks = 2;
      cases.push_back({prompt, x, decode, inherits});
      cases.push_back({prompt, x, decode, d});
    }
  cases.push_back({"snapkv", p, "morphkv", burst});
  // One policy for both: its uneven budgets hold while decoding, too.
  for (char const* name : {"h2o", "knorm"})
    for (char const* budget : {"uniform", "pyramid", "dynamic", "ada"}) {
      policy_options x = p;
      x.budget = budget;
      cases.push_back({name, x, name, x});
    }
  return cases;
}

void run_pair(pair_case const& c, index_t prompt, bool transient, generator& g) {
  any const p = make(c.prompt, c.p), d = make(c.decode, c.d);
  prompt_reference const rule(c.prompt, c.p);
  bool const inherits = c.d.budget == "inherit" || p.key() == d.key();
  world w;
  w.n_layers = 3;
  w.prompt = prompt;
  w.n_tokens = prompt + 50;
  w.seed = g.next();
  if (transient) w.lim.max_prompt = prompt;
  text const words = w.words();
  engine e(w.options(d, std::max(prompt, 40)), p, d);
  stream s = e.begin(words);
  prompt_options how;
  if (g.chance(0.5F)) how.chunks = {prompt / 2, prompt - prompt / 2};
  e.prompt(s, prompt, how);
  REQUIRE(e.session().verify() == status::ok);
  std::vector<oracle::array> scores;
  for (auto const& l : words.layer) scores.push_back(rule.scores(l, prompt, e.rule()));
  auto const left = rule.kept(words, prompt, e.rule());
  auto const b = rule.budgets(scores, prompt, rule.preferences(words, prompt, e.rule()));
  bool const at_append =
      std::string(c.decode) == "morphkv" || std::string(c.decode) == "streamingllm";
  std::vector<std::unique_ptr<reference>> refs;
  index_t ties = 0;
  for (index_t l = 0; l < w.n_layers; ++l) {
    INFO("layer " << l);
    // StreamingLLM has made room for the next token already.
    if (inherits && std::string(c.decode) != "streamingllm") REQUIRE(e.kept(l, s) == left[uz(l)]);
    oracle::counts capacity(uz(w.shape.n_kv_heads), inherits ? c.p.capacity : c.d.capacity);
    if (inherits && prompt >= c.p.capacity) capacity = b[uz(l)];
    refs.push_back(
        decode_reference(c, words.layer[uz(l)], prompt, left[uz(l)], capacity, e.rule()));
    refs.back()->end_prompt(prompt - 1);
    if (!at_append) REQUIRE(refs.back()->agrees(e.kept(l, s), ties));
  }
  for (index_t step = 0; step < 50; ++step) {
    auto const r = e.step({&s});
    for (index_t l = 0; l < w.n_layers; ++l) {
      INFO("step " << step << " layer " << l);
      (void)refs[uz(l)]->step(s.tokens - 1);
      auto const& got = at_append ? r[uz(l)].appended : r[uz(l)].done;
      bool const same = refs[uz(l)]->agrees(got, ties);
      if (!same) CHECK(got == refs[uz(l)]->live());
      REQUIRE(same);
    }
    e.check({&s});
  }
  CHECK(ties <= 1);
}

/// A run with the session's attention, as the yardstick of other evidence.
std::vector<oracle::kept_sets> attended(decode_case const& c, world const& w, text const& words) {
  engine e(w.options(c.policy), c.policy);
  stream s = e.begin(words);
  e.prompt(s, w.prompt);
  std::vector<oracle::kept_sets> sets;
  for (index_t i = 0; i < 40; ++i) sets.push_back(e.step({&s})[0].done);
  return sets;
}

/// Appends a token and writes its K and V.
void append_one(engine& e, world const& w, stream& s) {
  std::vector<index_t> slots(uz(w.shape.n_kv_heads));
  REQUIRE(e.session().append(0, engine::batch_of({&s}).batch(), slots.data()) == status::ok);
  for (index_t h = 0; h < w.shape.n_kv_heads; ++h)
    e.write(e.cache(0), s, s.row, 0, h, slots[uz(h)], s.tokens);
}

}  // namespace

TEST_CASE("prompt and decode policies side by side follow both oracles") {
  for (pair_case const& c : pairs())
    for_seeds(1, [&](generator& g) {
      for (index_t const prompt : {45, 18, 17, 5}) {
        INFO(c.prompt << " + " << c.decode << " " << c.d.budget << " T " << prompt);
        run_pair(c, prompt, false, g);
        if (prompt == 45) run_pair(c, prompt, true, g);
      }
    });
}

TEST_CASE("an engine that attends itself brings queries or attention rows") {
  for (decode_case const& c : all_decode_cases()) {
    if (!is_plain(c)) continue;
    world w;
    w.n_layers = 1;
    text const words = w.words();
    auto const want = attended(c, w, words);
    bool const rows_serve = c.name.find("h2o") == 0 || c.name.find("tova") == 0;
    for (bool const rows : {false, true}) {
      if (rows && !rows_serve) continue;
      INFO(c.name << (rows ? ", attention rows" : ", queries"));
      world x = w;
      if (rows) x.lim.decode = decode_offer::attention_rows;
      engine e(x.options(c.policy), c.policy);
      stream s = e.begin(words);
      e.prompt(s, w.prompt);
      auto const b = engine::batch_of({&s});
      for (std::size_t i = 0; i < want.size(); ++i) {
        append_one(e, w, s);
        if (!rows) {
          auto const q = e.query_rows(s, 0, s.tokens, 1);
          REQUIRE(e.session().observe(
                      0, b.batch(), make_queries(q.data(), w.shape.n_q_heads, 1, w.shape.dim_k)) ==
                  status::ok);
        } else {
          index_t const slots = e.cache(0).shape().max_slots, heads = w.shape.n_q_heads;
          std::vector<float> a(uz(heads * (slots + 3)), -1);
          auto const live = e.kept(0, s);
          for (index_t h = 0; h < heads; ++h) {
            index_t const c_head = h / w.shape.group();
            auto const p = oracle::row_probs(words.layer[0].q, h, s.tokens, words.layer[0].k,
                                             live[uz(c_head)], e.rule());
            for (index_t t = 0; t < e.session().lengths(0)(s.id, c_head); ++t) {
              index_t const at = e.session().positions(0)(s.id, c_head, t);
              auto const it = std::find(live[uz(c_head)].begin(), live[uz(c_head)].end(), at);
              a[uz(h * (slots + 3) + t)] = static_cast<float>(p[uz(it - live[uz(c_head)].begin())]);
            }
          }
          attention_rows const r{a.data(), 0, slots + 3};
          REQUIRE(e.session().observe(0, b.batch(), r) == status::ok);
        }
        REQUIRE(e.session().confirm(b.batch(), 1) == status::ok);
        ++s.tokens;
        INFO("step " << i);
        REQUIRE(e.kept(0, s) == want[i]);
        e.check({&s});
      }
    }
  }
}

TEST_CASE("policies that look at no query need none") {
  for (decode_case const& c : all_decode_cases()) {
    auto const t = c.policy.score.traits();
    if (t.decode == evidence::token_queries) continue;
    INFO(c.name);
    world w;
    w.n_layers = 1;
    text const words = w.words();
    auto const want = attended(c, w, words);
    world x = w;
    x.lim.prompt = prompt_offer::nothing;
    x.lim.decode = decode_offer::nothing;
    engine e(x.options(c.policy), c.policy);
    stream s = e.begin(words);
    prompt_options how;
    how.queries = false;
    how.chunks = {20, w.prompt - 20};
    e.prompt(s, w.prompt, how);
    for (std::size_t i = 0; i < want.size(); ++i) REQUIRE(e.step({&s})[0].done == want[i]);
    e.check({&s});
  }
}

TEST_CASE("scores of the engine's own decide, and move with their slots") {
  policy<engine_score> typed;
  typed.name = "engine";
  typed.budget.tokens = 12;
  typed.keep = {1, 2};
  any const p = erase_policy<cpu::context>(typed);
  for_seeds(6, [&](generator& g) {
    world w;
    w.n_layers = 2;
    w.seed = g.next();
    w.lim.prompt = prompt_offer::scores;
    w.lim.decode = decode_offer::scores;
    text const words = w.words();
    engine e(w.options(p), p);
    stream s = e.begin(words);
    auto const b = engine::batch_of({&s});
    index_t const heads = w.shape.n_kv_heads, slots = e.cache(0).shape().max_slots;
    oracle::guard const keep{1, 2, 0};
    std::vector<float> x(uz(heads * slots));
    // Draws a score for every slot in use; returns those of the live positions, ascending.
    auto const draw = [&](index_t l, index_t h, oracle::kept_set const& live) {
      std::vector<double> by_position(live.size());
      for (index_t t = 0; t < e.session().lengths(l)(s.id, h); ++t) {
        x[uz(h * slots + t)] = g.normal();
        index_t const at = e.session().positions(l)(s.id, h, t);
        auto const it = std::find(live.begin(), live.end(), at);
        if (it != live.end())
          by_position[uz(it - live.begin())] = static_cast<double>(x[uz(h * slots + t)]);
      }
      return by_position;
    };
    own_scores const given{x.data(), static_cast<offset_t>(heads) * slots, slots};
    prompt_options how;
    how.queries = false;
    for (index_t l = 0; l < 2; ++l) {
      e.observe_prompt(s, l, w.prompt, how);
      oracle::kept_sets want;
      for (index_t h = 0; h < heads; ++h) {
        auto const all = oracle::iota_positions(w.prompt);
        want.push_back(oracle::select(draw(l, h, all), all, 12, keep));
      }
      REQUIRE(e.session().observe(l, s.id, given) == status::ok);
      REQUIRE(e.end_layer(s, l) == status::ok);
      REQUIRE(e.kept(l, s) == want);
    }
    s.tokens = w.prompt;
    for (index_t step = 0; step < 40; ++step) {
      std::vector<oracle::kept_sets> want(2);
      for (index_t l = 0; l < 2; ++l) {
        std::vector<index_t> slot(uz(heads));
        REQUIRE(e.session().append(l, b.batch(), slot.data()) == status::ok);
        for (index_t h = 0; h < heads; ++h)
          e.write(e.cache(l), s, s.row, l, h, slot[uz(h)], s.tokens);
        auto const live = e.kept(l, s);
        for (index_t h = 0; h < heads; ++h)
          want[uz(l)].push_back(oracle::select(draw(l, h, live[uz(h)]), live[uz(h)], 12, keep));
        REQUIRE(e.session().observe(l, b.batch(), given) == status::ok);
      }
      REQUIRE(e.session().confirm(b.batch(), 1) == status::ok);
      ++s.tokens;
      for (index_t l = 0; l < 2; ++l) REQUIRE(e.kept(l, s) == want[uz(l)]);
      e.check({&s});
    }
  });
}
