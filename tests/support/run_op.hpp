// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// Runs an op on a backend and checks what every op promises: it measures what it uses, writes nothing
/// when it gets less, stays inside its arrays, and gives the same bits again (on the CPU: with two
/// threads). The backend is the CPU's, or, with KVKEEP_TEST_CUDA, that for CUDA.
#pragma once

#include <cstring>
#include <new>
#include <tuple>

#include "test_layer.hpp"
#if defined(KVKEEP_TEST_CUDA)
#include "op_cuda.hpp"
#else
#include "op_cpu.hpp"
#endif

namespace kvkeep::test {

/// Memory of exactly `n` bytes on a 64-byte boundary.
class aligned_block {
 public:
  explicit aligned_block(std::size_t n) : n_(n) {
    data_ = static_cast<std::byte*>(::operator new (n, std::align_val_t{64}));
    std::memset(data_, 0xff, n);
  }
  aligned_block(aligned_block const&) = delete;
  aligned_block& operator=(aligned_block const&) = delete;
  ~aligned_block() { ::operator delete (data_, std::align_val_t{64}); }
  std::span<std::byte> span(std::size_t less = 0) const { return {data_, n_ - less}; }

 private:
  std::byte* data_;
  std::size_t n_;
};

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

/// Runs `op` in all ways; `outputs` (padded arrays) hold the two-thread run's result afterwards.
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
    CHECK(call(one_thread(), op, small) == status::workspace_too_small);
    CHECK(unchanged());
  }
  REQUIRE(run_exact(one_thread(), op) == status::ok);
  auto const single = std::make_tuple(outputs.data()...);
  each([](auto& out, auto const& old) { std::copy(old.begin(), old.end(), out.data().begin()); });
  REQUIRE(run_exact(two_threads(), op) == status::ok);
  bool same = true;
  each_pair(arrays, single,
            [&](auto& out, auto const& first) { same = same && same_bits(out.data(), first); });
  CHECK(same);
  bool inside = true;
  each([&](auto& out, auto const&) { inside = inside && out.intact(); });
  CHECK(inside);
}

}  // namespace kvkeep::test
