// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// The driver's main function.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "suite.hpp"

namespace bench {

/// The device and its rates, for the head of the output.
inline void describe(suite const& s) {
  device_facts const f = facts_of_device();
  auto const add = [](char const* key, double value) {
    benchmark::AddCustomContext(key, std::to_string(value));
  };
  benchmark::AddCustomContext("device", f.name);
  point const& p = base;
  benchmark::AddCustomContext("heads", std::to_string(p.kv_heads) + " KV heads, " +
                                           std::to_string(p.group) +
                                           " query heads each, D = " + std::to_string(p.dim));
  benchmark::AddCustomContext("driver", std::to_string(f.driver));
  benchmark::AddCustomContext("runtime", std::to_string(f.runtime));
  add("l2_mbytes", f.l2_bytes * 1e-6);
  add("empty_node_us", s.rates.node * 1e6);
  add("copy_gb_per_s", s.rates.copy * 1e-9);
  add("read_gb_per_s", s.rates.read * 1e-9);
  add("mma_tflops", s.rates.mma * 1e-12);
  if (s.rates.wgmma > 0) add("wgmma_tflops", s.rates.wgmma * 1e-12);
  add("fma_tflops", s.rates.fma * 1e-12);
  add("exp2_t_per_s", s.rates.exp2 * 1e-12);
}

/// Rows of some ops, and those ops' agreement with the CPU backend.
struct part {
  void (*check)(suite&);
  void (*add)(suite&);
};
inline std::vector<part> all_parts() {
  return {{check_scoring, add_scoring_rows},
          {check_choice, add_choice_rows},
          {check_attention, add_attention_rows},
          {nullptr, add_step_rows}};  // checked row by row: slots, positions, faults
}

/// Calibrates, checks, registers all rows.
inline void prepare(suite& s, std::vector<part> const& parts) {
  calibrate(s);
  for (part const& p : parts)
    if (p.check != nullptr) p.check(s);
  describe(s);
  add_calibration_rows(s);
  for (part const& p : parts) p.add(s);
}

/// `--filter=REGEX` is short for `--benchmark_filter=REGEX`.
inline std::vector<std::string> spelled_out(int argc, char** argv) {
  std::vector<std::string> words(argv, argv + argc);
  for (std::string& w : words)
    if (w.rfind("--filter=", 0) == 0) w = "--benchmark_" + w.substr(2);
  return words;
}

inline int run_on_device(int argc, char** argv) {
  if (std::string const why = missing_device(); !why.empty()) {
    std::printf("SKIPPED: no CUDA device (%s)\n", why.c_str());
    return 77;
  }
  auto words = spelled_out(argc, argv);
  std::vector<char*> pointers;
  for (std::string& w : words) pointers.push_back(w.data());
  int n = argc;
  pointers.push_back(nullptr);
  benchmark::Initialize(&n, pointers.data());
  if (benchmark::ReportUnrecognizedArguments(n, pointers.data())) return 1;
  suite s(new_stream());
  prepare(s, all_parts());
  benchmark::RunSpecifiedBenchmarks();
  benchmark::Shutdown();
  return 0;
}

}  // namespace bench
