// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
// Every refusal of a view names the field, its value and the allowed range; good views pass.
#include <kvkeep/view/check.hpp>

#include <functional>

#include "../support/any_layout.hpp"

namespace {

using namespace kvkeep;
using test::layout_id;

constexpr cache_shape small{2, 4, 2, 8, 6, 10};
constexpr offset_t huge = std::numeric_limits<offset_t>::max();

std::string refusal(kv_ref<> const& kv) {
  try {
    check_view(kv, "layer[3]");
  } catch (std::invalid_argument const& e) {
    return e.what();
  }
  return "accepted";
}

bool contains(std::string const& text, std::string const& part) {
  return text.find(part) != std::string::npos;
}

/// A view of `layout` changed by `change` is refused with `field = value` and the range.
struct refusal_case {
  layout_id layout;
  std::function<void(kv_ref<>&)> change;
  std::string field_and_value;
  std::string allowed;
};

void check_cases(std::vector<refusal_case> const& cases, dtype type = dtype::f32) {
  for (refusal_case const& c : cases) {
    auto const cache = test::test_cache::make(c.layout, type, small);
    kv_ref<> kv = cache.ref();
    REQUIRE(refusal(kv) == "accepted");
    c.change(kv);
    std::string const text = refusal(kv);
    INFO(text << " for " << c.field_and_value);
    CHECK(contains(text, "kvkeep: " + c.field_and_value + ", allowed: "));
    CHECK(contains(text.substr(std::min(text.size(), text.find("allowed:"))), c.allowed));
  }
}

}  // namespace

TEST_CASE("shapes are refused by field") {
  auto const shape_case = [](index_t cache_shape::*field, index_t value, char const* name,
                             char const* allowed) {
    return refusal_case{layout_id::hnd, [=](kv_ref<>& kv) { kv.shape.*field = value; },
                        std::string("shape.") + name + " = " + std::to_string(value), allowed};
  };
  std::vector<refusal_case> cases;
  for (index_t const bad : {0, -1, std::numeric_limits<index_t>::min()}) {
    cases.push_back(shape_case(&cache_shape::n_seq, bad, "n_seq", ">= 1"));
    cases.push_back(shape_case(&cache_shape::n_q_heads, bad, "n_q_heads", ">= 1"));
    cases.push_back(shape_case(&cache_shape::n_kv_heads, bad, "n_kv_heads", ">= 1"));
    cases.push_back(shape_case(&cache_shape::dim_k, bad, "dim_k", ">= 1"));
    cases.push_back(shape_case(&cache_shape::dim_v, bad, "dim_v", ">= 1"));
    cases.push_back(shape_case(&cache_shape::max_slots, bad, "max_slots", ">= 1"));
  }
  cases.push_back(
      shape_case(&cache_shape::n_q_heads, 5, "n_q_heads", "a multiple of n_kv_heads = 2"));
  cases.push_back(shape_case(&cache_shape::n_q_heads, 1, "n_q_heads", "a multiple"));
  check_cases(cases);
}

TEST_CASE("planes that disagree with the shape, and bad scales, are refused") {
  float const nan = std::numeric_limits<float>::quiet_NaN();
  float const inf = std::numeric_limits<float>::infinity();
  check_cases({
      {layout_id::hnd, [](auto& kv) { kv.k.dim = 7; }, "layer[3].k.dim = 7", "8"},
      {layout_id::hnd, [](auto& kv) { kv.v.dim = 8; }, "layer[3].v.dim = 8", "6"},
      {layout_id::hnd, [](auto& kv) { kv.k.data = nullptr; }, "layer[3].k.data = null", "pointer"},
      {layout_id::hnd, [](auto& kv) { kv.v.data = nullptr; }, "layer[3].v.data = null", "pointer"},
      {layout_id::hnd, [](auto& kv) { kv.v.row_bytes = 0; }, "layer[3].v.row_bytes = 0", ">= 1"},
      {layout_id::hnd, [](auto& kv) { kv.scale = 0; }, "layer[3].scale = 0.000000", "> 0"},
      {layout_id::hnd, [](auto& kv) { kv.scale = -1; }, "layer[3].scale = -1.000000", "> 0"},
      {layout_id::hnd, [=](auto& kv) { kv.scale = inf; }, "layer[3].scale = inf", "finite"},
      {layout_id::hnd, [=](auto& kv) { kv.scale = nan; }, "layer[3].scale = nan", "> 0"},
      {layout_id::hnd, [](auto& kv) { kv.softcap = -2; }, "layer[3].softcap = -2.000000", ">= 0"},
      {layout_id::hnd, [=](auto& kv) { kv.softcap = nan; }, "layer[3].softcap = nan", ">= 0"},
      {layout_id::hnd, [=](auto& kv) { kv.softcap = inf; }, "layer[3].softcap = inf", "finite"},
  });
}

TEST_CASE("strides that overlap, vanish or overflow are refused") {
  check_cases({
      {layout_id::hnd, [](auto& kv) { kv.k.layout.strided.slots = 9; },
       "layer[3].k.layout.slots = 9", ">= max_slots = 10"},
      {layout_id::hnd, [](auto& kv) { kv.k.layout.strided.slot_stride = 7; },
       "layer[3].k.layout.slot_stride = 7", ">= 8"},
      {layout_id::hnd, [](auto& kv) { kv.v.layout.strided.slot_stride = 0; },
       "layer[3].v.layout.slot_stride = 0", ">= 1"},
      {layout_id::hnd, [](auto& kv) { kv.k.layout.strided.slot_stride = -8; },
       "layer[3].k.layout.slot_stride = -8", ">= 1"},
      {layout_id::hnd, [](auto& kv) { kv.k.layout.strided.head_stride = 79; },
       "layer[3].k.layout.head_stride = 79", ">= 80"},
      {layout_id::hnd, [](auto& kv) { kv.k.layout.strided.seq_stride = 159; },
       "layer[3].k.layout.seq_stride = 159", ">= 160"},
      {layout_id::nhd, [](auto& kv) { kv.v.layout.strided.head_stride = 5; },
       "layer[3].v.layout.head_stride = 5", ">= 6"},
      {layout_id::hnd, [](auto& kv) { kv.k.layout.strided.seq_stride = huge / 4; },
       "layer[3].k.layout.seq_stride = " + std::to_string(huge / 4), "2^63"},
      {layout_id::hnd, [](auto& kv) { kv.k.layout.strided.head_stride = huge; },
       "layer[3].k.layout.head_stride = " + std::to_string(huge), "2^63"},
      {layout_id::hnd, [](auto& kv) { kv.k.features.inner = 0; }, "layer[3].k.features.inner = 0",
       ">= 1"},
      {layout_id::hnd,
       [](auto& kv) {
         kv.k.features = {4, 1, 3};
       },
       "layer[3].k.features.outer = 3", ">= 4"},
      {layout_id::hnd,
       [](auto& kv) {
         kv.k.features = {-4, 1, 4};
       },
       "layer[3].k.features.tile = -4", ">= 0"},
      {layout_id::ragged, [](auto& kv) { kv.k.layout.ragged.slot_stride = 7; },
       "layer[3].k.layout.slot_stride = 7", ">= 8"},
  });
}

TEST_CASE("opaque rows are checked by their bytes") {
  check_cases({{layout_id::hnd, [](auto& kv) { kv.k.row_bytes = 13; },
                "layer[3].k.layout.slot_stride = 12", ">= 13"},
               {layout_id::hnd, [](auto& kv) { kv.v.row_bytes = -1; }, "layer[3].v.row_bytes = -1",
                ">= 1"}},
              dtype::opaque);
}

TEST_CASE("block tables are refused by field") {
  check_cases({
      {layout_id::paged, [](auto& kv) { kv.k.layout.paged.table = nullptr; },
       "layer[3].k.layout.table = null", "block table"},
      {layout_id::paged, [](auto& kv) { kv.k.layout.paged.block_size = 0; },
       "layer[3].k.layout.block_size = 0", ">= 1"},
      {layout_id::paged, [](auto& kv) { kv.v.layout.paged.n_blocks = 0; },
       "layer[3].v.layout.n_blocks = 0", ">= 1"},
      {layout_id::paged, [](auto& kv) { kv.v.layout.paged.blocks_per_table = 2; },
       "layer[3].v.layout.blocks_per_table = 2", "max_slots = 10"},
      {layout_id::paged, [](auto& kv) { kv.v.layout.paged.blocks_per_table = 0; },
       "layer[3].v.layout.blocks_per_table = 0", "max_slots = 10"},
      {layout_id::paged, [](auto& kv) { kv.k.layout.paged.blocks_per_table = 1 << 30; },
       "layer[3].k.layout.blocks_per_table = 1073741824", "2^31"},
      {layout_id::paged, [](auto& kv) { kv.k.layout.paged.table_seq_stride = -1; },
       "layer[3].k.layout.table_seq_stride = -1", ">= 0"},
      {layout_id::paged_per_head, [](auto& kv) { kv.k.layout.paged.table_head_stride = -1; },
       "layer[3].k.layout.table_head_stride = -1", ">= 0"},
      {layout_id::paged, [](auto& kv) { kv.k.layout.paged.slot_stride = 15; },
       "layer[3].k.layout.slot_stride = 15", ">= 16"},
      {layout_id::paged, [](auto& kv) { kv.k.layout.paged.block_stride = 63; },
       "layer[3].k.layout.block_stride = 63", ">= 64"},
      {layout_id::paged, [](auto& kv) { kv.k.layout.paged.block_stride = huge / 8; },
       "layer[3].k.layout.block_stride = " + std::to_string(huge / 8), "2^63"},
  });
}

TEST_CASE("a page of one head's own needs no stride between heads") {
  // With a table per head, blocks may be [slot, dim]: every block belongs to one head.
  auto const cache = test::test_cache::make(layout_id::paged_per_head, dtype::f32, small);
  kv_ref<> kv = cache.ref();
  for (plane_ref<>* p : {&kv.k, &kv.v}) {
    p->layout.paged.head_stride = 0;
    p->layout.paged.block_stride = p->layout.paged.block_size * p->layout.paged.slot_stride;
  }
  CHECK(refusal(kv) == "accepted");
  kv.k.layout.paged.table_head_stride = 0;
  CHECK(contains(refusal(kv), "layer[3].k.layout.head_stride = 0"));
}

TEST_CASE("ragged ranges are refused when absent, out of range or overlapping") {
  float data{};
  offset_t base[] = {100, 0, 200, 300};
  index_t slots[] = {10, 10, 5, 0};
  kv_ref<> kv = ragged_view(&data, &data, small, base, base, slots).ref();
  REQUIRE(refusal(kv) == "accepted");
  base[3] = 210;  // an empty range may lie anywhere
  CHECK(refusal(kv) == "accepted");

  base[1] = 21;
  CHECK(contains(refusal(kv), "layer[3].k.layout.base = 100, allowed: ranges that do not overlap"));
  base[1] = 100;
  CHECK(contains(refusal(kv), "layer[3].k.layout.base = 100, allowed: ranges"));
  base[1] = 20;
  CHECK(refusal(kv) == "accepted");
  base[1] = -1;
  CHECK(contains(refusal(kv), "layer[3].k.layout.base = -1, allowed: >= 0"));
  base[1] = huge - 3;
  CHECK(contains(refusal(kv), "layer[3].k.layout.base = " + std::to_string(huge - 3)));
  base[1] = 0;
  slots[2] = 11;
  CHECK(contains(refusal(kv), "layer[3].k.layout.slots = 11, allowed: 0..10"));
  slots[2] = -1;
  CHECK(contains(refusal(kv), "layer[3].k.layout.slots = -1, allowed: 0..10"));
  slots[2] = 5;
  kv.v.layout.ragged.n_kv_heads = 1;
  CHECK(contains(refusal(kv), "layer[3].v.layout.n_kv_heads = 1, allowed: 2"));
  kv.v.layout.ragged.n_kv_heads = 2;
  kv.v.layout.ragged.base = nullptr;
  CHECK(contains(refusal(kv), "layer[3].v.layout.base = null"));
}

TEST_CASE("an own layout without functions is refused") {
  check_cases({{layout_id::custom, [](auto& kv) { kv.k.layout.custom.offset_of = nullptr; },
                "layer[3].k.layout.custom = null", "slot_layout"},
               {layout_id::custom, [](auto& kv) { kv.v.layout.custom.capacity_of = nullptr; },
                "layer[3].v.layout.custom = null", "slot_layout"}});
}

TEST_CASE("device views are checked without reading device memory") {
  kv_ref<device_space> kv;
  auto* const nowhere = reinterpret_cast<std::byte*>(std::uintptr_t{64});
  offset_t const* const base = reinterpret_cast<offset_t const*>(nowhere);
  index_t const* const slots = reinterpret_cast<index_t const*>(nowhere);
  kv.shape = small;
  kv.scale = 1;
  kv.k.data = kv.v.data = nowhere;
  kv.k.dim = 8;
  kv.v.dim = 6;
  kv.k.row_bytes = 32;
  kv.v.row_bytes = 24;
  kv.k.layout = ragged_layout{base, slots, 2, 8};
  kv.v.layout = ragged_layout{base, slots, 2, 6};
  CHECK_NOTHROW(check_view(kv));
  kv.v.layout.ragged.slot_stride = 5;
  CHECK_THROWS_AS(check_view(kv), std::invalid_argument);
}

TEST_CASE("axes of extent one may have any stride") {
  cache_shape const one{1, 1, 1, 1, 1, 1};
  float data{};
  kv_ref<> kv = contiguous_view(&data, &data, one).ref();
  kv.k.layout.strided.seq_stride = 0;
  kv.k.layout.strided.head_stride = -5;
  kv.k.layout.strided.slot_stride = huge;
  CHECK(refusal(kv) == "accepted");
}
