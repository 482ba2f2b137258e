// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
// The logic of the CUDA benchmarks' driver: rotation, floors, poison, wrong outputs, rows.
#include "cuda_rows.hpp"

#include "../../bench/cuda/calibration.cu"
#include "../../bench/cuda/choice.cu"

namespace bench {
namespace {

TEST_CASE("calibration, selection and moves run, write their outputs and have floors") {
  check_rows({{check_choice, add_choice_rows}}, 8);
}

TEST_CASE("inputs rotate through more than a cache, in whole turns") {
  CHECK(rotate(300e6, 256e6, 1).sets == 1);
  CHECK(rotate(2e6, 256e6, 1).sets == 128);
  CHECK(rotate(100e6, 256e6, 4).sets == 3);
  CHECK(rotate(100e6, 256e6, 4).calls == 6);
  CHECK(rotate(1, 256e6, 4).sets == 1024);
  rotated<index_t> const each(3, 5), shared(1, 5);
  CHECK(each.at(2) - each.at(0) == 10);
  CHECK(shared.at(2) == shared.at(0));
}

TEST_CASE("a floor is a start and the longest of memory, arithmetic and exponentials") {
  peaks p;
  p.node = 2;
  p.read = 10, p.copy = 5, p.mma = 100, p.fma = 20, p.exp2 = 4;
  work w;
  CHECK(floor_of(w, p) == 2);
  w.read = 100;
  w.moved = 10;
  CHECK(floor_of(w, p) == 2 + 12);
  w.mma = 1000;
  w.fma = 100;
  CHECK(floor_of(w, p) == 2 + 15);
  p.wgmma = 200;
  w.wgmma = 600;
  CHECK(floor_of(w, p) == 2 + 18);
  w.exps = 80;
  CHECK(floor_of(w, p) == 2 + 20);
}

TEST_CASE("outputs that nobody wrote are found") {
  suite s = tiny_suite();
  rotated<float> const out(2, 3);
  out.poison();
  CHECK(!written(out));
  fill(s.ctx, 5, constant{out.data(), 1});
  CHECK(!written(out));
  fill(s.ctx, 6, constant{out.data(), 1});
  CHECK(written(out));
}

TEST_CASE("a call goes to each set in turn, and wrong outputs are an error of the row") {
  suite s = tiny_suite();
  std::vector<std::size_t> sets;
  benchmark::RegisterBenchmark("wrong", [&](benchmark::State& state) {
    measure(
        state, s, {}, {3, 6}, [&](std::size_t set) { sets.push_back(set); },
        [] { return "nothing was written"; });
  })->Iterations(3);
  row_collector got;
  benchmark::RunSpecifiedBenchmarks(&got, "wrong");
  REQUIRE(got.rows.size() == 1);
  CHECK(got.rows[0].error_occurred);
  CHECK(got.rows[0].error_message == "nothing was written");
  REQUIRE(sets.size() == 6 * 6);  // three samples, three before them
  for (std::size_t i = 0; i < sets.size(); ++i) CHECK(sets[i] == i % 3);
  benchmark::ClearRegisteredBenchmarks();
}

TEST_CASE("plans that keep too few, or not in order, are found") {
  suite s = tiny_suite();
  point p;
  p.tokens = 50;
  p.capacity = 10;
  p.window = 4;
  p.kv_heads = 2;
  choice_case const c(s, p, 2);
  CHECK(!c.fault().empty());
  for (std::size_t set : {std::size_t{0}, std::size_t{1}}) run_once(s.ctx, c.op(on_device{set}));
  CHECK(c.fault().empty());
  std::swap(c.kept.data()[3], c.kept.data()[4]);
  CHECK(!c.fault().empty());
}

}  // namespace
}  // namespace bench
