// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
// What both kinds of session do alike, over plain arrays: plans, reports of tables, sets of sequences, set-up.
#include <kvkeep/kvkeep.hpp>

#include "../support/plain_model.hpp"

using namespace kvkeep;
using namespace kvkeep::test;

namespace {

constexpr index_t dim = plain_dim, block = plain_block;
using model = plain_model;

}  // namespace

TEMPLATE_TEST_CASE("a report has room for each table where tables differ", "", std::false_type,
                   std::true_type) {
  index_t const first = GENERATE(40, 8), second = 48 - first;
  model m;
  m.add_pages(first);
  m.add_pages(second);
  m.lim.max_prompt = 40;
  per_layer budget;
  budget.n = 2;
  budget.tokens[0] = first - 4;
  budget.tokens[1] = second - 4;
  auto s = m.bind(TestType{}, policy<slot_score<key_norm_fn>, per_layer>{"knorm", {}, budget});
  std::vector<float> prompt = numbers(40 * dim);
  cache_shape shape = m.shape(40);
  shape.n_seq = 1;
  kv_ref<> const view = contiguous_view(prompt.data(), prompt.data(), shape);
  for (index_t id : {0, 1}) {  // both: the first one's number is that of the buffer's row, too
    REQUIRE(s.begin(id) == status::ok);
    for (index_t l : {0, 1}) {
      REQUIRE(s.observe(l, id, tokens_only(40), &view) == status::ok);
      REQUIRE(s.end_prompt(l, id, &view) == status::ok);
    }
    std::vector<index_t> tables(12, -7), sizes(2), freed(12, -7), freed_of(2, -7);
    report_buffer out;
    out.tables = std::span(tables).first(10);
    out.table_sizes = sizes;
    out.freed = freed;
    out.freed_of = freed_of;
    if (second > first) CHECK(s.report(id, out) == status::bad_argument);
    CHECK(tables == std::vector<index_t>(12, -7));
    out.tables = tables;
    REQUIRE(s.report(id, out) == status::ok);
    CHECK(freed_of == std::vector<index_t>{0, 0});  // the prompt was never in these pages
    std::vector<index_t> want(12, -7);
    for (int l : {0, 1}) {
      index_t const each = (l == 0 ? first : second) / block;
      CHECK(sizes[uz(l)] == each - 1);
      for (index_t i = 0; i < each - 1; ++i)
        want[uz((l == 0 ? 0 : first / block) + i)] = 100 * l + id * each + i;
    }
    CHECK(tables == want);
  }
}

TEMPLATE_TEST_CASE("only the plan that was chosen last can be committed", "", std::false_type,
                   std::true_type) {
  model m;
  m.add(32);
  m.lim.engine_commits = true;
  m.lim.decode = decode_offer::nothing;
  auto s = m.bind(TestType{}, make_knorm({.capacity = 6}));
  one x{0}, y{0};
  for (one* b : {&x, &y}) {
    REQUIRE(s.begin(b->id) == status::ok);
    REQUIRE(s.observe(0, b->id, tokens_only(12)) == status::ok);
    REQUIRE(s.end_prompt(0, b->id) == status::ok);
    for (int t = 0; t < 3; ++t) {
      REQUIRE(s.append_at(of(s, *b)) == status::ok);
      if constexpr (TestType::value)
        REQUIRE(s.observe(0, b->device(), tokens_only(1)) == status::ok);
      else
        REQUIRE(s.confirm(b->host(), 1) == status::ok);
    }
  }
  plan<> a, b;
  REQUIRE(s.choose(of(s, x), a) == status::ok);
  REQUIRE(s.choose(of(s, y), b) == status::ok);
  CHECK(s.commit(a) == status::stale_plan);
  CHECK(s.lengths(0)(x.id, 0) == 9);
  CHECK(s.lengths(0)(y.id, 0) == 9);
  CHECK(s.commit(b) == status::ok);
  CHECK(s.lengths(0)(x.id, 0) == 9);
  CHECK(s.lengths(0)(y.id, 0) == 6);
}

TEMPLATE_TEST_CASE("nothing is chosen where nothing leaves", "", std::false_type, std::true_type) {
  model m;
  m.add(32);
  m.lim.engine_commits = true;
  auto s = m.bind(TestType{}, make_fullkv());
  one x{0};
  REQUIRE(s.begin(x.id) == status::ok);
  REQUIRE(s.observe(0, x.id, tokens_only(12)) == status::ok);
  REQUIRE(s.end_prompt(0, x.id) == status::ok);
  plan<> p;
  CHECK(s.choose(of(s, x), p) == status::unsupported);
}

TEMPLATE_TEST_CASE("one set per sequence by positions, in however many layers", "", std::false_type,
                   std::true_type) {
  model m;
  for (int l = 0; l < 28; ++l) m.add(128);
  m.lim.decode = decode_offer::nothing;
  auto p = make_streamingllm({.capacity = 32, .sinks = 4});
  p.per = scope::sequence;
  auto s = m.bind(TestType{}, p);
  one x{0};
  REQUIRE(s.begin(x.id) == status::ok);
  for (index_t l = 0; l < 28; ++l) REQUIRE(s.observe(l, x.id, tokens_only(100)) == status::ok);
  REQUIRE(s.end_prompt(x.id) == status::ok);
  for (int t = 0; t < 22; ++t) {
    std::vector<index_t> slots(1);
    for (index_t l = 0; l < 28; ++l) {
      REQUIRE(s.append(l, of(s, x), slots.data()) == status::ok);
      if constexpr (TestType::value)
        REQUIRE(s.observe(l, x.device(), tokens_only(1)) == status::ok);
    }
    if constexpr (!TestType::value) REQUIRE(s.confirm(x.host(), 1) == status::ok);
  }
  std::vector<index_t> kept;
  for (index_t t = 0; t < s.lengths(0)(x.id, 0); ++t)
    if (t != s.free_slots(0)(x.id, 0)) kept.push_back(s.positions(0)(x.id, 0, t));
  std::sort(kept.begin(), kept.end());
  std::vector<index_t> want{0, 1, 2, 3};
  for (index_t p0 = 122 - static_cast<index_t>(kept.size()) + 4; p0 < 122; ++p0) want.push_back(p0);
  CHECK(kept.size() >= 31);
  CHECK(kept == want);
}

TEST_CASE("views that cannot be are refused by both kinds of session") {
  bool const device = GENERATE(false, true);
  auto const said = [&](auto const& spoil) {
    model m;
    m.add_pages(16);
    kv_ref<>& view = m.specs[0].kv;
    view.v = view.k;
    spoil(view);
    return m.refusal_of(device, make_knorm({.capacity = 6}));
  };
  CHECK(said([](kv_ref<>&) {}) == "accepted");
  auto const names = [&](char const* field, auto const& spoil) {
    std::string const text = said(spoil);
    INFO(text);
    CHECK(text.find(field) != std::string::npos);
  };
  names("layers[0].scale", [](kv_ref<>& v) { v.scale = 0; });
  names("layers[0].softcap", [](kv_ref<>& v) { v.softcap = -1; });
  names("layers[0].k.data", [](kv_ref<>& v) { v.k.data = nullptr; });
  names("layers[0].k.dim", [](kv_ref<>& v) { v.k.dim = 4; });
  names("block_size", [](kv_ref<>& v) { v.k.layout.paged.block_size = 0; });
  names("table", [](kv_ref<>& v) { v.k.layout.paged.table = nullptr; });
  names("blocks_per_table", [](kv_ref<>& v) { v.k.layout.paged.blocks_per_table = 3; });
}

TEST_CASE("layers that share a table share the set of a sequence, where whole blocks leave") {
  bool const device = GENERATE(false, true);
  model m;
  m.lim.engine_commits = true;
  m.add_pages(32);
  m.specs.push_back(m.specs[0]);
  policy<slot_score<key_norm_fn>, uniform, whole_blocks> p{"knorm", {}, {12}, {block}, {}};
  p.per = scope::layer;
  CHECK(m.refusal_of(device, p).find("per = layer") != std::string::npos);
  p.per = scope::sequence;
  CHECK(m.refusal_of(device, p) == "accepted");
  m.specs.pop_back();
  m.add_pages(32);
  p.per = scope::layer;
  CHECK(m.refusal_of(device, p) == "accepted");
}

TEST_CASE("policies of different scorers are different configurations") {
  std::vector<std::uint64_t> const keys{
      make_knorm({.capacity = 32}).key(), make_keydiff({.capacity = 32}).key(),
      make_streamingllm({.capacity = 32, .sinks = 0}).key(), make_tova({.capacity = 32}).key()};
  for (std::size_t i = 0; i < keys.size(); ++i)
    for (std::size_t j = 0; j < i; ++j) CHECK(keys[i] != keys[j]);
}
