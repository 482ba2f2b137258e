// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
// How ops find a backend: traits, memory spaces, and the one constraint that a missing op fails.
#include <kvkeep/backend/cpu/reduce.hpp>
#include <kvkeep/backend/cpu/score_slots.hpp>
#include <kvkeep/op/compact.hpp>

#include "../support/run_op.hpp"

namespace other {

/// A backend of the user's own with one op.
struct context {
  int calls = 0;
};
inline kvkeep::status enqueue(context& c, kvkeep::op::mean_heads<> const&, kvkeep::workspace& w) {
  w.take<float>(100);
  c.calls += w.measuring() ? 0 : 1;
  return w.ok() ? kvkeep::status::ok : kvkeep::status::workspace_too_small;
}

struct constant {
  static constexpr bool reads_k = false, reads_v = false;
  KVKEEP_HD float operator()(kvkeep::slot_values const&) const { return 1; }
};

}  // namespace other

template <>
struct kvkeep::backend_traits<other::context> {
  using space = kvkeep::host_space;
  static constexpr char const* name = "other";
};

namespace {

using namespace kvkeep;

struct no_backend {};

}  // namespace

TEST_CASE("a backend has traits; an op runs where its memory is and where it exists") {
  STATIC_REQUIRE(backend<cpu::context>);
  STATIC_REQUIRE(backend<other::context>);
  STATIC_REQUIRE_FALSE(backend<no_backend>);
  STATIC_REQUIRE(std::is_same_v<space_of<cpu::context>, host_space>);
  CHECK(std::string(backend_traits<cpu::context>::name) == "cpu");

  STATIC_REQUIRE(runs<cpu::context, op::mean_heads<>>);
  STATIC_REQUIRE(runs<cpu::context, op::score_slots<other::constant>>);
  STATIC_REQUIRE_FALSE(runs<cpu::context, op::mean_heads<device_space>>);
  STATIC_REQUIRE_FALSE(same_memory<cpu::context, op::mean_heads<device_space>>);
  STATIC_REQUIRE(same_memory<cpu::context, op::compact<>>);

  STATIC_REQUIRE(runs<other::context, op::mean_heads<>>);
  STATIC_REQUIRE_FALSE(runs<other::context, op::compact<>>);
  STATIC_REQUIRE_FALSE(runs<other::context, op::score_slots<other::constant>>);
}

TEST_CASE("run hands the op to the context's enqueue") {
  other::context c;
  op::mean_heads<> const o{};
  workspace measure;
  CHECK(run(c, o, measure) == status::ok);
  CHECK(c.calls == 0);
  test::aligned_block const block(measure.peak());
  workspace place(block.span());
  CHECK(run(c, o, place) == status::ok);
  CHECK(c.calls == 1);
  workspace small(block.span(1));
  CHECK(run(c, o, small) == status::workspace_too_small);
}

TEST_CASE("reductions and moves have names") {
  CHECK(std::string(to_string(reduction::sum)) == "sum");
  CHECK(std::string(to_string(reduction::mean)) == "mean");
  CHECK(std::string(to_string(reduction::max)) == "max");
}
