// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
// What kernels ask of a device's memory, at the benchmarks' shapes: caches are read once, in whole sectors, and shared
// memory is used without bank conflicts. A figure that grows is time on every device, whoever measures it.
#include "traffic.hpp"

#include "../bench/cuda_rows.hpp"

#include "../../bench/cuda/attention.cu"
#include "../../bench/cuda/calibration.cu"
#include "../../bench/cuda/choice.cu"
#include "../../bench/cuda/expected.cu"
#include "../../bench/cuda/scoring.cu"

namespace bench {
namespace {

using emulation::array_traffic;

// -- the counts themselves ----------------------------------------------------------------------------

alignas(128) float numbers[32 * 64], copies[32 * 64];
int thread() { return static_cast<int>(threadIdx.x); }
float* shared_floats() { return reinterpret_cast<float*>(kvkeep::cuda::shared_words); }

struct four {
  float x, y, z, w;
};

template <int Step>
void read_apart(int) {
  copies[thread()] = numbers[thread() * Step];
}
void read_twice(int) {
  copies[thread()] = numbers[thread()];
  __syncthreads();
  copies[thread()] = numbers[thread() + 8];
}
void read_fours(int) {
  reinterpret_cast<four*>(copies)[thread()] = reinterpret_cast<four const*>(numbers)[thread()];
}
void read_some(int) {
  if (thread() % 8 == 0) copies[thread()] = numbers[thread()];
}
template <int Step>
void share(int) {
  shared_floats()[thread() * Step] = 1;
}
void share_one(int) {
  shared_floats()[thread()] = 1;
  __syncthreads();
  copies[thread()] = shared_floats()[5];
}

emulation::traffic of(void (*kernel)(int), std::size_t shared = 0) {
  emulation::forget_traffic();
  emulation::watch_array("numbers", numbers, sizeof numbers);
  emulation::watch_array("copies", copies, sizeof copies);
  cudaLaunchConfig_t const c{1, 32, shared, nullptr, nullptr, 0};
  REQUIRE(cudaLaunchKernelEx(&c, kernel, 0) == cudaSuccess);
  return emulation::traffic_so_far();
}

TEST_CASE("requests, sectors and passes are those of a warp") {
  auto const near = of(read_apart<1>);
  CHECK(near.read.at("numbers").requests == 1);
  CHECK(near.read.at("numbers").bytes == 128);
  CHECK(near.read.at("numbers").waste() == 1);
  CHECK(near.written.at("copies").waste() == 1);
  CHECK(of(read_apart<2>).read.at("numbers").waste() == 2);
  CHECK(of(read_apart<8>).read.at("numbers").waste() == 8);
  CHECK(of(read_apart<32>).read.at("numbers").sectors == 32);
  CHECK(of(read_some).read.at("numbers").waste() == 8);
  auto const twice = of(read_twice);
  CHECK(twice.read.at("numbers").requests == 2);
  CHECK(twice.read.at("numbers").sectors == 8);
  CHECK(twice.read.at("numbers").distinct == 5);
  CHECK(twice.written.at("copies").passes() == 2);
  auto const fours = of(read_fours);
  CHECK(fours.read.at("numbers").requests == 1);
  CHECK(fours.read.at("numbers").bytes == 512);
  CHECK(fours.written.at("copies").waste() == 1);
}

TEST_CASE("shared memory takes as many rounds as its busiest bank has words") {
  CHECK(of(share<1>, 128).shared.rounds == 1);
  CHECK(of(share<2>, 256).shared.conflicts() == 2);
  CHECK(of(share<3>, 384).shared.conflicts() == 1);
  CHECK(of(share<32>, 4096).shared.conflicts() == 32);
  auto const one = of(share_one, 128);
  CHECK(one.shared.requests == 2);
  CHECK(one.shared.conflicts() == 1);
}

// -- the kernels --------------------------------------------------------------------------------------

template <class T>
void watch(char const* name, rotated<T> const& a) {
  emulation::watch_array(name, a.data(), a.size() * sizeof(T));
}

/// One call of an op, of whose arrays `arrays()` says which are counted.
template <class Op, class F>
emulation::traffic of(suite& s, Op const& o, F const& arrays) {
  auto const memory = scratch_for(s.ctx, o);
  workspace ws = placed_in(memory);
  emulation::forget_traffic();
  arrays();
  expect(run(s.ctx, o, ws), "an op");
  wait_for(s.ctx.stream);
  return emulation::traffic_so_far();
}

/// Every byte of the array, so many times, and no other bytes with them.
template <class T>
void check_passes(array_traffic const& t, rotated<T> const& a, double passes) {
  auto const bytes = static_cast<double>(a.size() * sizeof(T));
  CHECK(t.waste() == 1);
  CHECK(t.bytes == passes * bytes);
}

point scoring_point(dtype type, index_t tokens) {
  point p = base;
  p.tokens = tokens;
  p.kv_heads = 2;
  p.window = 32;
  p.type = type;
  return p;
}

TEST_CASE("scores of a window read keys once, twice without log-sum-exps") {
  for (dtype const type : {dtype::bf16, dtype::f16, dtype::e4m3})
    for (bool const given : {true, false}) {
      INFO(kvkeep::to_string(type) << (given ? ", given log-sum-exps" : ""));
      suite s = tiny_suite();
      s.ctx = with_products(s.ctx, products::warps);
      point const p = scoring_point(type, 2048);
      scoring_case const c(s, p, p.window, given, 1);
      auto const t = of(s, c.sums(on_device{}), [&] {
        watch("k", c.k);
        watch("out", c.out);
        watch("positions", c.positions);
      });
      check_passes(t.read.at("k"), c.k, given ? 1 : 2);
      check_passes(t.written.at("out"), c.out, 1);
      check_passes(t.read.at("positions"), c.positions, given ? 1 : 2);
      CHECK(t.shared.conflicts() < 1.01);
      // What an H200's shared memory can serve while its device memory brings 128 bytes is about 6 rounds; products
      // alone need 4 of 16-bit keys.
      double const lines = t.read.at("k").bytes / 128 * (type == dtype::e4m3 ? 2 : 1);
      CHECK(t.shared.rounds / lines < 8);
    }
}

TEST_CASE("moments of a window read keys in whole sectors, twice per 32 queries") {
  suite s = tiny_suite();
  s.ctx = with_products(s.ctx, products::warps);
  point const p = scoring_point(dtype::bf16, 1024);
  moments_case const c(s, p, 1);
  auto const t = of(s, c.op_of(on_device{}), [&] {
    watch("k", c.k);
    watch("moments", c.moments);
  });
  check_passes(t.read.at("k"), c.k, 2.0 * p.window * p.group / kvkeep::cuda::plain_queries);
  CHECK(t.read.at("moments").waste() == 1);
  CHECK(t.written.at("moments").waste() == 1);
  CHECK(t.shared.conflicts() < 1.15);
}

TEST_CASE("moments of queries read these in whole sectors, once") {
  suite s = tiny_suite();
  point p = scoring_point(dtype::bf16, 300);
  p.group = 1;
  query_case const c(s, p, 1);
  auto const t = of(s, c.op_of(on_device{}), [&] { watch("q", c.q); });
  CHECK(t.read.at("q").waste() == 1);
  // A feature and its pair's other one, but for the first four rows.
  CHECK(t.read.at("q").bytes == 2.0 * 296 / 300 * static_cast<double>(4 * c.q.size()));
  CHECK(t.shared.conflicts() < 1.01);
}

TEST_CASE("quadratic logits read keys in whole sectors, and forms once per 64 slots") {
  suite s = tiny_suite();
  point const p = scoring_point(dtype::bf16, 256);
  form_case const c(s, p, 1);
  auto const t = of(s, c.op_of(on_device{}), [&] {
    watch("k", c.k);
    watch("out", c.out);
  });
  check_passes(t.read.at("k"), c.k, 1.5 * p.group);
  check_passes(t.written.at("out"), c.out, 1);
  CHECK(t.shared.conflicts() < 1.15);
}

TEST_CASE("fused scores read keys once for normalisers and once for scores") {
  suite s = tiny_suite();
  s.ctx = with_products(s.ctx, products::warps);
  point const p = scoring_point(dtype::bf16, 2048);
  scoring_case const c(s, p, 4, false, 1);
  auto const t = of(s, c.fused(on_device{}), [&] {
    watch("k", c.k);
    watch("out", c.out);
  });
  check_passes(t.read.at("k"), c.k, 2);
  check_passes(t.written.at("out"), c.out, 1);
  CHECK(t.shared.conflicts() < 1.01);
}

TEST_CASE("decode attention reads keys and values once, whatever else it gives") {
  for (dtype const type : cache_types)
    for (auto const kind : {attention_kind::plain, attention_kind::folded}) {
      INFO(kvkeep::to_string(type) << (kind == attention_kind::folded ? ", folded" : ""));
      suite s = tiny_suite();
      point p = base;
      p.batch = 2;
      p.kv_heads = 2;
      p.capacity = 1024;
      p.type = type;
      attention_case const c(s, p, kind, 1);
      auto const t = of(s, c.op(on_device{}), [&] {
        watch("k", c.k);
        watch("v", c.v);
        watch("q", c.q);
        watch("sums", c.sums);
      });
      check_passes(t.read.at("k"), c.k, 1);
      check_passes(t.read.at("v"), c.v, 1);
      CHECK(t.read.at("q").waste() <= 2);  // a lane's features by halves of a sector
      if (kind == attention_kind::folded) {
        check_passes(t.read.at("sums"), c.sums, 1);
        check_passes(t.written.at("sums"), c.sums, 1);
      }
      CHECK(t.shared.conflicts() < 1.25);
    }
}

TEST_CASE("a selection reads scores once, and a move what stays") {
  suite s = tiny_suite();
  point p = base;
  p.kv_heads = 2;
  p.tokens = 2048;
  p.capacity = 512;
  p.window = 32;
  p.type = dtype::bf16;
  move_case const c(s, p, 1);
  auto const chosen = of(s, c.plan.op(on_device{}), [&] {
    watch("values", c.plan.values);
    watch("positions", c.plan.positions);
  });
  // Not those of protected slots.
  CHECK(chosen.read.at("values").bytes == 4.0 * p.kv_heads * (p.tokens - p.window));
  CHECK(chosen.read.at("values").waste() == 1);
  CHECK(chosen.read.at("positions").passes() < 3.1);
  auto const moved = of(s, c.op(on_device{}), [&] {
    watch("k", c.k);
    watch("v", c.v);
    watch("to_k", c.to_k);
    watch("to_v", c.to_v);
  });
  for (char const* const name : {"k", "v"}) {
    CHECK(moved.read.at(name).waste() == 1);
    CHECK(moved.read.at(name).bytes == static_cast<double>(c.to_k.size()));
  }
  check_passes(moved.written.at("to_k"), c.to_k, 1);
  check_passes(moved.written.at("to_v"), c.to_v, 1);
}

}  // namespace
}  // namespace bench
