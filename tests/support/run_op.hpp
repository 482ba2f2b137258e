// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// Runs an op on a backend and checks what every op promises: it measures what it uses, writes nothing
/// when it gets less, stays inside its arrays, and gives the same bits again (on the CPU: with two
/// threads; on CUDA: captured in a graph, and replayed with other lengths). The backend is the CPU's, or,
/// with KVKEEP_TEST_CUDA, that for CUDA.
#pragma once

#include <tuple>

#include "aligned_block.hpp"
#include "test_layer.hpp"
#if defined(KVKEEP_TEST_CUDA)
#include "op_cuda.hpp"
#else
#include "op_cpu.hpp"
#endif

namespace kvkeep::test {

/// Measures, then runs in exactly that much memory.
template <class Op>
status run_exact(op_context& ctx, Op const& op) {
  workspace measure;
  status const measured = call(ctx, op, measure);
  if (measured != status::ok) return measured;
  CHECK(measure.used() == 0);
  aligned_block const block(measure.peak());
  workspace place(block.span());
  status const result = call(ctx, op, place);
  CHECK(place.peak() == measure.peak());
  CHECK(place.used() == 0);
  return result;
}

/// f(a, b) for the pairs of two tuples. (nvcc mixes up two packs that meet in a lambda of another function.)
template <class A, class B, class F>
void each_pair(A const& a, B const& b, F const& f) {
  [&]<std::size_t... I>(std::index_sequence<I...>) { (f(std::get<I>(a), std::get<I>(b)), ...); }
  (std::make_index_sequence<std::tuple_size_v<A>>{});
}

#if defined(KVKEEP_TEST_CUDA)
/// The lengths and counts that an op reads, where it has them, set to others for the life of this.
class other_lengths {
 public:
  template <class Op>
  explicit other_lengths(Op const& op) {
    if constexpr (requires { op.slots.lengths; }) change(op.slots.lengths);
    if constexpr (requires { op.layer.slots.lengths; }) change(op.layer.slots.lengths);
    if constexpr (requires { op.from.slots.lengths; }) change(op.from.slots.lengths);
    if constexpr (requires { change(op.k); }) change(op.k);
    if constexpr (requires { change(op.candidates); }) change(op.candidates);
    if constexpr (requires { change(op.keep); }) change(op.keep);
    if constexpr (requires { change(op.plan.count); }) change(op.plan.count);
  }
  other_lengths(other_lengths const&) = delete;
  other_lengths& operator=(other_lengths const&) = delete;
  ~other_lengths() {
    for (std::size_t i = was_.size(); i-- > 0;) *was_[i].first = was_[i].second;
  }

 private:
  template <class T>
  requires std::is_same_v<std::remove_const_t<T>, index_t>
  void change(tensor_ref<T, 2, host_space> const& t) {
    if (t.data == nullptr) return;
    for (index_t i = 0; i < t.extent[0]; ++i)
      for (index_t j = 0; j < t.extent[1]; ++j) {
        auto* const at = const_cast<index_t*>(t.at(i, j));
        was_.emplace_back(at, *at);
        *at = *at > 1 ? 1 : 3;
      }
  }
  std::vector<std::pair<index_t*, index_t>> was_;
};

/// Records the op while its lengths are others, then replays it: what enqueueing reads on the host, or
/// where it waits or allocates, shows.
template <class Op>
status run_second(Op const& op) {
  workspace measure;
  status const measured = call(one_thread(), op, measure);
  if (measured != status::ok) return measured;
  aligned_block const block(measure.peak());
  workspace place(block.span());
  recording graph(one_thread());
  status result;
  {
    other_lengths const others(op);
    result = enqueue(one_thread(), on_device(op), place);
    REQUIRE(graph.end());
  }
  CHECK(place.used() == 0);
  if (result == status::ok) REQUIRE(graph.replay());
  return result;
}
#else
template <class Op>
status run_second(Op const& op) {
  return run_exact(two_threads(), op);
}
#endif

/// Runs `op` in all ways; `outputs` (padded arrays) hold the last run's result afterwards.
template <class Op, class... Out>
void run_op(Op const& op, Out&... outputs) {
  auto const arrays = std::tie(outputs...);
  auto const before = std::make_tuple(outputs.data()...);
  auto const each = [&](auto const& f) { each_pair(arrays, before, f); };
  auto const unchanged = [&] {
    bool same = true;
    each([&](auto& out, auto const& old) { same = same && same_bits(out.data(), old); });
    return same;
  };
  workspace measure;
  REQUIRE(call(one_thread(), op, measure) == status::ok);
  CHECK(unchanged());
  if (measure.peak() > 0) {
    aligned_block const block(measure.peak());
    workspace small(block.span(1));
    long const started = started_kernels();
    CHECK(call(one_thread(), op, small) == status::workspace_too_small);
    CHECK(started_kernels() == started);
    CHECK(unchanged());
  }
  REQUIRE(run_exact(one_thread(), op) == status::ok);
  auto const single = std::make_tuple(outputs.data()...);
  each([](auto& out, auto const& old) { std::copy(old.begin(), old.end(), out.data().begin()); });
  REQUIRE(run_second(op) == status::ok);
  bool same = true;
  each_pair(arrays, single,
            [&](auto& out, auto const& first) { same = same && same_bits(out.data(), first); });
  CHECK(same);
  bool inside = true;
  each([&](auto& out, auto const&) { inside = inside && out.intact(); });
  CHECK(inside);
}

}  // namespace kvkeep::test
