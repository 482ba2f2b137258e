// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// The driver's main function.
#pragma once

#include <algorithm>
#include <cstdio>
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
  add("fma_tflops", s.rates.fma * 1e-12);
  add("exp2_t_per_s", s.rates.exp2 * 1e-12);
}

/// Registers all rows that are wanted, those about warpgroups last; if there are any, calibrates.
/// @param parts  outlives the rows
inline void prepare(suite& s, std::vector<part>& parts) {
  std::stable_partition(parts.begin(), parts.end(), [](part const& p) { return !p.wide; });
  for (part& p : parts) {
    s.adding = &p;
    p.add(s);
  }
  s.adding = nullptr;
  if (s.rows > 0) calibrate(s);
}

/// Takes our own words out of the command line:
///   --filter=REGEX  rows whose names match
///   --warps         no warpgroups anywhere, as on an older device
inline void take_options(suite& s, std::vector<std::string>& words) {
  std::string_view const filter = "--filter=";
  std::erase_if(words, [&](std::string const& w) {
    if (w == "--warps") {
      s.ctx.capability = s.aside.capability = 80;
      benchmark::AddCustomContext("products", "warps");
      return true;
    }
    if (w.rfind(filter, 0) != 0) return false;
    s.only.emplace(w.substr(filter.size()), std::regex::extended);
    return true;
  });
}

/// @return 0; 1: something failed; 4: a check of warpgroups' products did; 77: no device. Rows that failed
///   name the reason in the output, and the others have run.
inline int run_on_device(int argc, char** argv) {
  if (std::string const why = missing_device(); !why.empty()) {
    std::printf("SKIPPED: no CUDA device (%s)\n", why.c_str());
    return 77;
  }
  std::vector<std::string> words(argv, argv + argc);
  try {
    suite s(new_stream(), new_stream());
    take_options(s, words);
    std::vector<char*> pointers;
    for (std::string& w : words) pointers.push_back(w.data());
    int n = static_cast<int>(pointers.size());
    pointers.push_back(nullptr);
    benchmark::Initialize(&n, pointers.data());
    if (benchmark::ReportUnrecognizedArguments(n, pointers.data())) return 1;
    prepare(s, all_parts());
    if (s.rows == 0) {
      std::printf("no row of this program is wanted\n");
      return 0;
    }
    describe(s);
    benchmark::RunSpecifiedBenchmarks();
    benchmark::Shutdown();
    return s.wide_failed ? 4 : s.failed > 0 ? 1 : 0;
  } catch (std::exception const& e) {
    std::fprintf(stderr, "FAILED before any row: %s\n", e.what());
    return 1;
  }
}

}  // namespace bench
