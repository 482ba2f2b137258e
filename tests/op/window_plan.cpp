// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
// Launches of the CUDA backend's scoring by query rows: grids fit, and cover all slots and queries.
#include <algorithm>
#include <vector>

#include <kvkeep/backend/cuda/window_plan.hpp>

#include "../support/catch.hpp"

namespace {

using namespace kvkeep;
using namespace kvkeep::cuda;

constexpr window_sizes sizes[] = {
    {1, 8, 4, 32, 8192},  {64, 8, 4, 32, 131072}, {1, 8, 4, 32768, 32768}, {64, 1, 71, 200, 131072},
    {256, 32, 1, 1, 128}, {1, 1, 2000, 3, 1},     {2, 8, 4, 0, 1024},      {1, 2, 4, 32, 0}};

}  // namespace

TEST_CASE("grids of all kernels fit, from one slot to 128k slots of 64 sequences") {
  for (window_sizes const& s : sizes) {
    index_t const rows = rows_at_once(s);
    INFO("entries " << s.n_entries << " slots " << s.max_slots << " rows " << s.n_rows);
    CHECK(rows <= s.n_rows);
    CHECK((s.n_rows == 0 || rows >= 1));
    CHECK((rows <= 1 || rows * s.group <= launch_queries));
    for (index_t const queries : {32, 64, 128}) {
      grid const g = slice_grid(s, rows, queries, 128);
      CHECK(g.fits());
      CHECK(g.y * queries >= s.slices() * rows * s.group);
    }
    for (index_t const slots : {64, 128, 256})
      for (bool const stay : {false, true}) {
        offset_t const steps = strip_steps(s, slots, stay, 132);
        grid const g = strip_grid(s, slots * static_cast<index_t>(steps), 256);
        CHECK(steps >= 1);
        CHECK((stay || steps == 1));
        CHECK(g.fits());
        CHECK(g.x == s.heads());
        CHECK(g.y * steps * slots >= s.max_slots);
        CHECK((g.y == 0 || (g.y - 1) * steps * slots < s.max_slots));
      }
  }
}

TEST_CASE("a grid says where rows and slots are too many for one launch") {
  auto const fits = [](index_t rows) {
    return slice_grid({1, 1, 8, rows, 131072, fused_slice_slots}, rows, 32, 128).fits();
  };
  CHECK(fits(508));
  CHECK(!fits(511));
}

TEST_CASE("blocks take several strips only where all multiprocessors have work") {
  CHECK(strip_steps({1, 8, 4, 32, 8192}, 256, true, 132) == 1);
  window_sizes const large{64, 8, 4, 32, 131072};
  offset_t const steps = strip_steps(large, 256, true, 132);
  CHECK(steps > 1);
  CHECK(large.heads() * large.max_slots / 256 / steps >= 8 * 132);
}

TEST_CASE("warpgroups multiply where the program has code for them and the device is a Hopper") {
  CHECK(warpgroups_multiply(90, 128, true));
  CHECK(warpgroups_multiply(90, 8, true));
  CHECK(!warpgroups_multiply(90, 136, true));
  CHECK(!warpgroups_multiply(80, 64, true));
  CHECK(!warpgroups_multiply(100, 64, true));
  CHECK(!warpgroups_multiply(90, 64, false));
  CHECK(warpgroups_multiply(90, 64) == has_sm90a_code);
}

TEST_CASE("chains cover every query once, in order") {
  for (index_t const group : {1, 2, 3, 4, 6, 8, 12})
    for (index_t const rows : {0, 1, 7, 8, 33})
      for (bool const per_query_head : {false, true}) {
        chain_plan const p(rows, group, per_query_head);
        index_t const chains = 1 << p.shift;
        CHECK(p.sets * chains * p.length == rows * group);
        CHECK(chains <= 4);
        CHECK((per_query_head || (p.sets == 1 && chains == 1)));
        CHECK(p.turns() * turn_queries >= chains * p.length);
        CHECK(p.turns() * turn_queries < chains * p.length + turn_queries);
      }
}

TEST_CASE("rows to be fused lie in one lane, every query once") {
  for (index_t const group : {1, 2, 3, 4, 5, 7, 8, 12, 71})
    for (index_t const rows : {0, 1, 3, 4, 5, 16, 31, 33}) {
      INFO("group " << group << " rows " << rows);
      fuse_plan const p(rows, group);
      std::vector<int> times(static_cast<std::size_t>(rows * group));
      bool in_order = true;
      for (index_t turn = 0; turn < p.turns(); ++turn)
        for (index_t lane = 0; lane < 4; ++lane) {
          index_t last = -1;
          for (index_t i = 0; i < 4; ++i) {
            index_t const q = p.query(turn, lane * 4 + i);
            if (q < 0) continue;
            in_order = in_order && q > last;
            last = q;
            ++times[static_cast<std::size_t>(q)];
            index_t const row = q / group, part = turn % p.row_turns;
            // rows of a lane: lane_rows in a turn, or the same one until its turns end
            in_order = in_order && row / p.lane_rows % 4 == lane &&
                       (p.row_turns == 1 || q % group / 4 == part) &&
                       (p.lane_rows > 1 || row / 4 == turn / p.row_turns);
          }
        }
      CHECK(in_order);
      CHECK(std::all_of(times.begin(), times.end(), [](int n) { return n == 1; }));
      CHECK(p.turns() % p.row_turns == 0);
    }
}
