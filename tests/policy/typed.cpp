// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
// Typed policies: a user's own scorer and its session, the same results as the policy made by name,
// and the size of a policy's header.
#include <filesystem>
#include <fstream>

#include "../support/catch.hpp"
#include "../support/session_run.hpp"

using namespace kvkeep;
using namespace kvkeep::test;

namespace {

/// A policy of the user's own: the largest first value stays.
struct first_value_fn {
  static constexpr char const* name = "first_value";
  static constexpr bool reads_k = false;
  static constexpr bool reads_v = true;
  KVKEEP_HD float operator()(slot_values const& s) const noexcept { return s.v[0]; }
};
using first_value = policy<slot_score<first_value_fn>, per_layer>;

index_t lines_of(std::filesystem::path const& path) {
  std::ifstream in(path);
  REQUIRE(in.good());
  index_t n = 0;
  for (std::string line; std::getline(in, line);) ++n;
  return n;
}

std::string policy_folder() {
  std::string const here = __FILE__;
  return here.substr(0, here.rfind("/tests/")) + "/include/kvkeep/policy/";
}

}  // namespace

TEST_CASE("a user's own scorer and budget in a typed session") {
  first_value p;
  p.name = "first_value";
  p.budget.n = 2;
  p.budget.tokens[0] = 7;
  p.budget.tokens[1] = 5;
  p.keep = {1, 2};
  for_seeds(4, [&](generator& g) {
    cache_shape const shape{2, 4, 2, 4, 6, 40};
    text const words = make_text(g, shape, 2, 40);
    std::vector<test_cache> caches;
    std::vector<layer_spec<>> specs;
    for (std::uint64_t l = 0; l < 2; ++l)
      caches.push_back(test_cache::make(layout_id::padded, dtype::f32, shape, l));
    for (auto const& c : caches) specs.push_back({c.ref()});
    cpu::context ctx;
    limits lim;
    lim.prompt = prompt_offer::nothing;
    lim.decode = decode_offer::nothing;
    auto s = bind_session(ctx, p, std::span<layer_spec<> const>(specs), lim);
    index_t id = -1;
    REQUIRE(s.begin(id) == status::ok);
    auto const write = [&](index_t l, index_t h, index_t slot, index_t position) {
      std::vector<float> k, v;
      for (double x : words.layer[uz(l)].k.row(h, position)) k.push_back(static_cast<float>(x));
      for (double x : words.layer[uz(l)].v.row(h, position)) v.push_back(static_cast<float>(x));
      caches[uz(l)].set_k(id, h, slot, k);
      caches[uz(l)].set_v(id, h, slot, v);
    };
    std::vector<oracle::kept_sets> live(2, oracle::kept_sets(2, oracle::iota_positions(20)));
    auto const cut = [&] {
      for (index_t l = 0; l < 2; ++l)
        for (index_t h = 0; h < 2; ++h) {
          auto& mine = live[uz(l)][uz(h)];
          std::vector<double> score;
          for (index_t at : mine) score.push_back(words.layer[uz(l)].v.at(h, at, 0));
          mine = oracle::select(score, mine, p.budget.tokens[l], {1, 2, 0});
          std::vector<index_t> got;
          for (index_t t = 0; t < s.lengths(l)(id, h); ++t)
            if (t != s.free_slots(l)(id, h)) got.push_back(s.positions(l)(id, h, t));
          std::sort(got.begin(), got.end());
          REQUIRE(got == mine);
        }
      REQUIRE(s.verify() == status::ok);
    };
    for (index_t l = 0; l < 2; ++l) {
      for (index_t h = 0; h < 2; ++h)
        for (index_t t = 0; t < 20; ++t) write(l, h, t, t);
      REQUIRE(s.observe(l, id, tokens_only(20)) == status::ok);
    }
    REQUIRE(s.end_prompt(id) == status::ok);
    cut();
    index_t const ids[] = {id};
    for (index_t at = 20; at < 40; ++at) {
      for (index_t l = 0; l < 2; ++l) {
        std::vector<index_t> slots(2);
        REQUIRE(s.append(l, {ids, {}}, slots.data()) == status::ok);
        for (index_t h = 0; h < 2; ++h) {
          write(l, h, slots[uz(h)], at);
          live[uz(l)][uz(h)].push_back(at);
        }
      }
      REQUIRE(s.confirm({ids, {}}, 1) == status::ok);
      cut();
    }
  });
}

TEST_CASE("the list of policies says what they can do") {
  std::vector<std::string> names;
  list_policies([&](policy_info const& i) {
    INFO(i.name);
    names.push_back(i.name);
    policy_options o;
    o.capacity = 64;
    o.window = 8;
    any const p = make(i.name, o);
    CHECK(std::string(p.name) == i.name);
    CHECK(p.score.traits().prompt == i.prompt);
    CHECK(p.score.traits().draft_safe == i.draft_safe);
    for (parameter_info const& x : i.parameters) CHECK(x.least <= x.most);
    bool const decodes = names.back() == "streamingllm" || names.back() == "h2o" ||
                         names.back() == "observed_attention" || names.back() == "tova" ||
                         names.back() == "morphkv" || names.back() == "knorm" ||
                         names.back() == "keydiff";
    CHECK(i.at_decode == decodes);
    CHECK(i.at_prompt == (names.back() != "fullkv"));
    CHECK(i.per_head == (names.back() != "tova"));
    CHECK(i.per_layer == (names.back() != "adakv"));
    bool const uneven = names.back() == "pyramidkv" || names.back() == "dynamickv" ||
                        names.back() == "adakv" || names.back() == "cake";
    CHECK(i.per_sequence == !uneven);
  });
}

TEST_CASE("a policy by name has the options of its maker where none are given") {
  std::vector<std::string> compared, listed;
  auto const same = [&](auto const& p) {
    INFO(p.name);
    compared.emplace_back(p.name);
    any const named = make(p.name), made = erase_policy<cpu::context>(p);
    CHECK(named.key() == made.key());
    CHECK(named.keep.sinks == made.keep.sinks);
    CHECK(named.keep.recent == made.keep.recent);
    CHECK(named.budget.capacity() == made.budget.capacity());
  };
  same(make_fullkv());
  same(make_streamingllm({}));
  same(make_snapkv({}));
  same(make_pyramidkv({}));
  same(make_dynamickv({}));
  same(make_cake({}));
  same(make_adakv({}));
  same(make_h2o({}));
  same(make_observed_attention(uniform{}.tokens));
  same(make_tova({}));
  same(make_morphkv({}));
  same(make_knorm({}));
  same(make_keydiff({}));
  same(make_lagkv({}));
  same(make_expected_attention({}));
  list_policies([&](policy_info const& i) { listed.emplace_back(i.name); });
  CHECK(compared == listed);
}

TEST_CASE("a budget by name has the options of its struct where none are given") {
  auto const same = [](char const* name, auto const& budget) {
    INFO(name);
    policy_options o;
    o.budget = name;
    any named = make("snapkv", o), made = named;
    made.budget = budget;
    CHECK(named.key() == made.key());
  };
  same("uniform", uniform{});
  same("pyramid", pyramid{});
  same("dynamic", dynamic_layers{});
  same("cake", cake_layers{});
  same("ada", ada_heads{});
  same("inherit", inherit{});
}

TEST_CASE("no policy takes more tokens than its range of a parameter says") {
  cache_shape const shape{1, 4, 2, 8, 6, 40};
  list_policies([&](policy_info const& i) {
    for (parameter_info const& x : i.parameters) {
      if (x.most < 1 << 20 || x.most > most_tokens) continue;  // of other numbers
      auto const message = [&](index_t value) {
        policy_options o;
        o.capacity = most_tokens;
        std::string const name = x.name;
        if (name == "capacity") o.capacity = value;
        if (name == "window") o.window = value;
        if (name == "sinks") o.sinks = value;
        if (name == "lag") o.lag = value;
        if (name == "ahead") o.ahead = value;
        if (name == "n_rows") o.n_rows = value, o.window = most_tokens - 1;
        return refusal([&] { check_policy(make(i.name, o), 2, shape); });
      };
      INFO(i.name << " " << x.name);
      auto const most = static_cast<index_t>(x.most);
      std::string const field = std::string(x.name) + " = ";
      CHECK(message(most + 1).find(field + std::to_string(most + 1)) != std::string::npos);
      if (std::string_view(x.name) == "n_rows") continue;  // at most the window
      std::string const at_most = message(most);
      bool const other = at_most.find(field) == std::string::npos;
      CHECK((other || at_most.find("> sinks + window") != std::string::npos));
    }
  });
}

TEST_CASE("a different configuration has a different key") {
  policy_options const base;
  std::vector<std::uint64_t> keys;
  auto const add = [&](std::string_view name, auto&& edit) {
    policy_options o = base;
    edit(o);
    keys.push_back(make(name, o).key());
  };
  list_policies([&](policy_info const& i) { add(i.name, [](auto&) {}); });
  add("snapkv", [](auto& o) { o.capacity = 99; });
  add("snapkv", [](auto& o) { o.window = 9; });
  add("snapkv", [](auto& o) { o.kernel = 9; });
  add("snapkv", [](auto& o) { o.pooling = op::pooling::maximum; });
  add("snapkv", [](auto& o) { o.sinks = 1; });
  add("snapkv", [](auto& o) { o.per = scope::layer; });
  add("snapkv", [](auto& o) { o.block = 16; });
  add("snapkv", [](auto& o) { o.block = 16, o.whole_blocks = true; });
  add("morphkv", [](auto& o) { o.fusion = reduction::max; });
  add("morphkv", [](auto& o) { o.evict_after = 1.5; });
  add("morphkv", [](auto& o) { o.n_rows = 3; });
  add("morphkv", [](auto& o) { o.include_current = true; });
  add("morphkv", [](auto& o) { o.evaluation = morph_rows::direct; });
  add("adakv", [](auto& o) { o.alpha = 0.5; });
  add("dynamickv", [](auto& o) { o.every = 2; });
  add("cake", [](auto& o) { o.every = 2; });
  add("cake", [](auto& o) { o.gamma = 100; });
  add("cake", [](auto& o) { o.tau1 = 1.6; });
  add("cake", [](auto& o) { o.tau2 = 1.6; });
  add("cake", [](auto& o) { o.kernel = 7; });
  add("cake", [](auto& o) { o.published = true; });
  add("expected_attention", [](auto& o) { o.rotation.theta = 5e5; });
  add("expected_attention", [](auto& o) { o.rotation.dims = 4; });
  add("expected_attention", [](auto& o) { o.rotation.interleaved = true; });
  float const frequency = 1;
  add("expected_attention", [&](auto& o) { o.rotation.frequencies = &frequency; });
  add("expected_attention", [](auto& o) { o.epsilon = 0.1; });
  add("expected_attention", [](auto& o) { o.rotated = false; });
  add("expected_attention", [](auto& o) { o.ahead = 64; });
  add("expected_attention", [](auto& o) { o.covariance = false; });
  add("expected_attention", [](auto& o) { o.value_norms = false; });
  auto sorted = keys;
  std::sort(sorted.begin(), sorted.end());
  CHECK(std::unique(sorted.begin(), sorted.end()) == sorted.end());
}

TEST_CASE("a policy is one header of less than 80 lines") {
  index_t headers = 0;
  for (auto const& file : std::filesystem::directory_iterator(policy_folder())) {
    INFO(file.path());
    ++headers;
    CHECK((file.path().filename() == "policy.hpp" || lines_of(file.path()) < 80));
  }
  CHECK(headers > 10);
}
