// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// Scoring by query rows in fp32 on any rows: every slot's sum has one order, and nothing is shared between blocks.
#pragma once

#include "plain_tile.cuh"

namespace kvkeep::cuda {

/// A slice's share of the normalisers of 32 queries. Grid: heads, slices by tiles of queries.
struct plain_slices_kernel : plain_kernel {
  window_job job;

  __device__ void operator()() const {
    shared_pieces shared;
    plain_tile const tile(shared);
    window_head const h(job);
    index_t const tiles = static_cast<index_t>(ceil_div(job.n_queries(), plain_queries));
    index_t const slice = static_cast<index_t>(blockIdx.y) / tiles;
    index_t const first = static_cast<index_t>(blockIdx.y) % tiles * plain_queries;
    index_t const count = min(plain_queries, job.n_queries() - first);
    index_t const begin = slice * job.slice_slots, end = min(h.n, begin + job.slice_slots);
    if (begin >= h.n) return;
    int const query = thread_of_block() / 4, part = thread_of_block() % 4;
    float const* const z = tile.z + query * plain_tile::slot_stride + part;
    tile.take_queries(h, first, count, false);
    row_sum own;
    for (index_t j = begin; j < end; j += plain_slots) {
      tile.take_slots(h, j);
      tile.fill(h, j, first, [&](index_t i, index_t s, float x) {
        return tile.positions[s] <= tile.limits[i] ? x : __uint_as_float(0xff800000u);
      });
      __syncthreads();
      float top = own.top;
      for (int s = 0; s < plain_slots; s += 4) top = max(top, z[s]);
      own.sum = __fmul_rn(own.sum, exp2f(own.top - top));
      own.top = top;
      for (int s = 0; s < plain_slots; s += 4) own.sum = __fadd_rn(own.sum, exp2f(z[s] - top));
    }
    for (int step = 1; step < 4; step *= 2)
      own = join(own, {__shfl_xor_sync(all_lanes, own.top, step),
                       __shfl_xor_sync(all_lanes, own.sum, step)});
    if (part == 0 && query < count) h.slice(slice)[first + query] = own;
  }
};

/// Adds to 64 slots what they receive from all rows. Grid: heads, strips of slots.
struct plain_sums_kernel : plain_kernel {
  window_job job;
  tensor_ref<float, 4, device_space> out;
  bool out_by_id, per_query_head, clear;

  __device__ void operator()() const {
    shared_pieces shared;
    plain_tile const tile(shared);
    window_head const h(job);
    index_t const first_slot = static_cast<index_t>(blockIdx.y) * plain_slots;
    if (first_slot >= h.n) return;
    float* const own = out.at(out_by_id ? h.id : h.at.entry, h.at.head, 0, first_slot);
    index_t const chains = per_query_head ? h.group : 1, n_slots = h.n - first_slot;
    if (clear)
      each_chain(chains, n_slots, [&](index_t c, index_t s) { own[c * out.stride[2] + s] = 0; });
    each_weights(tile, h, first_slot, [&](index_t first, index_t count) {
      each_chain(chains, n_slots, [&](index_t c, index_t s) {
        float sum = own[c * out.stride[2] + s];
        for (index_t i = (c - first % chains + chains) % chains; i < count; i += chains)
          sum = __fadd_rn(sum, tile.z[i * plain_tile::slot_stride + s]);
        own[c * out.stride[2] + s] = sum;
      });
    });
  }
};

/// Moments of what 64 slots receive from all rows. Grid: heads, strips of slots.
struct plain_moments_kernel : plain_kernel {
  window_job job;
  tensor_ref<float, 4, device_space> out;
  float least_weight;  ///< under the logarithm
  bool clear;

  __device__ void operator()() const {
    shared_pieces shared;
    plain_tile const tile(shared);
    window_head const h(job);
    index_t const first_slot = static_cast<index_t>(blockIdx.y) * plain_slots;
    if (first_slot >= h.n) return;
    float* const own = out.at(h.at.entry, h.at.head, 0, first_slot);
    index_t const n_slots = h.n - first_slot, absent = absent_rows(h, tile.box);
    if (clear)
      each_chain(op::column_moments<device_space>::moments * h.group, n_slots,
                 [&](index_t row, index_t s) { own[row * out.stride[2] + s] = 0; });
    each_weights(tile, h, first_slot, [&](index_t first, index_t count) {
      each_chain(h.group, n_slots, [&](index_t g, index_t s) {
        float* const to = own + g * out.stride[2] + s;
        offset_t const next = h.group * out.stride[2];
        float mean = to[0], spread = to[next], entropy = to[2 * next];
        for (index_t i = (g - first % h.group + h.group) % h.group; i < count; i += h.group) {
          if (tile.limits[i] == no_position) continue;
          float const p = tile.z[i * plain_tile::slot_stride + s], off = __fadd_rn(p, -mean);
          index_t const number = job.first_row + (first + i) / h.group - absent + 1;
          mean = __fadd_rn(mean, __fdiv_rn(off, static_cast<float>(number)));
          spread = __fmaf_rn(off, __fadd_rn(p, -mean), spread);
          entropy = __fmaf_rn(p, -logf(max(p, least_weight)), entropy);
        }
        to[0] = mean;
        to[next] = spread;
        to[2 * next] = entropy;
      });
    });
  }

 private:
  /// Rows of the op before the first one that is present, in every thread.
  __device__ index_t absent_rows(window_head const& h, int* box) const {
    index_t const n = job.first_row + job.n_rows;
    index_t first = n;
    for (index_t r = thread_of_block(); r < n; r += threads_of_block())
      if (h.position(r - job.first_row) >= 0) first = min(first, r);
    return block_reduce(first, box, smaller{});
  }
};

/// MorphKV's direct scores of 64 slots. Grid: heads, strips of slots.
struct plain_fuse_kernel : plain_kernel {
  window_job job;
  row_fusion fold;
  tensor_ref<float, 3, device_space> out, out_heads;

  __device__ void operator()() const {
    shared_pieces shared;
    plain_tile const tile(shared);
    window_head const h(job);
    index_t const first_slot = static_cast<index_t>(blockIdx.y) * plain_slots;
    if (first_slot >= h.n) return;
    index_t const last_old = job.limit[blockIdx.x], n_slots = h.n - first_slot;
    index_t const chains = out_heads.data != nullptr ? h.group : 0, slot = thread_of_block();
    float* const heads = out_heads.at(h.at.entry, h.at.head * h.group, first_slot);
    each_chain(chains, n_slots,
               [&](index_t c, index_t s) { heads[c * out_heads.stride[1] + s] = 0; });
    bool const any_row = row_fusion::any_row(h);
    float score = 0, top = 0;
    each_weights(tile, h, first_slot, [&](index_t first, index_t count) {
      for (index_t i = 0; slot < plain_slots && i < count; ++i) {
        top = max(top, tile.z[i * plain_tile::slot_stride + slot]);
        if ((first + i) % h.group != h.group - 1) continue;
        score = fold(score, top);
        top = 0;
      }
      each_chain(chains, n_slots, [&](index_t c, index_t s) {
        float& own = heads[c * out_heads.stride[1] + s];
        for (index_t i = (c - first % chains + chains) % chains; i < count; i += chains)
          own = fold(own, tile.z[i * plain_tile::slot_stride + s]);
      });
    });
    if (slot < min(plain_slots, n_slots))
      out(h.at.entry, h.at.head, first_slot + slot) =
          row_fusion::ranked(tile.positions[slot], last_old, any_row, score);
    each_chain(chains, n_slots, [&](index_t c, index_t s) {
      float& own = heads[c * out_heads.stride[1] + s];
      own = row_fusion::ranked(tile.positions[s], last_old, any_row, own);
    });
  }
};

}  // namespace kvkeep::cuda
