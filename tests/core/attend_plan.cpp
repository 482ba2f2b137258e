// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
// How the CUDA backend cuts attention up: every slot and query head once, scratch in 64 bits.
#include <kvkeep/backend/cuda/attend_plan.hpp>

#include "../support/random.hpp"

namespace {

using namespace kvkeep;
using cuda::attend_plan;

constexpr cache_shape shape_of(index_t heads, index_t group, index_t slots) {
  return {1, heads * group, heads, 128, 128, slots};
}

}  // namespace

TEST_CASE("splits cover all slots and tiles all query heads, without empty ones") {
  for (index_t slots : {0, 1, 255, 256, 257, 1024, 131072})
    for (index_t group = 1; group <= 71; ++group) {
      INFO("slots " << slots << " group " << group);
      attend_plan const p(shape_of(3, group, slots), 2, 5);
      CHECK(p.splits * cuda::split_slots >= slots);
      CHECK((p.splits - 1) * cuda::split_slots < std::max(slots, 1));
      CHECK(p.tiles * p.tile >= group);
      CHECK((p.tiles - 1) * p.tile < group);
      CHECK(p.split_grid().x == offset_t{2} * 3 * 5 * p.tiles);
      CHECK(p.merge_grid().x == offset_t{2} * 3 * 5 * group);
      CHECK(p.weights_grid(slots, 256).y * 256 >= slots);
    }
}

TEST_CASE("a plan fits a launch for 64 sequences of 128k slots, and for 200 query rows of each") {
  cache_shape const s = shape_of(8, 4, 131072);
  for (index_t rows : {1, 200}) {
    attend_plan const p(s, 64, rows);
    CHECK(p.split_grid().fits());
    CHECK(p.merge_grid().fits());
    CHECK(p.weights_grid(s.max_slots, 256).fits());
    CHECK(p.pieces() == std::size_t{64} * 32 * 512 * static_cast<std::size_t>(rows));
  }
}

TEST_CASE("numbers of pieces and values beyond 32 bits are counted") {
  attend_plan const p(shape_of(8, 8, 8 << 20), 64, 200);
  CHECK(p.splits == 32768);
  CHECK(p.pieces() == std::size_t{64} * 64 * 200 * 32768);
  CHECK(p.split_grid().fits());
}

TEST_CASE("a merge has a warp for each part that has splits") {
  auto const threads = [](index_t slots) {
    return attend_plan(shape_of(1, 1, slots), 1, 1).merge_grid().threads;
  };
  CHECK(threads(0) == 32);
  CHECK(threads(256) == 32);
  CHECK(threads(257) == 64);
  CHECK(threads(5 * 256) == 256);
  CHECK(threads(131072) == 256);
}

TEST_CASE("a tile holds the group, or as many of its heads as there are registers for") {
  for (index_t group = 1; group <= 20; ++group) {
    index_t const tile = cuda::tile_heads(group);
    CHECK((tile == 1 || tile == 4 || tile == cuda::most_tile_heads));
    CHECK((tile >= group || tile == cuda::most_tile_heads));
  }
}

TEST_CASE(
    "one block per head finishes attention where it has little to do, or there are enough of "
    "them") {
  auto const by_block = [](index_t entries, index_t slots) {
    return attend_plan(shape_of(8, 4, slots), entries, 1).one_block_merges(132);
  };
  CHECK(by_block(1, 1));
  CHECK(by_block(1, cuda::one_block_slots));
  CHECK(!by_block(1, cuda::one_block_slots + 1));
  CHECK(!by_block(16, 1 << 17));  // 128 heads
  CHECK(by_block(17, 1 << 17));
}

TEST_CASE("the least of some numbers") {
  CHECK(cuda::min_of(3) == 3);
  CHECK(cuda::min_of(512, 1024, 384, 400) == 384);
}

TEST_CASE("a head's block has a thread for eight slots, and for two where there is room") {
  using cuda::head_threads;
  for (offset_t slots : {0, 1, 64, 257, 1025, 4097, 8193, 131073})
    for (offset_t blocks : {1, 8, 132, 133, 512, 100000}) {
      INFO("slots " << slots << " blocks " << blocks);
      int const threads = head_threads(slots, blocks, 132);
      CHECK(cuda::head_grid(1, 1, 1, threads).fits());
      CHECK(threads >= cuda::threads_for(slots));
      bool const more = threads > cuda::threads_for(slots);
      CHECK((!more || (threads < slots && threads * ((blocks + 131) / 132) <= 1024)));
    }
  CHECK(head_threads(1025, 64, 132) == 1024);
  CHECK(head_threads(1025, 512, 132) == 256);
  CHECK(head_threads(1025, 4096, 132) == 256);
  CHECK(head_threads(1000, 4096, 132) == 128);
  CHECK(head_threads(1025, 512, 132, 512) == 256);
  CHECK(head_threads(1000, 512, 132, 512) == 128);
  CHECK(head_threads(40, 1, 132) == 64);
}

TEST_CASE("blocks that take parts in turns do not grow with what a head might hold") {
  for (int const n_sm : {1, 108, 132})
    for (index_t const heads : {1, 8, 128, 512, 100000})
      for (index_t const parts : {1, 4, 16, 2048, 1 << 20}) {
        INFO("SMs " << n_sm << " heads " << heads << " parts " << parts);
        offset_t const y = cuda::parts_in_turn(heads, parts, n_sm);
        CHECK(y >= 1);
        CHECK(y <= parts);
        CHECK((y == parts || y * heads >= offset_t{16} * n_sm));   // the device is busy
        CHECK((y == 1 || (y - 1) * heads < offset_t{16} * n_sm));  // and not with starting blocks
        CHECK(cuda::head_grid(heads, 1, y, 128).fits());
      }
}

TEST_CASE("last splits merge what few threads can, and weigh less than that") {
  auto const plan = [](index_t group, index_t rows, index_t usual) {
    return attend_plan(shape_of(2, group, 100000), 8, rows, usual);
  };
  CHECK(plan(4, 1, 4096 + 1).last_merges());
  CHECK(!plan(4, 1, 8192).last_merges());
  CHECK(!plan(4, 1, 0).last_merges());    // as many as there may be
  CHECK(!plan(4, 2, 100).last_merges());  // rows that may be absent
  CHECK(plan(4, 1, 1024 + 1).last_weighs());
  CHECK(!plan(4, 1, 2048).last_weighs());
  CHECK(plan(8, 1, 100).last_weighs());
  CHECK(!plan(9, 1, 100).last_weighs());  // the group takes two tiles
}

TEST_CASE("as many blocks share a row's splits as it usually has") {
  attend_plan const p(shape_of(2, 4, 100000), 8, 1, 1025);
  CHECK(p.split_grid().y == 5);
  CHECK(p.splits == 391);  // the scratch has room for all
  CHECK(attend_plan(shape_of(2, 4, 300), 8, 1, 1025).split_grid().y == 2);
}
