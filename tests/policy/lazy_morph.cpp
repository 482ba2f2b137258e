// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
// MorphKV's lazy evaluation against the oracle: long sequences, and inputs made to spoil its bounds.
#include "../support/catch.hpp"
#include "../support/decode_reference.hpp"

using namespace kvkeep;
using namespace kvkeep::test;

namespace {

/// What a sequence's queries and keys look like.
enum class scenery { plain, drifting, few_keys, no_queries, one_dominates, huge, jumps };

std::ostream& operator<<(std::ostream& out, scenery s) {
  constexpr char const* names[] = {"plain",         "drifting", "few keys", "no queries",
                                   "one dominates", "huge",     "jumps"};
  return out << names[static_cast<int>(s)];
}

struct lazy_run {
  cache_shape shape{1, 8, 2, 16, 8, 0};
  policy_options policy;
  scenery look = scenery::plain;
  layout_id layout = layout_id::hnd;
  dtype type = dtype::f32;
  index_t prompt = 70;
  index_t steps = 200;
  std::uint64_t seed = 1;
};

/// A random text whose queries and keys follow the scenery: directions in common, and ones that move.
text make_scene(lazy_run const& o) {
  generator g(o.seed);
  index_t const n = o.prompt + o.steps, dim = o.shape.dim_k;
  std::vector<std::vector<float>> topic;
  for (index_t p = 0; p < n; ++p) {
    bool const turn = p == 0 || (o.look == scenery::jumps && p % 40 == 0);
    topic.push_back(g.normals(uz(dim), 2));
    for (index_t d = 0; d < dim && !turn; ++d)
      topic[uz(p)][uz(d)] = 0.97F * topic[uz(p - 1)][uz(d)] + 0.1F * topic[uz(p)][uz(d)];
  }
  std::vector<float> const fixed = g.normals(uz(dim));
  bool const moving = o.look == scenery::drifting || o.look == scenery::jumps;
  std::vector<std::vector<float>> first_keys;
  text t = make_text(g, o.shape, 1, n, o.type, 1, [&](index_t, std::vector<float>& k, index_t p) {
    for (index_t d = 0; d < dim; ++d) {
      if (moving) k[uz(d)] = 0.6F * k[uz(d)] + topic[uz(p)][uz(d)];
      if (o.look == scenery::one_dominates && p % 60 == 59) k[uz(d)] += 6 * fixed[uz(d)];
    }
    if (first_keys.size() < 5) first_keys.push_back(k);
    if (o.look == scenery::few_keys) k = first_keys[uz(p) % first_keys.size()];
  });
  oracle::array& q = t.layer[0].q;
  for (index_t h = 0; h < o.shape.n_q_heads; ++h)
    for (index_t p = 0; p < n; ++p)
      for (index_t d = 0; d < dim; ++d) {
        auto x = static_cast<float>(q.at(h, p, d));
        if (o.look == scenery::no_queries) x = 0;
        if (o.look == scenery::huge) x *= 30;
        if (o.look == scenery::one_dominates) x = 0.3F * x + fixed[uz(d)];
        if (moving) x = 0.4F * x + topic[uz(p)][uz(d)];
        q.at(h, p, d) = static_cast<double>(x);
      }
  return t;
}

/// Runs beside the oracle. @return near-ties that had to be followed
index_t against_oracle(lazy_run const& o) {
  text const words = make_scene(o);
  decode_case const c = morph_case("lazy", o.policy);
  engine_options x;
  x.cache.layout = o.layout;
  x.cache.type = o.type;
  x.cache.shape = o.shape;
  x.cache.shape.max_slots = std::max(o.prompt, o.policy.capacity) + 4;
  engine e(x, c.policy);
  stream s = e.begin(words);
  e.prompt(s, o.prompt);
  auto const ref = c.make(words.layer[0], o.prompt, e.rule());
  ref->end_prompt(o.prompt - 1);
  index_t ties = 0;
  for (index_t step = 0; step < o.steps; ++step) {
    token_record const t = e.step({&s}).front();
    ref->step(s.tokens - 1);
    INFO("step " << step);
    bool const same = ref->agrees(t.appended, ties);
    if (!same) CHECK(t.appended == ref->live());
    REQUIRE(same);
    if (step % 16 == 0) REQUIRE(e.session().verify() == status::ok);
  }
  return ties;
}

}  // namespace

TEST_CASE("lazy victims are the oracle's, whatever keys and queries look like") {
  for (scenery look : {scenery::plain, scenery::drifting, scenery::few_keys, scenery::no_queries,
                       scenery::one_dominates, scenery::huge, scenery::jumps})
    for (reduction fusion : {reduction::sum, reduction::max})
      for (index_t group : {1, 4}) {
        lazy_run o;
        o.look = look;
        o.shape.n_q_heads = 2 * group;
        o.policy.evaluation = morph_rows::lazy;
        o.policy.fusion = fusion;
        o.policy.capacity = 60;
        o.policy.window = 16;
        o.seed = 5 + static_cast<std::uint64_t>(group);
        INFO(look << ", " << to_string(fusion) << ", group " << group);
        against_oracle(o);
      }
}

TEST_CASE("lazy victims are the oracle's for random sizes, layouts and element types") {
  index_t ties = 0;
  for_seeds(20, [&](generator& g) {
    lazy_run o;
    index_t const heads = g.integer(1, 2), groups[] = {1, 2, 3, 8}, dims[] = {4, 12, 16, 40};
    o.shape = {1, heads * g.one_of(groups), heads, g.one_of(dims), 4, 0};
    o.policy.evaluation = morph_rows::lazy;
    o.policy.fusion = g.chance(0.5F) ? reduction::sum : reduction::max;
    o.policy.window = g.integer(8, 20);
    o.policy.n_rows = g.chance(0.3F) ? g.integer(1, *o.policy.window) : 0;
    o.policy.capacity = *o.policy.window + g.integer(1, 150);
    index_t const prompts[] = {1, *o.policy.window, o.policy.capacity, o.policy.capacity + 1,
                               o.policy.capacity + 40};
    o.prompt = g.one_of(prompts);
    o.steps = std::max(0, o.policy.capacity - o.prompt) + 90;
    scenery const looks[] = {scenery::plain, scenery::drifting, scenery::jumps};
    o.look = g.one_of(looks);
    o.layout = g.one_of(all_layouts());
    o.type = g.one_of(all_dtypes());
    o.seed = g.next();
    INFO(o.look << " C " << o.policy.capacity << " W " << *o.policy.window << " rows "
                << o.policy.n_rows << " T " << o.prompt << " " << o.layout << " " << o.type);
    ties += against_oracle(o);
  });
  CHECK(ties <= 3);
}
