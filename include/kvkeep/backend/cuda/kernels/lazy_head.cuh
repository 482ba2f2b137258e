// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// One KV head of MorphKV's lazy evaluation, by one block: its state, its rows, its bounds' factors.
#pragma once

#include "features.cuh"
#include "guard.cuh"
#include "lazy_codes.cuh"

namespace kvkeep::cuda {

inline constexpr int lazy_threads = 512;  ///< of a block, at most

/// The state of one sequence and KV head. Rows are numbered i = g * padded + position % n_rows.
class lazy_head {
 public:
  __device__ lazy_head(lazy_shape const& shape, float* base) : shape_(shape), base_(base) {}

  __device__ lazy_shape const& shape() const { return shape_; }
  __device__ index_t row(index_t g, index_t position) const {
    return g * shape_.padded_rows() + position % shape_.n_rows;
  }
  /// Sum over the old slots of exp(z - maximum(i)). Doubles lie on words' boundaries.
  __device__ double sum(index_t i) const {
    float const* const at = base_ + 2 * static_cast<offset_t>(i);
    return bit_copy<double>(make_uint2(__float_as_uint(at[0]), __float_as_uint(at[1])));
  }
  __device__ void set_sum(index_t i, double x) const {
    uint2 const words = bit_copy<uint2>(x);
    float* const at = base_ + 2 * static_cast<offset_t>(i);
    at[0] = __uint_as_float(words.x);
    at[1] = __uint_as_float(words.y);
  }
  __device__ float& peak(index_t i) const { return at(2, i); }     ///< largest sum so far
  __device__ float& maximum(index_t i) const { return at(3, i); }  ///< of its logits
  __device__ float& inverse(index_t i) const { return at(4, i); }  ///< 1 / Zref
  /// Weights of all rows at the column of this position, one of the W newest.
  __device__ float* column(index_t position) const { return &at(5 + position % shape_.window, 0); }

  /// The newest token that has entered, the old slots counted then (less a victim), and for how many
  /// steps the direct form decides.
  __device__ index_t newest() const { return number(0) - 1; }
  __device__ index_t old() const { return number(1); }
  __device__ index_t rest() const { return number(2); }
  __device__ void set_newest(index_t position) const { set_number(0, position + 1); }
  __device__ void set_old(index_t n) const { set_number(1, n); }
  __device__ void set_rest(index_t n) const { set_number(2, n); }

 private:
  __device__ float& at(index_t list, index_t i) const {
    return base_[static_cast<offset_t>(list) * shape_.all_rows() + i];
  }
  __device__ float& word(int i) const { return (&at(5 + shape_.window, 0))[i]; }
  __device__ index_t number(int i) const { return __float_as_int(word(i)); }
  __device__ void set_number(int i, index_t n) const { word(i) = __int_as_float(n); }

  lazy_shape shape_;
  float* base_;
};

/// One head's slots and rows at one step.
struct lazy_job {
  lazy_head head;
  plane_ref<device_space> const& plane;
  index_t seq, id, h, place;
  index_t const* positions;  ///< [n]
  index_t n;                 ///< slots in use
  index_t newest;            ///< position of the newest token
  index_t first;             ///< position of the oldest row there is
  logit_form form;
  tensor_ref<float const, 4, device_space> const& ring_q;

  template <class Op>
  __device__ lazy_job(Op const& o, block_head const& at)
      : head(o.state.shape, o.state.head.at(o.batch.id_of(at.entry), at.head, 0)),
        plane(o.layer.kv.k),
        seq(o.batch.row_of(at.entry)),
        id(o.batch.id_of(at.entry)),
        h(at.head),
        place(at.place),
        positions(o.layer.slots.positions.at(id, h, 0)),
        n(o.layer.slots.lengths(id, h)),
        newest(o.state.seen[id] - 1),
        first(max(max(0, o.state.from[id]), newest - o.state.shape.n_rows + 1)),
        form{o.layer.kv.scale, o.layer.kv.softcap},
        ring_q(o.state.ring_q) {}

  __device__ head_rows keys() const { return head_rows(plane, seq, h); }
  __device__ index_t oldest_recent() const { return newest - head.shape().window + 1; }
  __device__ open_range old() const { return {0, max(0, oldest_recent())}; }
  __device__ open_range recent() const { return {max(0, oldest_recent()), newest + 1}; }
  /// f(i, g, position, at) for all rows up to position `last`, shared by the threads; `at` counts them, head
  /// after head, positions ascending.
  template <class F>
  __device__ void each_row(index_t last, F const& f) const {
    index_t const count = last - first + 1;
    for (index_t at = thread_of_block(); at < head.shape().group * count;
         at += threads_of_block()) {
      index_t const g = at / count, position = first + (at - g * count);
      f(head.row(g, position), g, position, at);
    }
  }
  __device__ float const* query(index_t g, index_t position) const {
    return ring_q.at(id, h * head.shape().group + g, position % ring_q.extent[2], 0);
  }
  /// Steps since the slot's bounds were prepared.
  __device__ index_t phase_of(index_t slot) const {
    return (newest + slot / lazy_shape::tile) % lazy_shape::ahead;
  }
};

/// Slots that a thread has found old, or among the newest.
struct age_counts {
  index_t old = 0, recent = 0;

  __device__ void look(lazy_job const& job, index_t position) {
    old += job.old().has(position) ? 1 : 0;
    recent += job.recent().has(position) ? 1 : 0;
  }
  /// Number of old slots, or -1 where the newest tokens are not all there: then positions do not tell which
  /// slots are old, and the lazy evaluation does not apply. @param box [2 * warp_size] shared
  __device__ index_t n_old(lazy_job const& job, int* box) const {
    __syncthreads();  // the box may still be read
    leave_for_block(old, box, add{});
    leave_for_block(recent, box + warp_size, add{});
    __syncthreads();
    index_t const n_recent = take_of_block(box + warp_size, add{});
    index_t const n = take_of_block(box, add{});
    return n_recent == min(job.head.shape().window, job.newest + 1) ? n : -1;
  }
};

/// e^x, finite for every x.
__device__ inline float finite_weight(float x) { return weight_of(min(x, 88.37f)); }

/// Weights of query rows over all slots, and where they are made.
struct row_weights_box {
  static constexpr int at_once = 4;  ///< query heads
  float4* queries;                   ///< [dim_k] shared, of the query heads at hand
  float* box;                        ///< [at_once + 1][warps] shared
  float* maximum;                    ///< [group] shared: what the logits were reduced by
  float* e;                          ///< [group][stride] device
  offset_t stride;

  __device__ row_weights_box(shared_pieces& s, index_t dim, index_t group, float* weights,
                             offset_t slots, index_t place)
      : queries(s.take<float4>(dim)),
        box(s.take<float>((at_once + 1) * warp_size)),
        maximum(s.take<float>(group)),
        e(weights + static_cast<offset_t>(place) * group * slots),
        stride(slots) {}
  static std::size_t bytes(index_t dim, index_t group) {
    return shared_pieces::bytes<float4>(dim) +
           shared_pieces::bytes<float>((at_once + 1) * warp_size) +
           shared_pieces::bytes<float>(group);
  }
};

/// exp(z - maximum) of query row `position`, with the largest logit of the old slots as the maximum: then
/// their sum is at least 1, however far the window's logits are above. A thread per slot.
__device__ inline void weigh_row(lazy_job const& job, index_t position, open_range const& old,
                                 row_weights_box const& w) {
  constexpr int at_once = row_weights_box::at_once;
  index_t const group = job.head.shape().group;
  head_rows const keys = job.keys();
  for (index_t first = 0; first < group; first += at_once) {
    auto const value = [&](index_t g, index_t d) {
      return first + g < group ? job.query(first + g, position)[d] : 0.0f;
    };
    __syncthreads();
    for (index_t d = thread_of_block(); d < job.plane.dim; d += threads_of_block())
      w.queries[d] = make_float4(value(0, d), value(1, d), value(2, d), value(3, d));
    __syncthreads();
    float top[at_once] = {-largest_float, -largest_float, -largest_float, -largest_float};
    for (index_t j = thread_of_block(); j < job.n; j += threads_of_block()) {
      float4 dot = make_float4(0, 0, 0, 0);
      for_features(job.plane, keys.bytes(j), 0, 1, [&](index_t d, float x) {
        float4 const q = w.queries[d];
        dot = make_float4(__fmaf_rn(x, q.x, dot.x), __fmaf_rn(x, q.y, dot.y),
                          __fmaf_rn(x, q.z, dot.z), __fmaf_rn(x, q.w, dot.w));
      });
      bool const counts = old.has(job.positions[j]);
      float const dots[at_once] = {dot.x, dot.y, dot.z, dot.w};
      float* e = w.e + first * w.stride + j;
      unrolled<at_once>([&](int i) {
        if (first + i >= group) return;
        float const z = job.form(dots[i]);
        *e = z;
        e += w.stride;
        if (counts) top[i] = max(top[i], z);
      });
    }
    __syncthreads();
    unrolled<at_once>([&](int i) { leave_for_block(top[i], w.box + i * warp_size, larger{}); });
    __syncthreads();
    KVKEEP_UNROLL(1) for (index_t i = 0; i < min(at_once, group - first); ++i) {
      float* const e = w.e + (first + i) * w.stride;
      float maximum = take_of_block(w.box + i * warp_size, larger{});
      if (maximum == -largest_float) {  // nothing is old
        float all = -largest_float;
        for (index_t j = thread_of_block(); j < job.n; j += threads_of_block())
          all = max(all, e[j]);
        maximum = block_reduce(all, w.box + at_once * warp_size, larger{});
      }
      for (index_t j = thread_of_block(); j < job.n; j += threads_of_block())
        e[j] = finite_weight(e[j] - maximum);
      if (thread_of_block() == 0) w.maximum[first + i] = maximum;
    }
  }
  __syncthreads();
}

/// factors[row][k] = min over g of Zref / (an upper bound of Z in k < Steps steps): columns that enter
/// until then are known, evictions only lower Z. 0 for rows that are absent or will be gone.
/// With `enters` the column that has just become old first joins the sums of the rows before the newest.
/// Lanes take steps, from the last warp on: other warps have other work.
/// @param factors [padded][Steps], shared: there is a barrier before they are read
template <int Steps>
__device__ void bound_factors(lazy_job const& job, bool enters, float* factors) {
  constexpr int at_once = 4;
  lazy_head const& head = job.head;
  lazy_shape const& s = head.shape();
  index_t const padded = s.padded_rows(), newest_row = job.newest % s.n_rows;
  int const thread = (warps_of_block() - 1 - warp_of_block()) * warp_size + lane_of_warp();
  int const k = thread % Steps;
  index_t const coming = job.newest + k - s.window;
  float const* const column = coming >= 0 ? head.column(coming) : nullptr;
  float const* const entered =
      job.newest >= s.window ? head.column(job.newest - s.window) : nullptr;
  for (index_t r = thread / Steps; r < padded; r += threads_of_block() / Steps) {
    index_t const age = r > newest_row ? newest_row - r + s.n_rows : newest_row - r;
    bool const there = r < s.n_rows && job.newest - age >= job.first;
    bool const older = enters && there && age > 0 && entered != nullptr;
    float most = 1e-30f;
    for (index_t first = 0; first < s.group; first += at_once) {
      double sum[at_once];
      float inverse[at_once], next[at_once], entering[at_once], peak[at_once];
      unrolled<at_once>([&](int i) {
        index_t const row = min(first + i, s.group - 1) * padded + r;
        sum[i] = head.sum(row);
        inverse[i] = head.inverse(row);
        next[i] = k > 0 && column != nullptr ? column[row] : 0.0f;
        entering[i] = older ? entered[row] : 0.0f;
        peak[i] = older && k == 0 ? head.peak(row) : 0.0f;
      });
      if constexpr (Steps > 1) __syncwarp();  // all lanes of a row have read its sum
      unrolled<at_once>([&](int i) {
        sum[i] += static_cast<double>(entering[i]);
        if (older && k == 0 && first + i < s.group) {
          index_t const row = (first + i) * padded + r;
          head.set_sum(row, sum[i]);
          head.peak(row) = max(peak[i], static_cast<float>(sum[i]));
        }
        float more = __fmul_rn(next[i], inverse[i]);
        for (int step = 1; step < Steps; step *= 2) {
          float const below = __shfl_up_sync(all_lanes, more, static_cast<unsigned>(step));
          if (k >= step) more = __fadd_rn(more, below);
        }
        most = max(most, __fmaf_rn(static_cast<float>(sum[i]), inverse[i], more));
      });
    }
    bool const lives = there && age <= s.n_rows - 1 - k;
    factors[r * Steps + k] = lives ? __fdiv_rn(1.0f - bound_slack / 2, most) : 0.0f;
  }
}

/// Codes and prepared bounds of one head. @param factors shared
__device__ inline bound_source bounds_of(lazy_job const& job,
                                         tensor_ref<float, 4, device_space> const& rows,
                                         float const* factors) {
  lazy_shape const& s = job.head.shape();
  bound_source r;
  r.codes = {rows.at(job.id, job.h, 0, 0), rows.stride[2]};
  r.bounds = {rows.at(job.id, job.h, s.code_words(), 0), rows.stride[2]};
  r.factors = factors;
  r.n_rows = s.n_rows;
  r.n_present = job.newest - job.first + 1;
  r.first = job.newest % s.n_rows;
  return r;
}

}  // namespace kvkeep::cuda
