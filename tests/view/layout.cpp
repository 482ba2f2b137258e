// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
// Offsets of every layout against the naive formula, the feature map, tags and erased layouts.
#include <kvkeep/view/layout.hpp>

#include "../support/any_layout.hpp"

namespace {

using namespace kvkeep;
using test::generator;

struct no_offset {
  index_t capacity(index_t, index_t) const { return 1; }
};
struct narrow_offset {
  index_t offset(index_t, index_t, index_t) const { return 0; }
  index_t capacity(index_t, index_t) const { return 1; }
};
struct owning : test::ring_layout {
  std::vector<index_t> own;
};

/// The layout read through its tag.
offset_t offset_of(any_layout const& l, index_t s, index_t h, index_t t) {
  return visit_layout(l, [&](auto const& x) { return x.offset(s, h, t); });
}
index_t capacity_of(any_layout const& l, index_t s, index_t h) {
  return visit_layout(l, [&](auto const& x) { return x.capacity(s, h); });
}

}  // namespace

TEST_CASE("layouts are values, and the concept refuses what is not a layout") {
  STATIC_REQUIRE(slot_layout<strided_layout>);
  STATIC_REQUIRE(slot_layout<paged_layout>);
  STATIC_REQUIRE(slot_layout<ragged_layout>);
  STATIC_REQUIRE(slot_layout<custom_layout>);
  STATIC_REQUIRE(slot_layout<test::ring_layout>);
  STATIC_REQUIRE_FALSE(slot_layout<no_offset>);
  STATIC_REQUIRE_FALSE(slot_layout<narrow_offset>);
  STATIC_REQUIRE_FALSE(slot_layout<owning>);
  STATIC_REQUIRE(std::is_trivially_copyable_v<any_layout>);
  STATIC_REQUIRE(std::is_trivially_copyable_v<feature_map>);
}

TEST_CASE("the feature map follows its formula and knows when it is contiguous") {
  test::for_seeds(100, [](generator& g) {
    feature_map const m{g.integer(0, 12), g.integer(-3, 40), g.integer(-50, 500)};
    for (index_t d = 0; d < 40; ++d) {
      offset_t const naive =
          m.tile == 0 ? d * m.inner : (d / m.tile) * m.outer + (d % m.tile) * m.inner;
      REQUIRE(m(d) == naive);
    }
    index_t const dim = g.integer(1, 30);
    bool one_by_one = true;
    for (index_t d = 0; d < dim; ++d) one_by_one = one_by_one && m(d) == d;
    INFO("tile " << m.tile << " inner " << m.inner << " outer " << m.outer << " dim " << dim);
    if (m.contiguous(dim)) CHECK(one_by_one);
    if (dim > 1 && m.inner != 1 && m.tile != 1) CHECK_FALSE(m.contiguous(dim));
  });
  CHECK(feature_map{}.contiguous(128));
  CHECK(feature_map{8, 1, 8}.contiguous(64));
  CHECK(feature_map{64, 1, 999}.contiguous(64));
  CHECK_FALSE(feature_map{8, 1, 128}.contiguous(64));
  CHECK_FALSE(feature_map{0, 16, 0}.contiguous(64));
  CHECK(feature_map{0, 3'000'000'000, 0}(2) == 6'000'000'000);
}

TEST_CASE("strided, paged and ragged offsets equal the naive formula in 64 bits") {
  test::for_seeds(50, [](generator& g) {
    auto const big = [&] { return static_cast<offset_t>(g.next() % (1u << 30)); };
    strided_layout const st{big(), big(), big(), g.integer(1, 1000)};
    std::vector<index_t> const table = g.permutation(24);
    paged_layout pg;
    pg.table = table.data();
    pg.table_seq_stride = 12;
    pg.table_head_stride = g.chance(0.5F) ? 4 : 0;
    pg.blocks_per_table = 4;
    pg.block_size = g.integer(1, 20);
    pg.n_blocks = 24;
    pg.block_stride = big();
    pg.head_stride = big();
    pg.slot_stride = big();
    std::vector<offset_t> base(6);
    for (offset_t& b : base) b = big() * 1000;
    std::vector<index_t> const slots = g.permutation(6);
    ragged_layout const rg{base.data(), slots.data(), 3, big()};
    for (int i = 0; i < 50; ++i) {
      index_t const s = g.integer(0, 1), h = g.integer(0, 2);
      index_t const t = g.integer(0, 4 * pg.block_size - 1);
      REQUIRE(st.offset(s, h, t) == s * st.seq_stride + h * st.head_stride + t * st.slot_stride);
      REQUIRE(st.capacity(s, h) == st.slots);
      offset_t const block = table[test::uz(s * 12 + h * pg.table_head_stride + t / pg.block_size)];
      REQUIRE(pg.offset(s, h, t) ==
              block * pg.block_stride + h * pg.head_stride + (t % pg.block_size) * pg.slot_stride);
      REQUIRE(pg.entry(s, h, t / pg.block_size) == block);
      REQUIRE(pg.capacity(s, h) == 4 * pg.block_size);
      REQUIRE(rg.offset(s, h, t) == base[test::uz(s * 3 + h)] + t * rg.slot_stride);
      REQUIRE(rg.capacity(s, h) == slots[test::uz(s * 3 + h)]);
      for (any_layout const& l : {any_layout(st), any_layout(pg), any_layout(rg)}) {
        offset_t const direct = l.kind == layout_kind::strided ? st.offset(s, h, t)
                                : l.kind == layout_kind::paged ? pg.offset(s, h, t)
                                                               : rg.offset(s, h, t);
        REQUIRE(offset_of(l, s, h, t) == direct);
      }
    }
  });
}

TEST_CASE("an engine's own layout is reached through the erased one") {
  test::ring_layout const own{3, 7, 2, 16};
  any_layout const tagged(erase_layout(own));
  CHECK(tagged.kind == layout_kind::custom);
  for (index_t s = 0; s < 2; ++s)
    for (index_t h = 0; h < 3; ++h)
      for (index_t t = 0; t < 7; ++t) CHECK(offset_of(tagged, s, h, t) == own.offset(s, h, t));
  CHECK(capacity_of(tagged, 1, 2) == 7);
}

TEST_CASE("the tag names its kind and defaults to strided") {
  CHECK(any_layout().kind == layout_kind::strided);
  CHECK(any_layout(paged_layout{}).kind == layout_kind::paged);
  CHECK(any_layout(ragged_layout{}).kind == layout_kind::ragged);
  CHECK(std::string(to_string(layout_kind::strided)) == "strided");
  CHECK(std::string(to_string(layout_kind::paged)) == "paged");
  CHECK(std::string(to_string(layout_kind::ragged)) == "ragged");
  CHECK(std::string(to_string(layout_kind::custom)) == "custom");
}

TEST_CASE("in every test layout the library finds each element where it was put") {
  test::for_seeds(6, [](generator& g) {
    cache_shape const shape{g.integer(1, 3), 6, 3, g.integer(1, 20), g.integer(1, 20),
                            g.integer(1, 14)};
    for (test::layout_id const layout : test::all_layouts())
      for (dtype const type : test::all_dtypes()) {
        INFO(layout << " " << type);
        auto const cache = test::test_cache::make(layout, type, shape, g.next());
        for (auto const* plane : {&cache.k(), &cache.v()}) {
          plane_ref<> const p = plane->ref();
          bool all = true;
          for (index_t s = 0; s < shape.n_seq; ++s)
            for (index_t h = 0; h < 3; ++h) {
              all = all && capacity_of(p.layout, s, h) >= plane->capacity(s, h);
              for (index_t t = 0; t < plane->capacity(s, h); ++t)
                all = all && offset_of(p.layout, s, h, t) == plane->row_offset(s, h, t);
            }
          for (index_t d = 0; d < p.dim; ++d)
            all = all && p.features(d) == plane->feature_offset(d);
          CHECK(all);
        }
        CHECK(cache.canaries_intact());
      }
  });
}
