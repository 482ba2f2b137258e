// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// Decode steps of a device session: a call that finds slots, writes K and V and attends, and the next victim. A replay
/// is one token of every layer; layers rotate through more than the last cache.
///   plain_us  a write of K and V and attention over as many slots without a session, in the same samples
///   overhead  of the step over that; overhead_us in microseconds
/// `aside` is `step` with decisions in a second stream: a layer's runs beside the next layers' attention.
/// `overlapped` is `step` with kernels that are placed before those in front have ended (allow_overlap).
/// `drafts` is four tokens that wait for confirm, and that; figures are a token's.
/// `steady` asks whether a step's time grows: one layer (in the last cache, so without a floor), eight tokens per
/// replay, from token 1k to 100k.
/// Each policy is a unit, and a program, of its own: they take long to compile.
#pragma once

#include <kvkeep/cuda.cuh>

#include "step_case.hpp"

namespace bench {

/// Tokens before anything is timed: the window's queries and bounds are then those of decoded tokens.
inline int warm_steps(suite const& s, point const& p) { return s.tiny ? 10 : p.window + 16; }

/// At least eight: a decision aside hides beside the next layer alone, and a replay's last one has none. (At most 9 GB
/// of keys and values, and as much state: morphkv-cached, C = 4096, B = 64.)
inline std::size_t layers_of(suite const& s, point const& p, index_t slots) {
  auto const bytes = static_cast<double>(2 * plane_bytes(p, slots));
  return rotate(bytes, s.rotate_bytes, 1, s.tiny ? 1 : 8).sets;
}

/// Times a replay of `step` and one of `plain` in turn, and reports both for each of the `parts` (tokens and layers) of
/// them.
template <class Case>
void measure_pairs(benchmark::State& state, suite& s, Case& c, recording const& step,
                   recording const& plain, int warm, double parts) {
  stopwatch with(s.ctx.stream, static_cast<std::size_t>(s.samples));
  stopwatch without(s.ctx.stream, static_cast<std::size_t>(s.samples));
  for (int i = -warm; i < s.samples; ++i) {
    auto const at = static_cast<std::size_t>(std::max(i, 0));  // warm-up is timed over
    c.next_tokens();
    with.start(at);
    step.replay();
    with.stop(at);
    without.start(at);
    plain.replay();
    without.stop(at);
  }
  std::vector<double> t = with.seconds(), bare = without.seconds(), more(t.size());
  for (std::size_t i = 0; i < t.size(); ++i) {
    t[i] /= parts;
    bare[i] /= parts;
    more[i] = t[i] - bare[i];
  }
  report(state, s, c.work_of_step(), t);
  auto& counters = state.counters;
  counters["plain_us"] = quantile(bare, 0.5) * 1e6;
  counters["overhead_us"] = quantile(more, 0.5) * 1e6;
  counters["overhead"] = quantile(more, 0.5) / quantile(bare, 0.5);
  counters["p99_ratio"] = quantile(t, 0.99) / quantile(t, 0.5);
  counters["launches"] = static_cast<double>(step.launches()) / parts;
}

template <class Policy>
void measure_step(benchmark::State& state, suite& s, point const& p, Policy const& policy,
                  bool all_queries, bool aside = false) {
  std::size_t const layers = layers_of(s, p, p.capacity + 1);
  step_case<Policy> c(s, p, policy, layers, 1);
  if (aside) c.decide_aside();
  c.fill_prompts(all_queries);
  recording const step(s.ctx.stream, [&] { c.step(0); });
  recording const plain(s.ctx.stream, [&] { c.plain_step(0); });
  int const warm = warm_steps(s, p);
  measure_pairs(state, s, c, step, plain, warm, static_cast<double>(layers));
  state.counters["sets"] = static_cast<double>(layers);
  if (std::string const what = c.fault(warm + s.samples); !what.empty())
    throw std::runtime_error(what);
}

/// All drafts are accepted, so that a replay is as many tokens, and a decision of every layer.
template <class Policy>
void measure_drafts(benchmark::State& state, suite& s, point const& p, Policy const& policy,
                    bool all_queries) {
  constexpr index_t drafts = 4;
  std::size_t const layers = layers_of(s, p, p.capacity + 1 + drafts);
  step_case<Policy> c(s, p, policy, layers, drafts, drafts);
  c.fill_prompts(all_queries);
  recording const step(s.ctx.stream, [&] {
    for (std::size_t t = 0; t < drafts; ++t) c.step(t);
    c.confirm();
  });
  recording const plain(s.ctx.stream, [&] {
    for (std::size_t t = 0; t < drafts; ++t) c.plain_step(t);
  });
  int const warm = warm_steps(s, p) / drafts;
  measure_pairs(state, s, c, step, plain, warm, static_cast<double>(layers) * drafts);
  state.counters["sets"] = static_cast<double>(layers);
  if (std::string const what = c.fault(drafts * (warm + s.samples)); !what.empty())
    throw std::runtime_error(what);
}

/// While it lives, launches overlap if device and code allow it.
class overlapping {
 public:
  explicit overlapping(cuda::context& c) : c_(c), good_(cuda::allow_overlap(c) == status::ok) {}
  overlapping(overlapping const&) = delete;
  overlapping& operator=(overlapping const&) = delete;
  ~overlapping() { c_.overlap = false; }
  bool good() const { return good_; }

 private:
  cuda::context& c_;
  bool good_;
};

template <class Policy>
void measure_overlapped(benchmark::State& state, suite& s, point const& p, Policy const& policy,
                        bool all_queries) {
  overlapping const launches(s.ctx);
  if (!launches.good()) throw skipped("launches cannot overlap here");
  measure_step(state, s, p, policy, all_queries);
}

template <class Policy>
void measure_steady(benchmark::State& state, suite& s, point const& p, Policy const& policy,
                    bool all_queries) {
  constexpr int tokens = 8;
  int const last = s.tiny ? p.capacity + 200 : 100'000;
  step_case<Policy> c(s, p, policy, 1, tokens);
  c.fill_prompts(all_queries);
  recording const steps(s.ctx.stream, [&] {
    for (std::size_t i = 0; i < tokens; ++i) c.step(i);
  });
  recording const plain(s.ctx.stream, [&] { c.plain_step(0); });
  plain.replay();
  int done = 0;
  auto const advance = [&](int to) {
    for (; p.capacity + done < to; done += tokens) {
      c.next_tokens();
      steps.replay();
      if (done % 4096 == 0) wait_for(s.ctx.stream);  // the queue of the driver is not endless
    }
  };
  auto const sample = [&] {
    std::vector<double> t = time_replays(steps, s.samples, [&](int) { c.next_tokens(); });
    done += tokens * (s.samples + 3);
    for (double& x : t) x /= tokens;
    return t;
  };
  advance(p.capacity + warm_steps(s, p));
  std::vector<double> const early = sample();
  advance(last - tokens * (s.samples + 3));
  std::vector<double> const late = sample();
  if (std::string const what = c.fault(done); !what.empty()) throw std::runtime_error(what);
  report_times(state, late);
  auto& counters = state.counters;
  counters["early_us"] = quantile(early, 0.5) * 1e6;
  counters["drift"] = quantile(late, 0.5) / quantile(early, 0.5) - 1;
  counters["p99_ratio"] = quantile(late, 0.99) / quantile(late, 0.5);
  counters["token"] = p.capacity + done;
  counters["launches"] = static_cast<double>(steps.launches()) / tokens;
}

/// Rows of a policy at all shapes.
/// @param make         make(point) gives the policy
/// @param all_queries  its prompt wants them all
template <class Make>
void add_policy_rows(suite& s, std::string const& name, bool all_queries, Make const& make) {
  auto const add = [&](char const* kind, index_t c, index_t b, auto const& measure_one) {
    point p = base;
    p.type = dtype::bf16;
    p.capacity = c;
    p.batch = b;
    if (s.tiny) p.kv_heads = 1, p.dim = 64, p.window = 8;
    add_device_row(s, kind + name + named("C", p.capacity) + shape_name(p),
                   [=, policy = make(p)](benchmark::State& state, suite& on) {
                     measure_one(state, on, p, policy, all_queries);
                   });
  };
  auto const step = [](auto&&... x) { measure_step(x...); };
  auto const aside = [](auto&&... x) { measure_step(x..., true); };
  auto const overlapped = [](auto&&... x) { measure_overlapped(x...); };
  auto const drafts = [](auto&&... x) { measure_drafts(x...); };
  auto const steady = [](auto&&... x) { measure_steady(x...); };
  if (s.tiny) {
    add("step/", 40, 2, step);
    add("aside/", 40, 2, aside);
    add("overlapped/", 40, 2, overlapped);
    add("drafts/", 40, 2, drafts);
    return add("steady/", 24, 1, steady);
  }
  for (index_t b : {1, 8, 64})
    for (index_t c : {512, 1024, 4096}) add("step/", c, b, step);
  add("step/", 2048, 8, step);
  for (index_t b : {1, 8, 64}) add("aside/", 1024, b, aside);
  add("aside/", 4096, 8, aside);
  for (index_t b : {1, 8}) add("overlapped/", 1024, b, overlapped);
  add("drafts/", 1024, 8, drafts);
  add("steady/", 1024, 1, steady);
}

}  // namespace bench
