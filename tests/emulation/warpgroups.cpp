// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// Products of warpgroups in emulated kernels (cuda/kvkeep/backend/cuda/kernels/wgmma.cuh): operands found by
/// what the PTX manual says of descriptors and core matrices, one thread's part of a product by that thread.
#include <array>
#include <cstring>
#include <limits>
#include <vector>

#include <kvkeep/backend/cuda/kernels/wgmma.cuh>

// Told of reads that products make, if somebody watches (race_check.cpp).
extern "C" [[gnu::weak]] void __tsan_read_range(void* at, unsigned long bytes);

namespace kvkeep::cuda {
extern uint4 shared_words[227 * 1024 / 16];
}

namespace emulation {
namespace {

constexpr unsigned most_threads = 1024, group_threads = 128, shared_bytes = 227 * 1024;

char* memory() { return reinterpret_cast<char*>(kvkeep::cuda::shared_words); }

/// Who has to make a piece of 16 bytes visible to products: a thread of a block, plus 1; 0: nobody.
struct writer {
  unsigned launch = 0, block = 0, thread = 0;
};
std::array<writer, shared_bytes / 16> writers;

bool unseen(std::size_t piece) {
  writer const& w = writers[piece];
  return w.thread != 0 && w.launch == standing.launch && w.block == standing.block;
}

/// 16 elements of a row, as a product takes them.
using row = std::array<float, 16>;

float value_of(std::uint16_t bits, bool half) {
  if (half) return kvkeep::to_float(kvkeep::fp16{bits});
  return kvkeep::to_float(kvkeep::bf16{bits});
}

/// Row `r` of the matrix that a descriptor describes.
row row_of(unsigned long long bits, unsigned r, bool half) {
  if (bits >> 62 != 0) fail("a descriptor with a swizzle");
  if ((bits & ~0x3fff3fff3fffull) != 0) fail("a descriptor with more than offsets");
  auto const field = [&](int at) { return static_cast<std::size_t>(bits >> at & 0x3fff) * 16; };
  row values;
  for (unsigned piece = 0; piece < 2; ++piece) {
    std::size_t const at = field(0) + piece * field(16) + r / 8 * field(32) + r % 8 * 16;
    if (at + 16 > shared_bytes) fail("a descriptor that leaves shared memory");
    if (unseen(at / 16)) fail("products of what was not made visible to them");
    if (__tsan_read_range != nullptr) __tsan_read_range(memory() + at, 16);
    for (unsigned k = 0; k < 8; ++k) {
      std::uint16_t x = 0;
      std::memcpy(&x, memory() + at + k * 2, 2);
      values[piece * 8 + k] = value_of(x, half);
    }
  }
  return values;
}

/// One thread's part of a product: its two rows and 16 columns.
struct product {
  float (*z)[4];
  product_operands from;
  std::array<row, 2> left{};
  std::array<row, 16> right{};
  bool late = false;  ///< what memory holds at the wait counts, not what it held at the start

  void read_memory(unsigned thread) {
    unsigned const warp = thread / warp_size % 4, r = thread % warp_size / 4, q = thread % 4;
    if (from.registers == nullptr)
      for (unsigned x = 0; x < 2; ++x) left[x] = row_of(from.a, warp * 16 + x * 8 + r, from.half);
    for (unsigned c = 0; c < 16; ++c)
      right[c] = row_of(from.b, c / 2 * 8 + 2 * q + c % 2, from.half);
  }
};

/// Accumulators that products have in hand.
struct held {
  float (*z)[4];
  float value[8][4];
};

struct thread_state {
  unsigned launch = 0, block = 0;
  std::vector<product> open;
  std::vector<std::vector<product>> groups;
  std::vector<held> accumulators;
  std::vector<std::size_t> copies, written;  ///< pieces: of the open group; not visible yet
  std::vector<std::vector<std::size_t>> copy_groups;
  unsigned long meetings = 0;
};
std::array<thread_state, most_threads> threads;
struct {
  unsigned launch = 0, block = 0;
  unsigned long arrived = 0;
} meetings[most_threads / group_threads];
unsigned long draws = 0;

/// The running thread's, empty when its block starts.
thread_state& own() {
  thread_state& t = threads[linear_thread()];
  if (t.launch != standing.launch || t.block != standing.block)
    t = {standing.launch, standing.block, {}, {}, {}, {}, {}, {}, 0};
  return t;
}

held& take(thread_state& t, float (*z)[4]) {
  for (held& h : t.accumulators)
    if (h.z == z) return h;
  held h{z, {}};
  std::memcpy(h.value, z, sizeof h.value);
  for (unsigned i = 0; i < 32; ++i) z[i / 4][i % 4] = std::numeric_limits<float>::quiet_NaN();
  t.accumulators.push_back(h);
  return t.accumulators.back();
}

void multiply(thread_state& t, product& p) {
  product again = p;  // watchers learn of reads until the wait, whichever count
  again.read_memory(linear_thread());
  if (p.late) p = again;
  held& h = take(t, p.z);
  for (unsigned i = 0; i < 32; ++i) {
    float& c = h.value[i / 4][i % 4];
    double sum = p.from.add ? static_cast<double>(c) : 0.0;
    for (unsigned k = 0; k < 16; ++k)
      sum += static_cast<double>(p.left[i % 4 / 2][k]) *
             static_cast<double>(p.right[i / 4 * 2 + i % 2][k]);
    c = static_cast<float>(sum);
  }
}

/// Gives back accumulators that no product has in hand any more.
void give_back(thread_state& t) {
  auto const in_hand = [&](held const& h) {
    for (auto const& g : t.groups)
      for (product const& p : g)
        if (p.z == h.z) return true;
    for (product const& p : t.open)
      if (p.z == h.z) return true;
    return false;
  };
  std::erase_if(t.accumulators, [&](held const& h) {
    if (in_hand(h)) return false;
    std::memcpy(h.z, h.value, sizeof h.value);
    return true;
  });
}

void write_piece(thread_state& t, std::size_t piece) {
  t.written.push_back(piece);
  writers[piece] = {standing.launch, standing.block, linear_thread() + 1};
}
std::size_t piece_of(void const* p) {
  return static_cast<std::size_t>(static_cast<char const*>(p) - memory()) / 16;
}

}  // namespace

void products_meet() {
  unsigned const group = linear_thread() / group_threads;
  if ((group + 1) * group_threads > blockDim.x)
    fail("products in a block that ends inside a warpgroup");
  auto& m = meetings[group];
  if (m.launch != standing.launch || m.block != standing.block)
    m = {standing.launch, standing.block, 0};
  unsigned long const wanted = ++own().meetings * group_threads;
  ++m.arrived;
  for (int tries = 0; tries < 10000; ++tries) {
    auto const* const there = warp_exchange(m.arrived >= wanted ? 1 : 0, all_lanes, "products");
    bool all = true;
    for (unsigned l = 0; l < warp_size; ++l) all = all && there[l] != 0;
    if (all) return;
  }
  fail("products in part of a warpgroup");
}

void start_product(float (*z)[4], product_operands const& from) {
  thread_state& t = own();
  unsigned const lane = linear_thread() % warp_size;
  auto const same = [](unsigned long long bits) {
    auto const* const all = warp_exchange(bits, all_lanes, "a descriptor");
    for (unsigned l = 0; l < warp_size; ++l)
      if (all[l] != bits) fail("descriptors that differ within a warp");
  };
  product p{z, from};
  same(from.b);
  if (from.registers == nullptr)
    same(from.a);
  else
    for (unsigned upper = 0; upper < 2; ++upper) {
      unsigned const* const a = from.registers + 2 * upper;
      auto const* const all =
          warp_exchange(a[0] | std::uint64_t{a[1]} << 32, all_lanes, "a left operand");
      for (unsigned x = 0; x < 2; ++x)
        for (unsigned k = 0; k < 8; ++k)
          p.left[x][upper * 8 + k] = value_of(
              static_cast<std::uint16_t>(all[lane / 4 * 4 + k / 2] >> (32 * x + 16 * (k % 2))),
              from.half);
    }
  take(t, z);
  p.read_memory(linear_thread());
  p.late = (draws++ * 2654435761u >> 7) % 2 == 0;
  t.open.push_back(p);
}

void end_products() {
  thread_state& t = own();
  t.groups.push_back(std::move(t.open));
  t.open.clear();
}

void wait_products(int pending) {
  thread_state& t = own();
  while (t.groups.size() > static_cast<std::size_t>(pending)) {
    for (product& p : t.groups.front()) multiply(t, p);
    t.groups.erase(t.groups.begin());
  }
  give_back(t);
}

void note_copy(void const* to) { own().copies.push_back(piece_of(to)); }
void note_copies_end() {
  thread_state& t = own();
  t.copy_groups.push_back(std::move(t.copies));
  t.copies.clear();
}
void note_copies_wait(int pending) {
  thread_state& t = own();
  while (t.copy_groups.size() > static_cast<std::size_t>(pending)) {
    for (std::size_t const piece : t.copy_groups.front()) write_piece(t, piece);
    t.copy_groups.erase(t.copy_groups.begin());
  }
}
void note_store(void const* to) { write_piece(own(), piece_of(to)); }
void make_visible() {
  thread_state& t = own();
  for (std::size_t const piece : t.written)
    if (unseen(piece) && writers[piece].thread == linear_thread() + 1) writers[piece].thread = 0;
  t.written.clear();
}

}  // namespace emulation
