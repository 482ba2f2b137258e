// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
// 64 sequences of 128k tokens, 34 GB of keys and values: attention and selection of the whole, the far end
// checked against plain arithmetic on the host. For devices with that much memory.
#include "../support/catch.hpp"

#include <kvkeep/cuda.cuh>
#include <kvkeep/view/kv_view.hpp>

#include <algorithm>
#include <cmath>
#include <vector>

namespace {

using namespace kvkeep;

constexpr cache_shape huge{64, 32, 8, 128, 128, 131072};
constexpr index_t kept = 1024;

/// A multiple of 1/128 in [-1, 1), which bf16 holds exactly, for feature d of a row.
KVKEEP_HD inline float value_of(offset_t row, index_t d, unsigned salt) {
  auto x = static_cast<unsigned long long>(row) * 0x9e3779b97f4a7c15ull + salt;
  x = (x ^ (x >> 29)) * 0xbf58476d1ce4e5b9ull + static_cast<unsigned>(d) * 0x94d049bbull;
  x ^= x >> 32;
  return static_cast<float>(static_cast<int>((x >> 7) & 255) - 128) / 128;
}
/// A score of a slot; a few thousand of a head tie.
KVKEEP_HD inline float score_of(offset_t row) {
  return value_of(row, 0, 77) + value_of(row, 1, 78) / 256;
}

/// Fills a row of K, V, positions and scores. Index: row of (sequence, head, slot).
struct fill_row {
  bf16* k;
  bf16* v;
  index_t* positions;
  float* scores;
  index_t slots;
  index_t dim;
  KVKEEP_HD void operator()(index_t row) const {
    for (index_t d = 0; d < dim; ++d) {
      k[static_cast<offset_t>(row) * dim + d] = to_bf16(value_of(row, d, 1));
      v[static_cast<offset_t>(row) * dim + d] = to_bf16(value_of(row, d, 2));
    }
    positions[row] = row % slots;
    scores[row] = score_of(row);
  }
};

/// Memory of the device alone.
template <class T>
class device_array {
 public:
  explicit device_array(std::size_t n) : n_(n) {
    void* p = nullptr;
    REQUIRE(cudaMalloc(&p, n * sizeof(T)) == cudaSuccess);
    data_ = static_cast<T*>(p);
  }
  explicit device_array(std::vector<T> const& from) : device_array(from.size()) {
    REQUIRE(cudaMemcpy(data_, from.data(), n_ * sizeof(T), cudaMemcpyHostToDevice) == cudaSuccess);
  }
  device_array(device_array const&) = delete;
  device_array& operator=(device_array const&) = delete;
  ~device_array() { cudaFree(data_); }
  T* data() const { return data_; }
  std::vector<T> read(std::size_t first, std::size_t n) const {
    std::vector<T> r(n);
    REQUIRE(cudaMemcpy(r.data(), data_ + first, n * sizeof(T), cudaMemcpyDeviceToHost) ==
            cudaSuccess);
    return r;
  }

 private:
  T* data_ = nullptr;
  std::size_t n_;
};

/// Measures, allocates, runs and waits.
template <class Op>
void run_op(cuda::context& c, Op const& o) {
  workspace counting;
  REQUIRE(run(c, o, counting) == status::ok);
  device_array<std::byte> const memory(counting.peak() + workspace::alignment);
  workspace placed(std::span<std::byte>(memory.data(), counting.peak() + workspace::alignment));
  REQUIRE(run(c, o, placed) == status::ok);
  REQUIRE(cudaStreamSynchronize(c.stream) == cudaSuccess);
}

float query_of(index_t seq, index_t head, index_t d) {
  return value_of(offset_t{seq} * huge.n_q_heads + head, d, 9) * 8;
}

/// Output of one query head, in double.
std::vector<double> attention(index_t seq, index_t head, index_t length) {
  offset_t const first = (offset_t{seq} * huge.n_kv_heads + head / huge.group()) * huge.max_slots;
  std::vector<double> out(static_cast<std::size_t>(huge.dim_v));
  double sum = 0;
  for (index_t t = 0; t < length; ++t) {
    double dot = 0;
    for (index_t d = 0; d < huge.dim_k; ++d)
      dot += double{query_of(seq, head, d)} * double{value_of(first + t, d, 1)};
    double const w = std::exp(dot / std::sqrt(static_cast<double>(huge.dim_k)));
    sum += w;
    for (index_t d = 0; d < huge.dim_v; ++d)
      out[static_cast<std::size_t>(d)] += w * double{value_of(first + t, d, 2)};
  }
  for (double& x : out) x /= sum;
  return out;
}

}  // namespace

TEST_CASE("64 sequences of 128k tokens are attended to and selected from") {
  std::size_t const rows = product(huge.n_seq, huge.n_kv_heads, huge.max_slots);
  std::size_t free = 0, total = 0;
  REQUIRE(cudaMemGetInfo(&free, &total) == cudaSuccess);
  std::size_t const needed = rows * 128 * 2 * 2 + (std::size_t{4} << 30);
  if (free < needed) {
    WARN("skipped: needs " << needed << " free bytes of device memory, has " << free);
    return;
  }
  cudaStream_t stream = nullptr;
  REQUIRE(cudaStreamCreate(&stream) == cudaSuccess);
  cuda::context c(stream);
  device_array<bf16> const k(rows * 128), v(rows * 128);
  device_array<index_t> const positions(rows);
  device_array<float> const scores(rows);
  run_op(c, op::for_each<fill_row, device_space>{
                static_cast<index_t>(rows),
                {k.data(), v.data(), positions.data(), scores.data(), huge.max_slots, 128}});

  // All lengths but one are full or nearly so.
  std::vector<index_t> lengths;
  for (index_t s = 0; s < huge.n_seq; ++s)
    lengths.insert(lengths.end(), static_cast<std::size_t>(huge.n_kv_heads),
                   s == 1 ? 0 : huge.max_slots - 17 * (s % 7));
  std::vector<float> queries;
  for (index_t s = 0; s < huge.n_seq; ++s)
    for (index_t h = 0; h < huge.n_q_heads; ++h)
      for (index_t d = 0; d < huge.dim_k; ++d) queries.push_back(query_of(s, h, d));
  device_array<index_t> const length(lengths);
  device_array<float> const q(queries), out(product(huge.n_seq, huge.n_q_heads, huge.dim_v));
  slot_state<device_space> slots;
  slots.lengths = row_major<device_space>(length.data(), huge.n_seq, huge.n_kv_heads);
  slots.positions =
      row_major<device_space>(positions.data(), huge.n_seq, huge.n_kv_heads, huge.max_slots);

  op::attend<device_space> a;
  a.batch.n = huge.n_seq;
  a.layer = {contiguous_view<device_space>(k.data(), v.data(), huge), slots};
  a.q = row_major<device_space>(static_cast<float const*>(q.data()), huge.n_seq, huge.n_q_heads,
                                huge.dim_k);
  a.out = row_major<device_space>(out.data(), huge.n_seq, huge.n_q_heads, huge.dim_v);
  run_op(c, a);
  for (auto const& [s, h] : {std::pair<index_t, index_t>{0, 0}, {1, 5}, {63, 31}}) {
    INFO("sequence " << s << " head " << h);
    index_t const n = lengths[static_cast<std::size_t>(s * huge.n_kv_heads)];
    auto const got =
        out.read((product(s, huge.n_q_heads) + static_cast<std::size_t>(h)) * 128, 128);
    auto const expected = n > 0 ? attention(s, h, n) : std::vector<double>(128);
    for (std::size_t d = 0; d < 128; ++d) REQUIRE(std::abs(got[d] - expected[d]) <= 2e-4);
  }

  device_array<index_t> const plan(rows), count(product(huge.n_seq, huge.n_kv_heads)),
      wanted(std::vector<index_t>(product(huge.n_seq, huge.n_kv_heads), kept));
  op::select_k<device_space> o;
  o.batch.n = huge.n_seq;
  o.slots = slots;
  o.scores = row_major<device_space>(static_cast<float const*>(scores.data()), huge.n_seq,
                                     huge.n_kv_heads, huge.max_slots);
  o.k = row_major<device_space>(static_cast<index_t const*>(wanted.data()), huge.n_seq,
                                huge.n_kv_heads);
  o.out = {row_major<device_space>(plan.data(), huge.n_seq, huge.n_kv_heads, huge.max_slots),
           row_major<device_space>(count.data(), huge.n_seq, huge.n_kv_heads)};
  run_op(c, o);
  for (index_t const head : {index_t{0}, huge.n_seq * huge.n_kv_heads - 1}) {
    INFO("head " << head);
    std::size_t const first = product(head, huge.max_slots);
    index_t const n = lengths[static_cast<std::size_t>(head)];
    std::vector<index_t> best;
    for (index_t t = 0; t < n; ++t) best.push_back(t);
    std::stable_sort(best.begin(), best.end(), [&](index_t x, index_t y) {
      return score_of(static_cast<offset_t>(first) + x) >
             score_of(static_cast<offset_t>(first) + y);
    });
    best.resize(kept);
    std::sort(best.begin(), best.end());
    REQUIRE(count.read(static_cast<std::size_t>(head), 1)[0] == kept);
    REQUIRE(plan.read(first, kept) == best);
  }
  cudaStreamDestroy(stream);
}
