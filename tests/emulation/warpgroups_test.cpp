// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
// The emulated products of warpgroups against plain loops, over random descriptors; what it refuses; and that
// rows in shared memory lie where descriptors say.
#include <sys/wait.h>
#include <unistd.h>
#include <csignal>

#include <kvkeep/backend/cuda/kernels/core_rows.cuh>
#include <kvkeep/backend/cuda/launch.cuh>

#include "../support/cache_options.hpp"
#include "../support/catch.hpp"
#include "../support/random.hpp"

namespace {

using namespace kvkeep;
using test::generator;
using test::uz;

/// Where 64 rows of 16 elements lie, in bytes.
struct place {
  unsigned start, leading, stride;

  unsigned of(unsigned row, unsigned k) const {
    return start + row / 8 * stride + k / 8 * leading + row % 8 * 16 + k % 8 * 2;
  }
  unsigned end() const { return of(63, 15) + 2; }
  unsigned long long descriptor() const {
    return start / 16 | static_cast<unsigned long long>(leading / 16) << 16 |
           static_cast<unsigned long long>(stride / 16) << 32;
  }
};

template <class T>
struct numbers {
  alignas(16) T a[64][16];
  alignas(16) T b[64][16];
};

/// What may be wrong with a kernel.
enum class fault { none, unseen_copies, unseen_stores, part_of_group, swizzle, no_wait };

/// z = a * b twice, the second time added to the first; a by descriptor or from registers.
template <class T>
struct product_kernel {
  static constexpr int most_threads = 256, blocks_per_sm = 1;
  numbers<T> const* in;
  float* out;  ///< [64][64] of the second warpgroup
  place a, b;
  bool registers, twice;
  fault wrong;

  void operator()() const {
    cuda::shared_pieces shared;
    auto* const memory = shared.take<char>(64 * 1024);
    for (unsigned i = threadIdx.x; i < 1024; i += blockDim.x)
      std::memcpy(memory + a.of(i / 16, i % 16), &in->a[i / 16][i % 16], 2);
    for (unsigned i = threadIdx.x; i < 128; i += blockDim.x) {
      auto* const piece = reinterpret_cast<uint4*>(memory + b.of(i / 2, i % 2 * 8));
      uint4 value;
      std::memcpy(&value, &in->b[i / 2][i % 2 * 8], 16);
      if (i % 2 == 0 && wrong != fault::unseen_stores)
        cuda::copy_16(piece, &in->b[i / 2][i % 2 * 8], true);
      else if (wrong != fault::unseen_copies)
        cuda::store_16(piece, value);
    }
    cuda::copies_end();
    cuda::copies_wait<0>();
    if (wrong != fault::unseen_copies && wrong != fault::unseen_stores) cuda::writes_to_products();
    __syncthreads();
    if (threadIdx.x < (wrong == fault::part_of_group ? 160U : 128U)) return;
    multiply();
  }
  void multiply() const {
    unsigned const warp = threadIdx.x / 32 % 4, r = threadIdx.x % 32 / 4, q = threadIdx.x % 4;
    unsigned fragment[4];
    for (unsigned i = 0; i < 4; ++i)
      std::memcpy(&fragment[i], &in->a[warp * 16 + i % 2 * 8 + r][i / 2 * 8 + 2 * q], 4);
    unsigned long long const swizzle = wrong == fault::swizzle ? 1ULL << 62 : 0;
    cuda::group_products z;
    for (bool const add : {false, true}) {
      if (add && !twice) continue;
      cuda::products_begin();
      if (registers)
        cuda::start_products(T{}, z, fragment, b.descriptor() | swizzle, add);
      else
        cuda::start_products(T{}, z, a.descriptor(), b.descriptor() | swizzle, add);
      cuda::products_end();
    }
    if (wrong != fault::no_wait) cuda::products_wait<0>(z);
    for (unsigned i = 0; i < 32; ++i)
      out[(warp * 16 + i % 4 / 2 * 8 + r) * 64 + i / 4 * 8 + 2 * q + i % 2] = z[i / 4][i % 4];
    cuda::products_wait<0>(z);
  }
};

/// A stride that keeps rows apart.
place random_place(generator& g, unsigned start) {
  unsigned const gap = static_cast<unsigned>(g.integer(0, 3)) * 16;
  bool const pieces_inside = g.chance(0.5F);
  return pieces_inside ? place{start, 128 + gap, 256 + 3 * gap}
                       : place{start, 8 * (128 + gap) + gap, 128 + gap};
}

template <class T>
struct product_run {
  numbers<T> in;
  std::vector<float> out = std::vector<float>(64 * 64, 0.25F);
  product_kernel<T> kernel;

  explicit product_run(generator& g, fault wrong = fault::none) {
    for (auto* const m : {&in.a, &in.b})
      for (auto& row : *m)
        for (T& x : row) {
          if constexpr (std::is_same_v<T, bf16>)
            x = to_bf16(g.normal());
          else
            x = to_fp16(g.normal());
        }
    place const a = random_place(g, static_cast<unsigned>(g.integer(0, 5)) * 16);
    unsigned const behind = (a.end() + 15) / 16 * 16;
    kernel = {&in, out.data(), a, random_place(g, behind), g.chance(0.5F), g.chance(0.5F), wrong};
  }
  bool start() {
    cuda::context ctx(nullptr);
    return launch(ctx, {1, 1, 256}, 64 * 1024, kernel) == status::ok;
  }
  bool right() const {
    bool good = true;
    for (index_t i = 0; i < 64; ++i)
      for (index_t j = 0; j < 64; ++j) {
        double sum = 0;
        for (index_t k = 0; k < 16; ++k)
          sum +=
              static_cast<double>(to_float(in.a[i][k])) * static_cast<double>(to_float(in.b[j][k]));
        double const got = static_cast<double>(out[uz(i * 64 + j)]);
        good = good && std::abs(got - sum * (kernel.twice ? 2 : 1)) <= 1e-5;
      }
    return good;
  }
};

/// Whether the program ends itself there.
template <class F>
bool aborts(F const& f) {
  pid_t const child = fork();
  if (child == 0) {
    std::signal(SIGABRT, SIG_DFL);
    f();
    _exit(0);
  }
  int how = 0;
  waitpid(child, &how, 0);
  return WIFSIGNALED(how) && WTERMSIG(how) == SIGABRT;
}

/// Rows copied as the kernels do, read through their descriptor.
template <int Blocks>
struct rows_kernel {
  static constexpr int most_threads = 128, blocks_per_sm = 1;
  using rows = cuda::core_rows<Blocks>;
  uint4 const* in;  ///< [64][pieces]
  float* out;       ///< [64][64] rows times rows, by registers and by descriptor
  float* other;

  void operator()() const {
    cuda::shared_pieces shared;
    auto* const memory = shared.take<uint4>(64 * rows::pieces);
    rows::copy_queries(in, memory, 64, [](index_t i) { return i < 60 ? i : -1; });
    cuda::copies_end();
    cuda::copies_wait<0>();
    cuda::writes_to_products();
    __syncthreads();
    typename rows::operand left;
    left.take(memory);
    cuda::group_products z, y;
    cuda::products_begin();
    rows::start(bf16{}, z, left, rows::descriptor(memory), false);
    cuda::products_end();
    rows::start(bf16{}, y, rows::descriptor(memory), rows::descriptor(memory), false);
    cuda::products_end();
    cuda::products_wait<1>(z);
    cuda::products_wait<0>(y);
    unsigned const warp = threadIdx.x / 32, r = threadIdx.x % 32 / 4, q = threadIdx.x % 4;
    for (unsigned i = 0; i < 32; ++i) {
      unsigned const at = (warp * 16 + i % 4 / 2 * 8 + r) * 64 + i / 4 * 8 + 2 * q + i % 2;
      out[at] = z[i / 4][i % 4];
      other[at] = y[i / 4][i % 4];
    }
  }
};

template <int Blocks>
void check_rows(generator& g) {
  constexpr index_t dim = Blocks * 32;
  std::vector<bf16> in(64 * dim);
  for (bf16& x : in) x = to_bf16(g.normal());
  std::vector<uint4> pieces(in.size() / 8);
  std::memcpy(pieces.data(), in.data(), in.size() * 2);
  std::vector<float> out(64 * 64), other(64 * 64);
  cuda::context ctx(nullptr);
  using kernel = rows_kernel<Blocks>;
  REQUIRE(launch(ctx, {1, 1, 128}, 64 * kernel::rows::pieces * 16,
                 kernel{pieces.data(), out.data(), other.data()}) == status::ok);
  bool right = true;
  for (index_t i = 0; i < 64; ++i)
    for (index_t j = 0; j < 64; ++j) {
      double sum = 0;
      for (index_t k = 0; i < 60 && j < 60 && k < dim; ++k)
        sum += static_cast<double>(to_float(in[uz(i * dim + k)])) *
               static_cast<double>(to_float(in[uz(j * dim + k)]));
      right = right && std::abs(static_cast<double>(out[uz(i * 64 + j)]) - sum) <= 1e-3;
    }
  CHECK(right);
  CHECK(out == other);
}

}  // namespace

TEST_CASE("products of warpgroups equal plain loops wherever descriptors point") {
  test::for_seeds(20, [](generator& g) {
    product_run<bf16> b(g);
    REQUIRE(b.start());
    CHECK(b.right());
    product_run<fp16> h(g);
    REQUIRE(h.start());
    CHECK(h.right());
  });
}

TEST_CASE("accumulators are no numbers before the wait") {
  generator g(1);
  product_run<bf16> early(g, fault::no_wait);
  REQUIRE(early.start());
  bool none = true;
  for (float const x : early.out) none = none && std::isnan(x);
  CHECK(none);
}

TEST_CASE("what the hardware would get wrong is refused") {
  generator g(1);
  for (fault const wrong :
       {fault::unseen_copies, fault::unseen_stores, fault::part_of_group, fault::swizzle}) {
    product_run<bf16> r(g, wrong);
    INFO(static_cast<int>(wrong));
    CHECK(aborts([&] { (void)r.start(); }));
  }
  product_run<bf16> good(g);
  CHECK(!aborts([&] { (void)good.start(); }));
}

TEST_CASE("rows lie where their descriptors say") {
  generator g(3);
  check_rows<2>(g);
  check_rows<4>(g);
}
