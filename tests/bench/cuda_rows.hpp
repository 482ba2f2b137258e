// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// The CUDA benchmarks' driver in emulation, at tiny shapes. Its times mean nothing, and none is shown.
#pragma once

#include "../support/catch.hpp"

#include "../../bench/cuda/driver.hpp"

namespace bench {

/// Keeps the rows instead of printing them.
struct row_collector : benchmark::BenchmarkReporter {
  std::vector<Run> rows;
  bool ReportContext(Context const&) override { return true; }
  void ReportRuns(std::vector<Run> const& r) override {
    rows.insert(rows.end(), r.begin(), r.end());
  }
};

inline suite tiny_suite() {
  suite s(new_stream(), new_stream());
  s.samples = 3;
  s.rotate_bytes = 2e5;
  s.tiny = true;
  return s;
}

/// Registers the rows of parts, and runs them.
inline row_collector run_rows(suite& s, std::vector<part>& parts) {
  prepare(s, parts);
  row_collector got;
  benchmark::RunSpecifiedBenchmarks(&got, "all");
  benchmark::ClearRegisteredBenchmarks();
  return got;
}

/// Calibrates, checks, and runs every row: outputs are written, floors and launches are there. What stays in a cache
/// (`steady`) has no floor.
inline void check_rows(std::vector<part> parts, std::size_t least) {
  suite s = tiny_suite();
  row_collector const got = run_rows(s, parts);
  CHECK(s.failed == 0);
  CHECK(got.rows.size() >= least);
  for (auto const& row : got.rows) {
    INFO(row.benchmark_name() << ": " << row.error_message);
    CHECK(!row.error_occurred);
    CHECK(row.iterations == 3);
    CHECK(row.counters.at("us") > 0);
    if (row.benchmark_name().rfind("calibration/", 0) == 0) continue;
    CHECK(row.counters.at("launches") >= 1);
    if (row.benchmark_name().rfind("steady/", 0) == 0)
      CHECK(row.counters.count("floor_us") + row.counters.count("GB/s") == 0);
    else
      CHECK(row.counters.at("floor_us") > 0);
  }
}

}  // namespace bench
