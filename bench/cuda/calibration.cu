// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
// Rates of this device, by kernels as plain as can be: each program measures those that its floors are made of.
//   calibration/empty_node  an empty kernel among others in a graph: the least time of any launch
//   calibration/copy, read  device memory, 16 bytes per lane
//   calibration/mma         bf16 products of mma.sync from registers, random operands
//   calibration/wgmma       the same of warpgroups' products, where program and device have them
//   calibration/fma, exp2   fused multiply-adds, exponentials, eight chains per thread
#include <map>

#include <kvkeep/backend/cuda/kernels/core_rows.cuh>
#include <kvkeep/backend/cuda/window_plan.hpp>

#include "suite.hpp"

namespace bench {
namespace {

using cuda::launch;
using cuda::thread_of_block;
using cuda::unrolled;

constexpr int threads = 256;

struct empty_kernel {
  static constexpr int most_threads = 32, blocks_per_sm = 1;
  __device__ void operator()() const {}
};

struct copy_kernel {
  static constexpr int most_threads = threads, blocks_per_sm = 4, pieces = 4;
  uint4 const* from;
  uint4* to;
  __device__ void operator()() const {
    offset_t const at = static_cast<offset_t>(blockIdx.x) * threads * pieces + thread_of_block();
    uint4 x[pieces];
    unrolled<pieces>([&](int i) { x[i] = from[at + i * threads]; });
    unrolled<pieces>([&](int i) { to[at + i * threads] = x[i]; });
  }
};

/// The result depends on all that was read, and is written where no sum ever comes to.
struct read_kernel {
  static constexpr int most_threads = threads, blocks_per_sm = 4, pieces = 8;
  uint4 const* from;
  unsigned* out;
  __device__ void operator()() const {
    offset_t const at = static_cast<offset_t>(blockIdx.x) * threads * pieces + thread_of_block();
    uint4 x[pieces];
    unrolled<pieces>([&](int i) { x[i] = from[at + i * threads]; });
    unsigned all = 0xffffffffu;
    unrolled<pieces>([&](int i) { all &= x[i].x & x[i].y & x[i].z & x[i].w; });
    if (all == 0xffffffffu) *out = all;
  }
};

/// Eight products in flight per warp: 16 x 8 x 16 each.
struct mma_kernel {
  static constexpr int most_threads = threads, blocks_per_sm = 2, chains = 8;
  int rounds;
  float* out;  ///< [thread]

  static double flops(double warps, int n) { return warps * n * chains * 2.0 * 16 * 8 * 16; }
  __device__ void operator()() const {
    unsigned const thread = blockIdx.x * threads + static_cast<unsigned>(thread_of_block());
    // Pairs of bf16 between 1 and 2, or their negatives, from random bits.
    auto const operand = [&](unsigned i) {
      auto const bits = static_cast<unsigned>(scrambled(thread * 16 + i));
      return (bits & 0x807f807fu) | 0x3f803f80u;
    };
    unsigned const a0 = operand(0), a1 = operand(1), a2 = operand(2), a3 = operand(3);
    unsigned const b0 = operand(4), b1 = operand(5);
    float c[chains][4] = {};
    for (int r = 0; r < rounds; ++r)
      unrolled<chains>([&](int i) { cuda::mma(bf16{}, c[i], a0, a1, a2, a3, b0, b1); });
    float sum = 0;
    unrolled<chains>([&](int i) { sum += c[i][0] + c[i][1] + c[i][2] + c[i][3]; });
    out[thread] = sum;
  }
};

/// Two chains of 64 x 64 x 128 in flight per warpgroup, as the scoring kernels multiply.
struct wgmma_kernel {
  static constexpr int most_threads = threads, blocks_per_sm = 2, chains = 2, blocks = 4;
  using rows = cuda::core_rows<blocks>;
  int rounds;
  float* out;  ///< [thread]

  static std::size_t bytes() { return 64 * rows::pieces * sizeof(uint4); }
  static double flops(double groups, int n) { return groups * n * chains * 2.0 * 64 * 64 * 128; }
  __device__ void operator()() const {
    unsigned const thread = blockIdx.x * threads + static_cast<unsigned>(thread_of_block());
    cuda::shared_pieces shared;
    auto* const memory = shared.take<uint4>(64 * rows::pieces);
    auto const pair = [&](index_t i) {
      auto const bits = static_cast<unsigned>(scrambled(thread * 64 + static_cast<unsigned>(i)));
      return (bits & 0x807f807fu) | 0x3f803f80u;
    };
    for (index_t i = thread_of_block(); i < 64 * rows::pieces; i += threads)
      cuda::store_16(memory + i, make_uint4(pair(i), pair(i + 1), pair(i + 2), pair(i + 3)));
    cuda::writes_to_products();
    __syncthreads();
    rows::operand left;
    left.take(memory);
    cuda::group_products a = {}, b = {};
    for (int r = 0; r < rounds; ++r) {
      cuda::products_begin();
      rows::start(bf16{}, a, left, rows::descriptor(memory), true);
      cuda::products_end();
      rows::start(bf16{}, b, left, rows::descriptor(memory), true);
      cuda::products_end();
      cuda::products_wait<1>(a);
    }
    cuda::products_wait<0>(b);
    float sum = 0;
    unrolled<32>([&](int i) { sum += a[i / 4][i % 4] + b[i / 4][i % 4]; });
    out[thread] = sum;
  }
};

struct fma_kernel {
  static constexpr int most_threads = threads, blocks_per_sm = 4, chains = 8, each = 16;
  int rounds;
  float* out;
  __device__ void operator()() const {
    unsigned const thread = blockIdx.x * threads + static_cast<unsigned>(thread_of_block());
    float const x = 0.999F, y = static_cast<float>(thread % 7) * 1e-3F;
    float c[chains];
    unrolled<chains>([&](int i) { c[i] = static_cast<float>(i); });
    for (int r = 0; r < rounds; ++r)
      unrolled<each>([&](int) { unrolled<chains>([&](int i) { c[i] = __fmaf_rn(c[i], x, y); }); });
    float sum = 0;
    unrolled<chains>([&](int i) { sum += c[i]; });
    out[thread] = sum;
  }
};

struct exp2_kernel {
  static constexpr int most_threads = threads, blocks_per_sm = 4, chains = 8, each = 16;
  int rounds;
  float* out;
  __device__ void operator()() const {
    unsigned const thread = blockIdx.x * threads + static_cast<unsigned>(thread_of_block());
    float c[chains];
    unrolled<chains>(
        [&](int i) { c[i] = static_cast<float>(static_cast<unsigned>(i) + thread % 7) * 0.1F; });
    for (int r = 0; r < rounds; ++r)
      unrolled<each>([&](int) { unrolled<chains>([&](int i) { c[i] = cuda::fast_exp2(-c[i]); }); });
    float sum = 0;
    unrolled<chains>([&](int i) { sum += c[i]; });
    out[thread] = sum;
  }
};

using peak = double peaks::*;

struct calibration {
  char const* name;
  char const* unit;
  double scale;  ///< from the rate to the unit
  peak rate;
  double amount;                  ///< of a call; 0: the time itself
  std::vector<double> seconds{};  ///< per call, by sample
};

std::map<std::string, calibration>& results() {
  static std::map<std::string, calibration> all;
  return all;
}

bool has_warpgroups(suite const& s) { return cuda::warpgroups_multiply(s.ctx.capability, 128); }

/// Samples of `calls` launches, `start(i)` each. A few do: they hardly differ, and every program takes them.
template <class Start>
void take(suite& s, calibration what, int calls, Start const& start) {
  recording const r(s.ctx.stream, [&] {
    for (int i = 0; i < calls; ++i) expect(start(i), what.name);
  });
  what.seconds = time_replays(r, std::min(s.samples, 30));
  for (double& t : what.seconds) t /= calls;
  double const t = quantile(what.seconds, 0.5);
  s.rates.*what.rate = what.amount > 0 ? what.amount / t : t;
  results()[what.name] = std::move(what);
}

void calibrate_memory(suite& s) {
  std::size_t const bytes = s.tiny ? std::size_t{1} << 17 : std::size_t{1} << 29;
  rotated<std::byte> const memory(2, bytes);
  rotated<unsigned> const out(1, 1);
  fill_random(s.ctx, memory.data(), dtype::bf16, memory.size() / 2, 1);
  auto const n = static_cast<offset_t>(bytes / sizeof(uint4));
  auto const half = [&](int i) {
    return reinterpret_cast<uint4*>(memory.at(static_cast<std::size_t>(i % 2)));
  };
  take(s, {"copy", "GB/s", 1e-9, &peaks::copy, 2.0 * static_cast<double>(bytes)}, 4, [&](int i) {
    return launch(s.ctx, {n / (threads * copy_kernel::pieces), 1, threads}, 0,
                  copy_kernel{half(i), half(i + 1)});
  });
  take(s, {"read", "GB/s", 1e-9, &peaks::read, static_cast<double>(bytes)}, 4, [&](int i) {
    return launch(s.ctx, {n / (threads * read_kernel::pieces), 1, threads}, 0,
                  read_kernel{half(i), out.data()});
  });
}

int rounds_of(suite const& s) { return s.tiny ? 2 : 2000; }
int blocks_of(suite const& s) { return s.tiny ? 1 : 8 * s.ctx.n_sm; }

void calibrate_arithmetic(suite& s) {
  int const rounds = rounds_of(s), blocks = blocks_of(s);
  double const all = 1.0 * blocks * threads;
  rotated<float> const out(1, static_cast<std::size_t>(blocks) * threads);
  cuda::grid const g{blocks, 1, threads};
  take(s, {"mma", "TFLOP/s", 1e-12, &peaks::mma, mma_kernel::flops(all / 32, rounds)}, 2, [&](int) {
    return launch(s.ctx, g, 0, mma_kernel{rounds, out.data()});
  });
  double const chain = all * rounds * fma_kernel::chains * fma_kernel::each;
  take(s, {"fma", "TFLOP/s", 1e-12, &peaks::fma, 2 * chain}, 2, [&](int) {
    return launch(s.ctx, g, 0, fma_kernel{rounds, out.data()});
  });
  take(s, {"exp2", "T/s", 1e-12, &peaks::exp2, chain}, 2, [&](int) {
    return launch(s.ctx, g, 0, exp2_kernel{rounds, out.data()});
  });
}

}  // namespace

void calibrate(suite& s) {
  results().clear();
  take(s, {"empty_node", "us", 1e6, &peaks::node, 0}, s.tiny ? 4 : 1000, [&](int) {
    return launch(s.ctx, {1, 1, 32}, 0, empty_kernel{});
  });
  calibrate_memory(s);
  calibrate_arithmetic(s);
}

void calibrate_warpgroups(suite& s) {
  if constexpr (cuda::has_sm90a_code) {
    if (s.rates.wgmma > 0 || !has_warpgroups(s)) return;
    int const rounds = rounds_of(s), blocks = blocks_of(s);
    double const all = 1.0 * blocks * threads;
    rotated<float> const out(1, static_cast<std::size_t>(blocks) * threads);
    take(s, {"wgmma", "TFLOP/s", 1e-12, &peaks::wgmma, wgmma_kernel::flops(all / 128, rounds)}, 2,
         [&](int) {
           return launch(s.ctx, {blocks, 1, threads}, wgmma_kernel::bytes(),
                         wgmma_kernel{rounds, out.data()});
         });
  }
}

void add_calibration_rows(suite& s) {
  std::vector<std::string> names{"empty_node", "copy", "read", "mma", "fma", "exp2"};
  if (has_warpgroups(s)) names.push_back("wgmma");
  for (std::string const& name : names) {
    add_device_row(s, "calibration/" + name, [name](benchmark::State& state, suite& on) {
      if (name == "wgmma") calibrate_warpgroups(on);
      calibration const& what = results().at(name);
      std::size_t i = 0;
      for (auto _ : state) state.SetIterationTime(what.seconds[i++ % what.seconds.size()]);
      double const t = quantile(what.seconds, 0.5);
      auto& c = state.counters;
      c["us"] = t * 1e6;
      c["spread"] = (quantile(what.seconds, 0.75) - quantile(what.seconds, 0.25)) / t;
      c[what.unit] = on.rates.*what.rate * what.scale;
    });
  }
}

}  // namespace bench
