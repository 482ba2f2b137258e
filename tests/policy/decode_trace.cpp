// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
// Decode traces of every policy against the oracle, in every element type and layout.
#include "../support/catch.hpp"
#include "../support/decode_reference.hpp"

using namespace kvkeep;
using namespace kvkeep::test;

namespace {

struct run_options {
  cache_shape shape{3, 4, 2, 8, 12, 0};
  layout_id layout = layout_id::hnd;
  dtype type = dtype::f32;
  index_t n_layers = 2;
  std::vector<index_t> prompts{33, 9};
  index_t n_steps = 64;
  std::uint64_t seed = 1;
  float softcap = 0;
};

/// Everything that a run showed: `[step][layer * streams + stream]`.
using trace = std::vector<std::vector<token_record>>;

struct run_context {
  std::vector<text> texts;
  engine e;
  std::vector<stream> streams;

  static engine_options options(run_options const& o, any const& p, index_t longest) {
    engine_options x;
    x.cache.layout = o.layout;
    x.cache.type = o.type;
    x.cache.shape = o.shape;
    x.cache.seed = o.seed;
    x.cache.shape.max_slots = longest + 2 + detail::decode_slots(p.budget.capacity(), p.when);
    x.n_layers = o.n_layers;
    x.lim.max_chunk = 7;
    return x;
  }
  static std::vector<text> make_texts(run_options const& o) {
    std::vector<text> t;
    generator g(o.seed);
    for (index_t n : o.prompts)
      t.push_back(make_text(g, o.shape, o.n_layers, n + o.n_steps, o.type));
    return t;
  }
  run_context(run_options const& o, any const& p)
      : texts(make_texts(o)),
        e(options(o, p, *std::max_element(o.prompts.begin(), o.prompts.end())), p) {}

  /// Prompts, then steps of both streams; every ninth step leaves the last stream out.
  template <class F, class G>
  void run(run_options const& o, F&& after_prompt, G&& after_step) {
    for (text const& t : texts) streams.push_back(e.begin(t));
    for (std::size_t i = 0; i < streams.size(); ++i) {
      e.prompt(streams[i], o.prompts[i]);
      after_prompt(i);
    }
    e.check({&streams[0]});
    for (index_t step = 0; step < o.n_steps; ++step) {
      std::vector<stream*> who;
      for (stream& s : streams) who.push_back(&s);
      if (step % 9 == 8 && who.size() > 1) who.pop_back();
      after_step(e.step(who), oracle::count(who));
      REQUIRE(e.session().verify() == status::ok);
      if (step % 8 == 7) {
        std::vector<stream const*> all;
        for (stream const& s : streams) all.push_back(&s);
        e.check(all);
      }
    }
  }
};

bool near_out(std::vector<float> const& a, std::vector<double> const& b) {
  if (a.size() != b.size()) return false;
  for (std::size_t i = 0; i < a.size(); ++i)
    if (std::abs(static_cast<double>(a[i]) - b[i]) > 2e-5 + 1e-4 * std::abs(b[i])) return false;
  return true;
}
bool near_out(std::vector<float> const& a, std::vector<float> const& b) {
  return near_out(a, std::vector<double>(b.begin(), b.end()));
}

/// Runs one case beside the oracle. Returns how many near-ties had to be followed.
index_t against_oracle(decode_case const& c, run_options const& o, trace* record) {
  run_context r(o, c.policy);
  std::vector<std::unique_ptr<reference>> refs;
  index_t ties = 0, step = 0;
  auto const ref = [&](index_t l, std::size_t i) -> reference& {
    return *refs[i * uz(o.n_layers) + uz(l)];
  };
  r.run(
      o,
      [&](std::size_t i) {
        for (index_t l = 0; l < o.n_layers; ++l) {
          refs.push_back(c.make(r.texts[i].layer[uz(l)], o.prompts[i], r.e.rule()));
          refs.back()->end_prompt(o.prompts[i] - 1);
          INFO("end of prompt, stream " << i << ", layer " << l);
          if (!c.at_append && !c.policy.when.before_attention && !c.policy.when.per_head_mask)
            REQUIRE(refs.back()->agrees(r.e.kept(l, r.streams[i]), ties));
        }
      },
      [&](std::vector<token_record> const& records, index_t n) {
        for (index_t l = 0; l < o.n_layers; ++l)
          for (index_t i = 0; i < n; ++i) {
            token_record const& t = records[uz(l * n + i)];
            reference& mine = ref(l, uz(i));
            oracle::step_result const want = mine.step(r.streams[uz(i)].tokens - 1);
            auto const& got = c.at_append ? t.appended : t.done;
            INFO("step " << step << ", stream " << i << ", layer " << l);
            index_t const before = ties;
            bool const same = mine.agrees(got, ties);
            if (!same) CHECK(got == mine.live());
            REQUIRE(same);
            if (ties == before) REQUIRE(near_out(t.out, want.out.data));
          }
        if (record) record->push_back(records);
        ++step;
      });
  return ties;
}

/// Another layout keeps exactly the same tokens.
void against_trace(decode_case const& c, run_options const& o, trace const& want) {
  run_context r(o, c.policy);
  std::size_t step = 0;
  r.run(
      o, [](std::size_t) {},
      [&](std::vector<token_record> const& records, index_t) {
        INFO("step " << step);
        for (std::size_t i = 0; i < records.size(); ++i) {
          bool const same = records[i].appended == want[step][i].appended &&
                            records[i].done == want[step][i].done;
          if (!same) CHECK(records[i].done == want[step][i].done);
          REQUIRE(same);
          REQUIRE(near_out(records[i].out, want[step][i].out));
        }
        ++step;
      });
}

}  // namespace

TEST_CASE("decode traces equal the oracle in every element type, and agree in every layout") {
  index_t ties = 0;
  for (decode_case const& c : all_decode_cases())
    for (dtype type : all_dtypes()) {
      run_options o;
      o.type = type;
      o.seed = 11 + static_cast<std::uint64_t>(type);
      INFO(c.name << ", " << to_string(type) << ", seed " << o.seed);
      trace want;
      ties += against_oracle(c, o, &want);
      for (layout_id layout : all_layouts()) {
        if (layout == layout_id::hnd) continue;
        INFO("layout " << layout);
        o.layout = layout;
        against_trace(c, o, want);
      }
    }
  CHECK(ties <= 3);  // of more than 20000 decisions
}

TEST_CASE("decode traces equal the oracle for random shapes, capacities and prompts") {
  index_t ties = 0;
  for_seeds(24, [&](generator& g) {
    run_options o;
    index_t const heads = g.integer(1, 3), groups[] = {1, 2, 4};
    index_t const dims[] = {4, 8, 16, 20};
    o.shape = {3, heads * g.one_of(groups), heads, g.one_of(dims), g.one_of(dims), 0};
    decode_sizes z;
    z.window = g.integer(2, 12);
    z.sinks = g.integer(0, 3);
    z.capacity = z.window + z.sinks + g.integer(1, 14);
    o.n_layers = g.integer(1, 2);
    o.n_steps = 60;
    index_t const near_capacity[] = {
        1, z.window, z.capacity - 1, z.capacity, z.capacity + 1, z.capacity + 2, g.integer(1, 60)};
    o.prompts = {g.one_of(near_capacity), g.one_of(near_capacity)};
    o.seed = g.next();
    o.type = g.one_of(all_dtypes());
    auto const cases = all_decode_cases(z);
    decode_case const& c = cases[uz(g.integer(0, oracle::count(cases) - 1))];
    INFO(c.name << " C " << z.capacity << " W " << z.window << " S " << z.sinks << " T "
                << o.prompts[0] << ", " << o.prompts[1] << " " << o.type);
    ties += against_oracle(c, o, nullptr);
  });
  CHECK(ties <= 3);
}
