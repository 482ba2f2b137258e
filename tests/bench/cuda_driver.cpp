// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
// The logic of the CUDA benchmarks' driver: rotation, floors, poison, wrong outputs, rows.
#include "cuda_rows.hpp"

#include "../../bench/cuda/calibration.cu"
#include "../../bench/cuda/choice.cu"
#include "../../bench/cuda/rates.cu"

namespace bench {
namespace {

TEST_CASE("calibration, selection and moves run, write their outputs and have floors") {
  check_rows(all_parts(), 8);
}

TEST_CASE("inputs rotate through more than a cache, in whole turns") {
  CHECK(rotate(300e6, 256e6, 1).sets == 1);
  CHECK(rotate(2e6, 256e6, 1).sets == 128);
  CHECK(rotate(100e6, 256e6, 4).sets == 3);
  CHECK(rotate(100e6, 256e6, 4).calls == 6);
  CHECK(rotate(1, 256e6, 4).sets == 1024);
  CHECK(rotate(300e6, 256e6, 1, 8).sets == 8);
  CHECK(rotate(2e6, 256e6, 1, 8).sets == 128);
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

TEST_CASE("a call goes to each set in turn") {
  suite s = tiny_suite();
  std::vector<std::size_t> sets;
  benchmark::RegisterBenchmark("turns", [&](benchmark::State& state) {
    measure(
        state, s, {}, {3, 6}, [&](std::size_t set) { sets.push_back(set); }, [] { return ""; });
  })->Iterations(3);
  row_collector got;
  benchmark::RunSpecifiedBenchmarks(&got, "turns");
  benchmark::ClearRegisteredBenchmarks();
  REQUIRE(got.rows.size() == 1);
  CHECK(!got.rows[0].error_occurred);
  REQUIRE(sets.size() == 6 * 6);  // three samples, three before them
  for (std::size_t i = 0; i < sets.size(); ++i) CHECK(sets[i] == i % 3);
}

// -- what goes wrong costs no other row ---------------------------------------------------------------

void row_of(suite& s, char const* name, char const* fault) {
  add_device_row(s, name, [=](benchmark::State& state, suite& on) {
    measure(
        state, on, {}, {1, 1}, [](std::size_t) {}, [=] { return fault; });
  });
}
void fail(suite&) { expect(status::backend_error, "a check"); }
int checks_made = 0;

TEST_CASE("a failed check skips the rows of its part, and the others run") {
  suite s = tiny_suite();
  checks_made = 0;
  std::vector<part> parts{
      {"wide", [](suite& on) { row_of(on, "wide/row", ""); }, fail, true},
      {"bad", [](suite& on) { row_of(on, "bad/1", ""), row_of(on, "bad/2", ""); },
       [](suite& on) { ++checks_made, fail(on); }},
      {"good", [](suite& on) { row_of(on, "good/1", ""); }, [](suite&) { ++checks_made; }}};
  auto const rows = run_rows(s, parts).rows;
  REQUIRE(rows.size() == 4);
  CHECK(rows[0].error_message == "a check: backend_error");
  CHECK(rows[1].error_message == "skipped: the check of bad failed");
  CHECK(!rows[2].error_occurred);
  CHECK(rows[3].benchmark_name().rfind("wide/row", 0) == 0);  // last, whatever the order of parts
  CHECK(rows[3].error_occurred);
  CHECK(checks_made == 2);
  CHECK(s.failed == 2);
  CHECK(s.wide_failed);
}

TEST_CASE("a row's failure, or what it cannot have, is its own alone") {
  suite s = tiny_suite();
  std::vector<part> parts{{"any", [](suite& on) {
                             row_of(on, "faulty/outputs", "nothing was written");
                             add_device_row(on, "faulty/status", [](auto&, suite& x) { fail(x); });
                             add_device_row(on, "faulty/memory",
                                            [](auto&, suite&) { throw std::bad_alloc(); });
                             add_device_row(on, "faulty/missing",
                                            [](auto&, suite&) { throw skipped("no such thing"); });
                             row_of(on, "faulty/none", "");
                           }}};
  auto const rows = run_rows(s, parts).rows;
  REQUIRE(rows.size() == 5);
  CHECK(rows[0].error_message == "nothing was written");
  CHECK(rows[1].error_message == "a check: backend_error");
  CHECK(rows[2].error_message == "skipped: the device's memory does not hold this shape");
  CHECK(rows[3].error_message == "skipped: no such thing");
  CHECK(!rows[4].error_occurred);
  CHECK(s.failed == 2);
  CHECK(!s.wide_failed);
}

TEST_CASE("a filter leaves rows out, and without rows nothing is measured") {
  std::vector<part> parts{{"any", [](suite& on) {
                             for (char const* name : {"filter/a:1", "filter/b:1"})
                               row_of(on, name, "");
                           }}};
  suite s = tiny_suite();
  std::vector<std::string> words{"program", "--filter=/b:[0-9]", "--warps", "--benchmark_x"};
  take_options(s, words);
  CHECK(words == std::vector<std::string>{"program", "--benchmark_x"});
  CHECK(s.ctx.capability == 80);
  auto const rows = run_rows(s, parts).rows;
  REQUIRE(rows.size() == 1);
  CHECK(rows[0].benchmark_name().rfind("filter/b:1", 0) == 0);

  suite none = tiny_suite();
  std::vector<std::string> other{"--filter=nothing"};
  take_options(none, other);
  prepare(none, parts);
  CHECK(none.rows == 0);
  CHECK(none.rates.node == 0);
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
