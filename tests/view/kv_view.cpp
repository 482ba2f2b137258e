// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
// Typed views become tagged ones without loss; the makers of common views; memory spaces are types.
#include <kvkeep/view/kv_view.hpp>

#include <kvkeep/view/check.hpp>
#include <kvkeep/view/evidence.hpp>

#include "../support/any_layout.hpp"

namespace {

using namespace kvkeep;
using test::generator;

cache_shape random_shape(generator& g) {
  index_t const heads = g.integer(1, 4);
  return {g.integer(1, 3), heads * g.integer(1, 3), heads,
          g.integer(1, 9), g.integer(1, 9),         g.integer(1, 12)};
}

template <class F>
void each_slot(cache_shape const& s, F&& f) {
  for (index_t b = 0; b < s.n_seq; ++b)
    for (index_t h = 0; h < s.n_kv_heads; ++h)
      for (index_t t = 0; t < s.max_slots; ++t) f(b, h, t);
}

offset_t offset_of(plane_ref<> const& p, index_t s, index_t h, index_t t) {
  return visit_layout(p.layout, [&](auto const& l) { return l.offset(s, h, t); });
}

}  // namespace

TEST_CASE("contiguous views address [seq, head, slot, dim] and [seq, slot, head, dim]") {
  test::for_seeds(20, [](generator& g) {
    cache_shape const s = random_shape(g);
    std::vector<float> k(test::uz(s.n_seq * s.n_kv_heads * s.max_slots * s.dim_k));
    std::vector<float> v(test::uz(s.n_seq * s.n_kv_heads * s.max_slots * s.dim_v));
    auto const hnd = contiguous_view(k.data(), v.data(), s).ref();
    auto const nhd = contiguous_view(k.data(), v.data(), s, axis_order::nhd).ref();
    each_slot(s, [&](index_t b, index_t h, index_t t) {
      offset_t const row_h = (b * s.n_kv_heads + h) * s.max_slots + t;
      offset_t const row_n = (b * s.max_slots + t) * s.n_kv_heads + h;
      REQUIRE(offset_of(hnd.k, b, h, t) == row_h * s.dim_k);
      REQUIRE(offset_of(hnd.v, b, h, t) == row_h * s.dim_v);
      REQUIRE(offset_of(nhd.k, b, h, t) == row_n * s.dim_k);
      REQUIRE(offset_of(nhd.v, b, h, t) == row_n * s.dim_v);
    });
    CHECK_NOTHROW(check_view(hnd));
    CHECK_NOTHROW(check_view(nhd));
  });
}

TEST_CASE("paged views address blocks in both orders, with shared and per-head tables") {
  test::for_seeds(20, [](generator& g) {
    cache_shape const s = random_shape(g);
    page_geometry p;
    p.block_size = g.integer(1, 5);
    p.blocks_per_table = (s.max_slots + p.block_size - 1) / p.block_size;
    p.table_per_head = g.chance(0.5F);
    p.order = g.chance(0.5F) ? axis_order::nhd : axis_order::hnd;
    index_t const entries = s.n_seq * p.blocks_per_table * (p.table_per_head ? s.n_kv_heads : 1);
    p.n_blocks = entries + 2;
    auto const table = g.choose(entries, p.n_blocks);
    p.table = table.data();
    fp16 k{}, v{};
    auto const ref = paged_view(&k, &v, s, p).ref();
    each_slot(s, [&](index_t b, index_t h, index_t t) {
      index_t const owner = p.table_per_head ? b * s.n_kv_heads + h : b;
      offset_t const block = table[test::uz(owner * p.blocks_per_table + t / p.block_size)];
      offset_t const row = p.order == axis_order::nhd
                               ? (block * p.block_size + t % p.block_size) * s.n_kv_heads + h
                               : (block * s.n_kv_heads + h) * p.block_size + t % p.block_size;
      REQUIRE(offset_of(ref.k, b, h, t) == row * s.dim_k);
      REQUIRE(offset_of(ref.v, b, h, t) == row * s.dim_v);
    });
    CHECK_NOTHROW(check_view(ref));
  });
}

TEST_CASE("ragged views address a base per sequence and head") {
  cache_shape const s{2, 2, 2, 3, 5, 4};
  offset_t const k_base[] = {30, 0, 15, 45}, v_base[] = {0, 25, 50, 75};
  index_t const slots[] = {4, 2, 0, 3};
  bf16 k{}, v{};
  auto const ref = ragged_view(&k, &v, s, k_base, v_base, slots).ref();
  CHECK(offset_of(ref.k, 1, 1, 2) == 45 + 2 * 3);
  CHECK(offset_of(ref.v, 0, 1, 1) == 25 + 5);
  CHECK(visit_layout(ref.k.layout, [](auto const& l) { return l.capacity(1, 0); }) == 0);
  CHECK_NOTHROW(check_view(ref));
}

TEST_CASE("a typed view becomes a tagged one without loss") {
  float sinks[4] = {};
  float k{};
  std::byte v{};
  kv_view<float, host_space, strided_layout, paged_layout, std::byte> view;
  view.shape = {1, 4, 2, 8, 6, 10};
  view.k = &k;
  view.v = &v;
  view.k_layout = {1000, 400, 16, 10};
  view.v_layout.block_size = 5;
  view.k_features = {4, 1, 8};
  view.v_row_bytes = 10;
  view.v_reader = {test::read_int8_row, &sinks};
  view.softcap = 30;
  view.sink_logits = sinks;
  kv_ref<> const r = view;
  CHECK(r.shape == view.shape);
  CHECK(r.k.data == reinterpret_cast<std::byte*>(&k));
  CHECK(r.v.data == &v);
  CHECK(r.k.type == dtype::f32);
  CHECK(r.v.type == dtype::opaque);
  CHECK((r.k.dim == 8 && r.v.dim == 6));
  CHECK((r.k.row_bytes == 32 && r.v.row_bytes == 10));
  CHECK((r.k.features.tile == 4 && r.k.features.outer == 8));
  CHECK_FALSE(r.k.contiguous());
  CHECK(r.v.contiguous());
  CHECK(r.v.reader.read == test::read_int8_row);
  CHECK(r.v.reader.user == &sinks);
  CHECK((r.k.layout.kind == layout_kind::strided && r.k.layout.strided.head_stride == 400));
  CHECK((r.v.layout.kind == layout_kind::paged && r.v.layout.paged.block_size == 5));
  CHECK(r.scale == Approx(1 / std::sqrt(8.0)));
  CHECK(r.softcap == 30);
  CHECK(r.sink_logits == sinks);
  view.scale = 0.25F;
  CHECK(view.ref().scale == 0.25F);
}

TEST_CASE("makers of views of opaque rows ask for their bytes") {
  cache_shape const s{2, 4, 2, 8, 6, 10};
  std::byte* const b = nullptr;
  index_t const table[4] = {0, 1, 2, 3}, slots[4] = {3, 0, 5, 2};
  offset_t const k_base[4] = {0, 50, 70, 200}, v_base[4] = {5, 25, 25, 90};
  page_geometry const pages{5, 4, table, 2};
  opaque_rows const bytes{12, 7};
  auto const same_rows = [&](kv_ref<> const& kv) {
    return kv.k.type == dtype::opaque && kv.k.row_bytes == 12 && kv.v.row_bytes == 7;
  };
  kv_ref<> const strided = contiguous_view(b, b, s, bytes, axis_order::nhd);
  CHECK(same_rows(strided));
  CHECK(offset_of(strided.k, 1, 1, 3) == ((10 + 3) * 2 + 1) * 12);
  CHECK(offset_of(strided.v, 0, 1, 3) == (3 * 2 + 1) * 7);
  kv_ref<> const paged = paged_view(b, b, s, pages, bytes);
  CHECK(same_rows(paged));
  CHECK(offset_of(paged.k, 1, 1, 6) == (3 * 10 + 2 * 1 + 1) * 12);
  kv_ref<> const ragged = ragged_view(b, b, s, k_base, v_base, slots, bytes);
  CHECK(same_rows(ragged));
  CHECK(offset_of(ragged.v, 1, 1, 1) == 90 + 7);
  // Without them, rows would be as far apart as their features are many.
  auto const plain = [](auto* x, auto const& shape) {
    return requires { contiguous_view(x, x, shape); };
  };
  CHECK(plain(static_cast<float*>(nullptr), s));
  CHECK_FALSE(plain(b, s));
}

TEST_CASE("an engine's own layout goes through kv_view as custom") {
  kv_view<bf16, host_space, test::ring_layout, strided_layout> view;
  bf16 k{}, v{};
  view.shape = {2, 2, 2, 4, 4, 5};
  view.k = &k;
  view.v = &v;
  view.k_layout = {2, 5, 3, 4};
  view.v_layout = contiguous_layout(view.shape, 4, axis_order::hnd);
  kv_ref<> const r = view;
  CHECK(r.k.layout.kind == layout_kind::custom);
  CHECK(r.v.layout.kind == layout_kind::strided);
  CHECK(r.k.row_bytes == 8);
  each_slot(view.shape, [&](index_t s, index_t h, index_t t) {
    CHECK(offset_of(r.k, s, h, t) == view.k_layout.offset(s, h, t));
  });
  CHECK_NOTHROW(check_view(r));
}

TEST_CASE("memory spaces are different types that do not convert") {
  STATIC_REQUIRE_FALSE(std::is_convertible_v<kv_ref<device_space>, kv_ref<host_space>>);
  STATIC_REQUIRE_FALSE(std::is_constructible_v<kv_ref<host_space>, kv_ref<device_space>>);
  STATIC_REQUIRE_FALSE(std::is_convertible_v<kv_view<float, device_space>, kv_ref<host_space>>);
  STATIC_REQUIRE(std::is_convertible_v<kv_view<float, device_space>, kv_ref<device_space>>);
  STATIC_REQUIRE_FALSE(std::is_convertible_v<layer_ref<device_space>, layer_ref<host_space>>);
  STATIC_REQUIRE(std::is_same_v<kv_ref<device_space>::space, device_space>);
  STATIC_REQUIRE(memory_space<host_space>);
  STATIC_REQUIRE_FALSE(memory_space<int>);
  STATIC_REQUIRE(std::is_trivially_copyable_v<kv_ref<device_space>>);
  STATIC_REQUIRE(std::is_trivially_copyable_v<layer_ref<>>);
  STATIC_REQUIRE(std::is_trivially_copyable_v<batch_ref<>>);
}

TEST_CASE("a batch without rows or ids means entry b is row b") {
  batch_ref<> b;
  b.n = 3;
  CHECK((b.row_of(2) == 2 && b.id_of(1) == 1));
  index_t const rows[] = {2, 0, 1}, ids[] = {7, 5, 6};
  b.row = rows;
  b.id = ids;
  CHECK((b.row_of(0) == 2 && b.id_of(2) == 6));
}

TEST_CASE("contiguous queries and tokens without queries") {
  std::vector<bf16> const q(2 * 4 * 3 * 8);
  float const lse[2 * 4 * 3] = {};
  queries const r = make_queries(q.data(), 4, 3, 8, lse, log_base::two);
  CHECK(r.type == dtype::bf16);
  CHECK((r.entry_stride == 96 && r.head_stride == 24 && r.row_stride == 8));
  CHECK((r.lse == lse && r.lse_entry_stride == 12 && r.lse_head_stride == 3));
  CHECK(r.lse_base == log_base::two);
  CHECK(r.n_tokens() == 3);
  queries window = r;
  window.tokens = 100;
  CHECK(window.n_tokens() == 100);
  CHECK(tokens_only(5).n_tokens() == 5);
  CHECK(tokens_only(5).data == nullptr);
  CHECK(std::string(to_string(evidence::none)) == "none");
  CHECK(std::string(to_string(evidence::all_queries)) == "all_queries");
  CHECK(std::string(to_string(evidence::token_queries)) == "token_queries");
}
