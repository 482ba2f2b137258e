// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// What every row of the CUDA benchmarks goes through: a recording of many calls on rotated inputs,
/// replayed, timed by events; outputs that were poisoned before and are looked at afterwards.
#pragma once

#include <functional>
#include <new>
#include <string>
#include <vector>

#include "arrays.hpp"
#include "floors.hpp"

namespace bench {

/// The device under test, its rates, and how thoroughly it is measured.
struct suite {
  cuda::context ctx;
  peaks rates{};
  int samples = 200;
  double rotate_bytes = 256e6;  ///< inputs of all sets together, several times the last cache
  bool tiny = false;            ///< shapes for a device that is emulated

  explicit suite(cudaStream_t s) : ctx(s) {}
};

/// Seconds of `n` replays after three more. `prepare(i)` enqueues what comes before the i-th untimed.
template <class Prepare>
std::vector<double> time_replays(recording const& r, int n, Prepare const& prepare) {
  stopwatch watch(r.stream(), static_cast<std::size_t>(n));
  for (int i = -3; i < n; ++i) {
    prepare(i + 3);
    if (i >= 0) watch.start(static_cast<std::size_t>(i));
    r.replay();
    if (i >= 0) watch.stop(static_cast<std::size_t>(i));
  }
  return watch.seconds();
}
inline std::vector<double> time_replays(recording const& r, int n) {
  return time_replays(r, n, [](int) {});
}

/// Counters of a row: median, how much samples and halves of the run differ, floor, rates.
/// @param t  seconds per call of each sample
inline void report(benchmark::State& state, suite const& s, work const& w,
                   std::vector<double> const& t) {
  std::size_t i = 0;
  for (auto _ : state) state.SetIterationTime(t[i++ % t.size()]);
  auto const middle = t.begin() + static_cast<std::ptrdiff_t>(t.size() / 2);
  double const us = quantile(t, 0.5) * 1e6, floor = floor_of(w, s.rates) * 1e6;
  auto& c = state.counters;
  c["us"] = us;
  c["spread"] = (quantile(t, 0.75) - quantile(t, 0.25)) * 1e6 / us;
  c["halves"] = quantile({middle, t.end()}, 0.5) / quantile({t.begin(), middle}, 0.5) - 1;
  c["floor_us"] = floor;
  c["floor_ratio"] = us / floor;
  if (w.bytes() > 0) c["GB/s"] = w.bytes() / us * 1e-3;
  if (w.flops() > 0) c["TFLOP/s"] = w.flops() / us * 1e-6;
}

/// One op as a row.
/// @param enqueue  `enqueue(set)` puts a call on the stream
/// @param fault    after all calls: what is wrong with the outputs, or an empty string
template <class Enqueue, class Fault>
void measure(benchmark::State& state, suite& s, work const& w, rotation const& turns,
             Enqueue const& enqueue, Fault const& fault) {
  recording const calls(s.ctx.stream, [&] {
    for (std::size_t i = 0; i < turns.calls; ++i) enqueue(i % turns.sets);
  });
  std::vector<double> t = time_replays(calls, s.samples);
  for (double& x : t) x /= static_cast<double>(turns.calls);
  if (std::string const what = fault(); !what.empty()) {
    state.SkipWithError(what.c_str());
    return;
  }
  report(state, s, w, t);
  state.counters["launches"] =
      static_cast<double>(calls.launches()) / static_cast<double>(turns.calls);
  state.counters["sets"] = static_cast<double>(turns.sets);
}

/// Registers a row. What the device has no memory for is an error of the row alone.
template <class F>
void add_device_row(suite& s, std::string const& name, F f) {
  add_row(name, s.samples, [&s, f](benchmark::State& state) {
    try {
      f(state, s);
    } catch (std::bad_alloc const&) {
      state.SkipWithError("the device's memory does not hold this shape");
    }
  });
}

/// Scratch for an op on the device: measured with the op itself.
template <class Op>
rotated<std::byte> scratch_for(cuda::context& c, Op const& o) {
  workspace counting;
  expect(run(c, o, counting), "measuring");
  return {1, counting.peak() + workspace::alignment};
}
inline workspace placed_in(rotated<std::byte> const& m) {
  return workspace(std::span<std::byte>(m.data(), m.size()));
}

/// Runs an op once and waits.
template <class Op>
void run_once(cuda::context& c, Op const& o) {
  auto const memory = scratch_for(c, o);
  workspace ws = placed_in(memory);
  expect(run(c, o, ws), "a check on the device");
  wait_for(c.stream);
}

/// Two outputs that must agree; a difference is the end of the program.
/// @param tolerance  relative, and a hundredth of it absolute; 0: equal
template <class T>
void check_same(char const* what, std::vector<T> const& ours, std::vector<T> const& cpu,
                double tolerance = 0) {
  for (std::size_t i = 0; i < std::max(ours.size(), cpu.size()); ++i) {
    if (ours.at(i) == cpu.at(i)) continue;
    auto const a = static_cast<double>(ours.at(i)), b = static_cast<double>(cpu.at(i));
    if (std::abs(a - b) <= tolerance * (std::abs(b) + 0.01)) continue;
    std::fprintf(stderr, "%s: element %zu is %g on the device and %g on the CPU\n", what, i, a, b);
    std::exit(1);
  }
}

// Each folder of rows, and its ops' agreement with the CPU backend on small shapes.
void add_calibration_rows(suite& s);
void add_scoring_rows(suite& s);
void add_choice_rows(suite& s);
void add_attention_rows(suite& s);
void add_step_rows(suite& s);
void check_scoring(suite& s);
void check_choice(suite& s);
void check_attention(suite& s);

/// Measures the rates that floors are made of.
void calibrate(suite& s);

}  // namespace bench
