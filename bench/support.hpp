// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// What all benchmarks share: paired measurement, the machine's floors, rows and contexts.
///
/// Machines are shared and noisy. So a sample takes ours, the peer and the machine's peak within
/// the same few milliseconds, and a result is the median of the samples' ratios.
#pragma once

#include <algorithm>
#include <chrono>
#include <cmath>
#include <ctime>
#include <string>
#include <string_view>
#include <vector>

#include <kvkeep/kvkeep.hpp>

#include "rows.hpp"

namespace bench {

/// Product as a size.
template <class... I>
constexpr std::size_t product(I... n) {
  return (static_cast<std::size_t>(n) * ...);
}

/// Time of this thread alone where the system counts it: others use the same processors.
inline double now() {
#ifdef CLOCK_THREAD_CPUTIME_ID
  timespec t;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
  return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
#else
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
#endif
}

/// Seconds that f() takes, without those of the clock.
template <class F>
double timed(F&& f) {
  static double const clock = [] {
    double least = 1;
    for (int i = 0; i < 1000; ++i) {
      double const start = now();
      least = std::min(least, now() - start);
    }
    return least;
  }();
  double const start = now();
  f();
  benchmark::ClobberMemory();
  return now() - start - clock;
}

// -- floors -------------------------------------------------------------------------------------

/// Seconds per flop of fused multiply-adds on 12 independent accumulators of the backend's vectors.
inline double fma_seconds() {
  constexpr int n_acc = 12, rounds = 20000;
  cpu::vf acc[n_acc];
  float volatile one = 1;  // unknown to the compiler; benchmark::DoNotOptimize lost the value here
  float const start = one;
  for (int i = 0; i < n_acc; ++i) acc[i] = cpu::splat(start + static_cast<float>(i));
  cpu::vf const x = cpu::splat(start * 0.999F), y = cpu::splat(start * 0.001F);
  double const begin = now();  // no function: the accumulators must stay in registers
  for (int r = 0; r < rounds; ++r) {
    KVKEEP_CPU_UNROLL
    for (int i = 0; i < n_acc; ++i) acc[i] = cpu::held(cpu::fma(acc[i], x, y));
  }
  cpu::vf sum = acc[0];
  for (int i = 1; i < n_acc; ++i) sum = sum + acc[i];
  float last = cpu::first_lane(sum);
  benchmark::DoNotOptimize(last);
  double const t = now() - begin;
  return t / (2.0 * cpu::lanes * n_acc * rounds);
}

/// Reads from memory: every call takes the next 4 MiB of a block that no cache holds.
class memory_reader {
 public:
  double seconds_per_byte() {
    float const* const p = block_.data() + at_;
    at_ = (at_ + slice) % block_.size();
    cpu::vf sum[8];
    for (auto& s : sum) s = cpu::splat(0.0F);
    double const begin = now();
    for (std::size_t j = 0; j < slice; j += 64) {
      KVKEEP_CPU_UNROLL
      for (std::size_t i = 0; i < 8; ++i) sum[i] = sum[i] + cpu::load(p + j + i * 8);
    }
    for (int i = 1; i < 8; ++i) sum[0] = sum[0] + sum[i];
    float last = cpu::first_lane(sum[0]);
    benchmark::DoNotOptimize(last);
    double const t = now() - begin;
    return t / (slice * sizeof(float));
  }

 private:
  static constexpr std::size_t slice = std::size_t{1} << 20;
  std::vector<float> block_ = std::vector<float>(slice * 48, 1.0F);  // 192 MiB
  std::size_t at_ = 0;
};

inline memory_reader& memory() {
  static memory_reader reader;
  return reader;
}

/// What a call cannot avoid: bytes from memory, floating-point operations.
struct work {
  double bytes = 0;
  double flops = 0;

  /// Its least time, by the peaks that the machine shows now.
  double floor() const {
    double const read = bytes > 0 ? bytes * memory().seconds_per_byte() : 0;
    double const compute = flops > 0 ? flops * fma_seconds() : 0;
    return std::max(read, compute);
  }
};

/// Samples of one row of a result.
class meter {
 public:
  explicit meter(work const& w) : work_(w) {}

  /// @param ours, peer  seconds; peer 0: there is none
  void add(double ours, double peer) {
    ours_.push_back(ours);
    peer_.push_back(peer);
    floor_ratio_.push_back(ours / work_.floor());
    if (peer > 0) peer_ratio_.push_back(ours / peer);
  }

  /// Counters: median time, its spread (interquartile range over median), ratios, rates.
  void report(benchmark::State& state) const {
    double const t = quantile(ours_, 0.5);
    auto& c = state.counters;
    c["us"] = t * 1e6;
    c["spread"] = (quantile(ours_, 0.75) - quantile(ours_, 0.25)) / t;
    c["floor_ratio"] = quantile(floor_ratio_, 0.5);
    if (!peer_ratio_.empty()) c["peer_us"] = quantile(peer_, 0.5) * 1e6;
    if (!peer_ratio_.empty()) c["peer_ratio"] = quantile(peer_ratio_, 0.5);
    if (work_.bytes > 0) c["GB/s"] = work_.bytes / t * 1e-9;
    if (work_.flops > 0) c["GFLOP/s"] = work_.flops / t * 1e-9;
  }

 private:
  work work_;
  std::vector<double> ours_, peer_, floor_ratio_, peer_ratio_;
};

// -- programs -----------------------------------------------------------------------------------

/// Removes `--all` from the arguments: then rows that would make `./run bench` long are taken as well.
inline bool takes_all(int& argc, char** argv) {
  char** const end = argv + argc;
  char** const rest =
      std::remove_if(argv, end, [](char const* a) { return std::string_view(a) == "--all"; });
  argc = static_cast<int>(rest - argv);
  return rest != end;
}

/// The end of every main(): the machine's peaks go into the result's context.
inline int run_rows(int argc, char** argv) {
  takes_all(argc, argv);  // for programs without such rows
  std::vector<double> flop, byte;
  for (int i = 0; i < 40; ++i) {
    flop.push_back(1e-9 / fma_seconds());
    byte.push_back(1e-9 / memory().seconds_per_byte());
  }
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 1;
  benchmark::AddCustomContext("fma_peak_gflops", std::to_string(quantile(flop, 0.5)));
  benchmark::AddCustomContext("memory_read_gb_per_s", std::to_string(quantile(byte, 0.5)));
  benchmark::AddCustomContext("vectors", KVKEEP_CPU_AVX2 ? "AVX2" : "plain loops");
  benchmark::AddCustomContext("compiler", __VERSION__);
  benchmark::AddCustomContext("threads", "1");
  benchmark::RunSpecifiedBenchmarks();
  benchmark::Shutdown();
  return 0;
}

}  // namespace bench
