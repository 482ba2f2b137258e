// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
// What a workspace measures is what it places; frames give back; too little is reported, not used.
#include <kvkeep/core/workspace.hpp>

#include <algorithm>

#include "../support/random.hpp"

namespace {

using namespace kvkeep;

struct piece {
  std::byte* data;
  std::size_t size;
};

/// Random takes inside nested frames, equal for equal seeds. Pieces alive at the same time are
/// listed to `check`.
template <class Check>
void take_some(workspace& ws, test::generator& g, int depth, std::vector<piece>& live,
               Check const& check) {
  workspace::frame const frame(ws);
  std::size_t const before = live.size();
  for (int i = g.integer(1, 4); i > 0; --i) {
    auto const n = static_cast<std::size_t>(g.integer(0, 50));
    switch (g.integer(0, 2)) {
      case 0:
        live.push_back({reinterpret_cast<std::byte*>(ws.take<float>(n)), n * 4});
        break;
      case 1:
        live.push_back({ws.take<std::byte>(n), n});
        break;
      default:
        live.push_back({reinterpret_cast<std::byte*>(ws.take<double>(n)), n * 8});
        break;
    }
    if (depth > 0 && g.chance(0.5F)) take_some(ws, g, depth - 1, live, check);
  }
  check(live);
  live.resize(before);
}

void check_nothing(std::vector<piece> const&) {}

}  // namespace

TEST_CASE("a run places exactly what the measuring run counted") {
  test::for_seeds(200, [](test::generator& g) {
    auto const shape_seed = g.next();
    workspace measure;
    std::vector<piece> live;
    test::generator first(shape_seed);
    take_some(measure, first, 3, live, check_nothing);
    CHECK(measure.measuring());
    CHECK(measure.ok());
    CHECK(measure.used() == 0);

    std::size_t const size = measure.peak();
    std::vector<std::byte> block(size + 64);
    auto const at = reinterpret_cast<std::uintptr_t>(block.data());
    std::byte* const base = block.data() + (64 - at % 64) % 64;
    workspace place(std::span(base, size));
    test::generator second(shape_seed);
    take_some(place, second, 3, live, [&](std::vector<piece> const& pieces) {
      std::vector<piece> sorted = pieces;
      std::sort(sorted.begin(), sorted.end(), [](piece const& a, piece const& b) {
        return a.data < b.data || (a.data == b.data && a.size < b.size);
      });
      std::byte* end = base;
      for (piece const& p : sorted) {
        REQUIRE(p.data != nullptr);
        REQUIRE(reinterpret_cast<std::uintptr_t>(p.data) % 64 == 0);
        REQUIRE(p.data >= end);
        end = p.data + p.size;
      }
      REQUIRE(end <= base + size);
    });
    CHECK_FALSE(place.measuring());
    CHECK(place.ok());
    CHECK(place.peak() == size);
    CHECK(place.used() == 0);

    if (size == 0) return;
    workspace small(std::span(base, size - 1));
    test::generator third(shape_seed);
    bool failed = false;
    take_some(small, third, 3, live, [&](std::vector<piece> const& pieces) {
      for (piece const& p : pieces) {
        failed = failed || p.data == nullptr;
        REQUIRE((p.data == nullptr || p.data + p.size <= base + size - 1));
      }
    });
    CHECK(failed);
  });
}

TEST_CASE("measuring returns null and counts whole lines of 64 bytes") {
  workspace ws;
  CHECK(ws.take<float>(1) == nullptr);
  CHECK(ws.used() == 64);
  CHECK(ws.take<double>(8) == nullptr);
  CHECK(ws.used() == 128);
  CHECK(ws.take<std::byte>(65) == nullptr);
  CHECK(ws.used() == 256);
  CHECK(ws.take<std::byte>(0) == nullptr);
  CHECK(ws.used() == 256);
  CHECK(ws.peak() == 256);
}

TEST_CASE("an unaligned block costs up to 63 bytes") {
  alignas(64) std::byte memory[256];
  for (std::size_t shift = 0; shift < 64; ++shift) {
    workspace ws(std::span(memory + shift, 192 - shift));
    std::byte* const first = ws.take<std::byte>(64);
    CHECK(first == (shift == 0 ? memory : memory + 64));
    CHECK(ws.take<std::byte>(shift == 0 ? 128 : 64) != nullptr);
    CHECK(ws.ok());
    CHECK(ws.take<std::byte>(1) == nullptr);
    CHECK_FALSE(ws.ok());
  }
}

TEST_CASE("a block too short to be aligned is empty, and so is no block at all") {
  alignas(64) std::byte memory[64];
  workspace ws(std::span(memory + 1, 10));
  CHECK(ws.take<std::byte>(1) == nullptr);
  CHECK_FALSE(ws.ok());
  workspace none{std::span<std::byte>()};
  CHECK_FALSE(none.measuring());
  CHECK(none.take<float>(3) == nullptr);
  CHECK_FALSE(none.ok());
}

TEST_CASE("a frame that did not fit leaves the workspace usable") {
  alignas(64) std::byte memory[128];
  workspace ws{std::span<std::byte>(memory)};
  REQUIRE(ws.take<std::byte>(64) != nullptr);
  {
    workspace::frame const frame(ws);
    CHECK(ws.take<std::byte>(65) == nullptr);
    CHECK_FALSE(ws.ok());
  }
  CHECK(ws.ok());
  CHECK(ws.used() == 64);
  CHECK(ws.peak() == 192);
  CHECK(ws.take<std::byte>(64) == memory + 64);
}
