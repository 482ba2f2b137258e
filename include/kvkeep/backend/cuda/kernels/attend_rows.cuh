// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// The fast path of decode attention: contiguous, aligned rows of one type with 64, 128 or 256 features.
/// K and V stream through registers in pieces of 16 bytes (FP8: 8). A row's lanes have 8 features each, and with
/// them those of all query heads of the tile, so that each piece is loaded once for all of them. While rows are
/// multiplied the next ones are on their way: registers for those rather than for more blocks.
#pragma once

#include <kvkeep/backend/cuda/kernels/ptx.cuh>

#include "attend_split.cuh"

namespace kvkeep::cuda {

/// The numbers of a piece.
__device__ inline void unpack(uint4 const& w, float (&x)[4], float) {
  x[0] = __uint_as_float(w.x), x[1] = __uint_as_float(w.y);
  x[2] = __uint_as_float(w.z), x[3] = __uint_as_float(w.w);
}
__device__ inline void unpack(uint4 const& w, float (&x)[8], bf16) {
  unsigned const words[] = {w.x, w.y, w.z, w.w};
  for (int i = 0; i < 4; ++i) {
    x[2 * i] = __uint_as_float(words[i] << 16);
    x[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
  }
}
__device__ inline void unpack(uint4 const& w, float (&x)[8], fp16) {
  unsigned const words[] = {w.x, w.y, w.z, w.w};
  for (int i = 0; i < 4; ++i) {
    x[2 * i] = fast_float(fp16{static_cast<std::uint16_t>(words[i] & 0xffffu)});
    x[2 * i + 1] = fast_float(fp16{static_cast<std::uint16_t>(words[i] >> 16)});
  }
}
__device__ inline void unpack(uint2 const& w, float (&x)[8], fp8_e4m3) {
  float low[4], high[4];
  floats_of_e4m3(w.x, low);
  floats_of_e4m3(w.y, high);
  for (int i = 0; i < 4; ++i) x[i] = low[i], x[4 + i] = high[i];
}
__device__ inline void read_piece(void const* from, uint4& to) { to = read_16(from); }
__device__ inline void read_piece(void const* from, uint2& to) { to = read_8(from); }

/// @tparam D features of a row  @tparam G query heads of a tile
template <class T, int D, int G>
struct row_path {
  using piece_type = std::conditional_t<sizeof(T) == 1, uint2, uint4>;
  static constexpr int mine = 8;                                    ///< features of a lane
  static constexpr int lanes = D / mine;                            ///< of a row
  static constexpr int each = int{sizeof(piece_type) / sizeof(T)};  ///< features of a piece
  static constexpr int pieces = mine / each;                        ///< of a lane and row
  static constexpr int batch = 8 / pieces;                          ///< rows in flight per lane
  static constexpr int groups = split_threads / lanes;              ///< rows of a block at a time
  static constexpr index_t step = batch * groups;
  static constexpr int warps = split_threads / warp_size;
  static constexpr index_t sums_floats = warps * G * D;
  static_assert(lanes == row_lanes(D));

  /// Feature of this lane's number `i`.
  __device__ static int feature_of(int i) {
    return (i / each * lanes + lane_of_warp() % lanes) * each + i % each;
  }
  /// Rows of `N` slots, `groups` apart, on their way.
  template <int N>
  struct rows {
    piece_type piece[N][pieces];

    /// @param at  addresses of the split's rows  @param last  slot that stands for those behind it
    __device__ void load(std::byte const* const* at, index_t slot, index_t last) {
      for (int s = 0; s < N; ++s) {
        auto const* const row =
            reinterpret_cast<piece_type const*>(at[min(slot + s * groups, last)]);
        for (int p = 0; p < pieces; ++p)
          read_piece(row + p * lanes + lane_of_warp() % lanes, piece[s][p]);
      }
    }
  };
  /// The rows at hand and those after them. Whoever has used one loads what comes two batches later.
  struct row_pair {
    rows<batch> now, next;

    __device__ void load(std::byte const* const* at, index_t slot, index_t last) {
      now.load(at, slot, last);
      if (slot + step <= last) next.load(at, slot + step, last);
    }
  };

  /// This lane's features of the tile's query rows.
  template <class Q>
  __device__ static void load_queries(attend_task const& t, split_place const& at,
                                      float (&q)[G][mine]) {
    constexpr int width = 16 / int{sizeof(Q)}, at_once = each % width == 0 ? width : 1;
    Q const* const row =
        static_cast<Q const*>(t.q.data) + t.query_at(at.entry, at.q_head(t), at.row);
    bool const aligned = at_once == width && t.q.head_stride % width == 0 &&
                         reinterpret_cast<std::uintptr_t>(row) % 16 == 0;
    for (int g = 0; g < G; ++g)
      for (int i = 0; i < mine; i += at_once) {
        Q const* const from = row + g * t.q.head_stride + feature_of(i);
        float x[width] = {};
        if (g < at.count && aligned)
          unpack(read_16(from), x, Q{});
        else if (g < at.count)
          for (int k = 0; k < at_once; ++k) x[k] = to_float(from[k]);
        for (int k = 0; k < at_once; ++k) q[g][i + k] = x[k];
      }
  }

  __device__ static void dot_products(attend_task const& t, split_place const& at,
                                      split_box const& box) {
    int const group = thread_of_block() / lanes;
    row_pair keys;  // they come from farther than the queries
    keys.load(box.keys, group, at.n - 1);
    float q[G][mine];
    switch (t.q.type) {
      case dtype::f16:
        load_queries<fp16>(t, at, q);
        break;
      case dtype::bf16:
        load_queries<bf16>(t, at, q);
        break;
      default:
        load_queries<float>(t, at, q);
    }
    auto const multiply = [&](rows<batch>& some, index_t slot) {
      float x[batch * G] = {};
      for (int s = 0; s < batch; ++s)
        for (int p = 0; p < pieces; ++p) {
          float part[each];
          unpack(some.piece[s][p], part, T{});
          for (int g = 0; g < G; ++g)
            for (int e = 0; e < each; ++e)
              x[s * G + g] = __fmaf_rn(q[g][p * each + e], part[e], x[s * G + g]);
        }
      if (slot + 2 * step < at.n) some.load(box.keys, slot + 2 * step, at.n - 1);
      share_sums<lanes / 2, 1, batch * G>(x);
      put(x, slot, at, box.z);
    };
    for (index_t base = 0; base < at.n; base += 2 * step) {
      multiply(keys.now, base + group);
      if (base + step < at.n) multiply(keys.next, base + step + group);
    }
  }

  /// Query heads that the tile lacks have logits of 0, which go nowhere.
  static __device__ void put(float const (&x)[batch * G], index_t slot, split_place const& at,
                             float* z) {
    constexpr int shares = batch * G < lanes ? lanes / (batch * G) : 1;  // lanes of a number
    constexpr int kept = batch * G < lanes ? 1 : batch * G / lanes;      // numbers of a lane
    int const lane = lane_of_warp() % lanes;
    for (int i = 0; i < kept; ++i) {
      int const number = lane / shares * kept + i, g = number % G;
      index_t const j = slot + number / G * groups;
      if (lane % shares == 0 && j < at.n) z[g * split_slots + j] = x[i];
    }
  }

  /// acc += weights * values.
  template <int N>
  __device__ static void add_rows(rows<N> const& values, split_box const& box, index_t slot,
                                  float (&acc)[G * mine]) {
    for (int s = 0; s < N; ++s) {
      float e[G];
      for (int g = 0; g < G; ++g) e[g] = box.z[g * split_slots + slot + s * groups];
      for (int p = 0; p < pieces; ++p) {
        float part[each];
        unpack(values.piece[s][p], part, T{});
        for (int g = 0; g < G; ++g)
          for (int i = 0; i < each; ++i)
            acc[g * mine + p * each + i] = __fmaf_rn(e[g], part[i], acc[g * mine + p * each + i]);
      }
    }
  }

  /// The first values come while logits become weights.
  struct first_rows : row_pair {
    __device__ first_rows(split_place const& at, split_box const& box, bool wanted) {
      if (wanted) this->load(box.values, thread_of_block() / lanes, at.n - 1);
    }
  };

  __device__ static void add_values(attend_task const& t, split_place const& at,
                                    split_box const& box, first_rows& ahead) {
    float acc[G * mine] = {};
    index_t slot = thread_of_block() / lanes;
    auto const whole = [&] { return slot + (batch - 1) * groups < at.n; };
    auto const add = [&](rows<batch>& values) {
      add_rows(values, box, slot, acc);
      if (slot + 2 * step < at.n) values.load(box.values, slot + 2 * step, at.n - 1);
      slot += step;
    };
    while (whole()) {
      add(ahead.now);
      if (whole()) add(ahead.next);
    }
    for (; slot < at.n; slot += groups) {
      rows<1> one;
      one.load(box.values, slot, at.n - 1);
      add_rows(one, box, slot, acc);
    }
    __syncwarp();
    share_sums<warp_size / 2, lanes, G * mine>(acc);

    constexpr int kept = G * mine * lanes / warp_size;
    float* const sums = box.sums + warp_of_block() * G * D;
    // One by one they would all go to few banks: lanes are whole pieces apart.
    constexpr int wide = kept % 4 == 0 ? 4 : 1;
    static_assert(each % wide == 0);
    for (int i = 0; i < kept; i += wide) {
      int const number = lane_of_warp() / lanes * kept + i;
      float* const to = sums + number / mine * D + feature_of(number % mine);
      if constexpr (wide == 4)
        *reinterpret_cast<float4*>(to) = make_float4(acc[i], acc[i + 1], acc[i + 2], acc[i + 3]);
      else
        *to = acc[i];
    }
    __syncthreads();
    for (index_t i = thread_of_block(); i < at.count * D; i += split_threads) {
      float sum = box.sums[i];
      for (int w = 1; w < warps; ++w) sum += box.sums[w * G * D + i];
      t.values[at.piece(t, i / D) * D + i % D] = sum;
    }
  }
};

template <class T, int D, int G>
struct attend_rows_kernel {
  using path = row_path<T, D, G>;
  static constexpr int most_threads = split_threads, blocks_per_sm = G <= 4 ? 3 : 2;
  attend_task t;

  __device__ void operator()() const { attend_split<path>(t, rows_taken::aligned); }
  std::size_t shared_bytes() const { return split_bytes(t, path::sums_floats); }
};

}  // namespace kvkeep::cuda
