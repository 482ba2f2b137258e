// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// What every row of the CUDA benchmarks goes through: a recording of many calls on rotated inputs,
/// replayed, timed by events; outputs that were poisoned before and are looked at afterwards.
#pragma once

#include <initializer_list>
#include <memory>
#include <new>
#include <optional>
#include <regex>
#include <stdexcept>
#include <string>
#include <vector>

#include "arrays.hpp"
#include "floors.hpp"

namespace bench {

struct suite;

/// Some rows, and what must hold before any of them is timed.
struct part {
  char const* name;
  void (*add)(suite&);
  void (*check)(suite&) = nullptr;  ///< throws where ops disagree; null: rows check themselves
  bool wide = false;                ///< about warpgroups' products: their rate is measured first
  bool checked = false;
  std::string fault{};
};

/// An event by which a stream waits for another one.
using mark = std::shared_ptr<std::remove_pointer_t<cudaEvent_t>>;
inline mark new_mark() {
  cudaEvent_t e = nullptr;
  if (cudaEventCreateWithFlags(&e, cudaEventDisableTiming) != cudaSuccess)
    throw std::runtime_error("no event");
  return {e, [](cudaEvent_t end) { cudaEventDestroy(end); }};
}

/// The device under test, its rates, how thoroughly it is measured, and what came of it.
struct suite {
  mark ctx_mark = new_mark(), aside_mark = new_mark();
  cuda::context ctx, aside;  ///< the second one for what shall run beside the first one's work
  peaks rates{};
  int samples = 200;
  double rotate_bytes = 256e6;       ///< inputs of all sets together, several times the last cache
  bool tiny = false;                 ///< shapes for a device that is emulated
  std::optional<std::regex> only{};  ///< rows whose names do not match are left out

  part* adding = nullptr;    ///< whose rows are being registered
  int rows = 0;              ///< registered
  int failed = 0;            ///< rows and checks; what was skipped is none
  bool wide_failed = false;  ///< a check of a wide part was among them

  suite(cudaStream_t s, cudaStream_t beside)
      : ctx(s, ctx_mark.get()), aside(beside, aside_mark.get()) {}
};

/// Why a row is not measured, which is no failure.
struct skipped : std::runtime_error {
  using std::runtime_error::runtime_error;
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

/// Counters of a row: median, how much samples and halves of the run differ.
/// @param t  seconds per call of each sample
inline void report_times(benchmark::State& state, std::vector<double> const& t) {
  std::size_t i = 0;
  for (auto _ : state) state.SetIterationTime(t[i++ % t.size()]);
  auto const middle = t.begin() + static_cast<std::ptrdiff_t>(t.size() / 2);
  double const us = quantile(t, 0.5) * 1e6;
  auto& c = state.counters;
  c["us"] = us;
  c["spread"] = (quantile(t, 0.75) - quantile(t, 0.25)) * 1e6 / us;
  c["halves"] = quantile({middle, t.end()}, 0.5) / quantile({t.begin(), middle}, 0.5) - 1;
}
/// The same, floor and rates. The floor is one of inputs in device memory.
inline void report(benchmark::State& state, suite const& s, work const& w,
                   std::vector<double> const& t) {
  report_times(state, t);
  double const us = quantile(t, 0.5) * 1e6, floor = floor_of(w, s.rates) * 1e6;
  auto& c = state.counters;
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
  if (std::string const what = fault(); !what.empty()) throw std::runtime_error(what);
  report(state, s, w, t);
  state.counters["launches"] =
      static_cast<double>(calls.launches()) / static_cast<double>(turns.calls);
  state.counters["sets"] = static_cast<double>(turns.sets);
}

/// Measures the rates that floors are made of, all but warpgroups'; and that one, once, where there are any.
void calibrate(suite& s);
void calibrate_warpgroups(suite& s);

/// Before a row: its part's check, if no row before it made it.
/// @throws what the check throws, then `skipped`
inline void check_once(part& p, suite& s) {
  if (!p.fault.empty()) throw skipped(std::string("the check of ") + p.name + " failed");
  if (p.checked) return;
  p.checked = true;
  try {
    if (p.wide) calibrate_warpgroups(s);
    if (p.check != nullptr) p.check(s);
  } catch (std::exception const& e) {
    p.fault = e.what();
    s.wide_failed = s.wide_failed || p.wide;
    throw;
  }
}

/// Registers a row of the part that is being added. Whatever goes wrong is an error of the row alone.
template <class F>
void add_device_row(suite& s, std::string const& name, F f) {
  if (s.only && !std::regex_search(name, *s.only)) return;
  ++s.rows;
  add_row(name, s.samples, [&s, f, of = s.adding](benchmark::State& state) {
    std::string why;
    try {
      if (of != nullptr) check_once(*of, s);
      return f(state, s);
    } catch (std::bad_alloc const&) {
      why = "skipped: the device's memory does not hold this shape";
    } catch (skipped const& e) {
      why = std::string("skipped: ") + e.what();
    } catch (std::exception const& e) {
      ++s.failed;
      why = e.what();
    }
    forget_errors();
    state.SkipWithError(why.c_str());
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

/// Two outputs that must agree.
/// @param tolerance  relative, and a hundredth of it absolute; 0: equal
/// @throws std::runtime_error
template <class T>
void check_same(char const* what, std::vector<T> const& ours, std::vector<T> const& cpu,
                double tolerance = 0) {
  for (std::size_t i = 0; i < std::max(ours.size(), cpu.size()); ++i) {
    if (ours.at(i) == cpu.at(i)) continue;
    auto const a = static_cast<double>(ours.at(i)), b = static_cast<double>(cpu.at(i));
    if (std::abs(a - b) <= tolerance * (std::abs(b) + 0.01)) continue;
    throw std::runtime_error(std::string(what) + ": element " + std::to_string(i) + " is " +
                             std::to_string(a) + " on the device and " + std::to_string(b) +
                             " on the CPU");
  }
}

void add_calibration_rows(suite& s);

/// Parts of this program.
inline std::vector<part>& all_parts() {
  static std::vector<part> all;
  return all;
}
/// A unit's parts, for a global object of that unit.
struct parts_of_unit {
  parts_of_unit(std::initializer_list<part> p) {
    all_parts().insert(all_parts().end(), p.begin(), p.end());
  }
};

}  // namespace bench
