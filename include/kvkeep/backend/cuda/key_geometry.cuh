// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// CUDA: KeyDiff and LagKV.
#pragma once

#include "kernels/key_diff.cuh"
#include "kernels/lag_score.cuh"
#include "order.cuh"

namespace kvkeep::cuda {

/// KeyDiff. Scratch: an eighth of a byte per slot and feature, 4 per slot.
KVKEEP_CUDA_OP status enqueue(context& c, op::key_diff<device_space> const& o,
                              workspace& ws) noexcept {
  kv_ref<device_space> const& kv = o.layer.kv;
  if (!readable(kv.k)) return status::unsupported;
  if (!slots_contiguous(o.out) || !slots_contiguous(o.layer.slots.positions))
    return status::bad_argument;
  workspace::frame const frame(ws);
  index_t const heads = kv.shape.n_kv_heads, dim = kv.k.dim;
  offset_t const chunks = ceil_div(kv.shape.max_slots, key_diff_part::chunk);
  key_diff_part part{o, take_orders(ws, o.batch, o.layer.slots), static_cast<index_t>(chunks),
                     nullptr, nullptr};
  part.partial = ws.take<double>(product(o.batch.n, heads, chunks, dim));
  part.mean = ws.take<float>(product(o.batch.n, heads, dim + 1));
  if (!ws.ok()) return status::workspace_too_small;
  context const on = launching(c, ws);
  auto const in_turn = [&](offset_t parts, int threads) {
    offset_t const all = static_cast<offset_t>(o.batch.n) * heads;
    return head_grid(o.batch.n, heads, parts_in_turn(all, parts, c.n_sm), threads);
  };
  KVKEEP_TRY(find_orders(on, o.batch, o.layer.slots, part.orders));
  KVKEEP_TRY(launch(on, in_turn(chunks, key_sum_kernel::most_threads),
                    shared_pieces::bytes<float>(key_diff_part::chunk) +
                        shared_pieces::bytes<std::byte const*>(key_diff_part::chunk),
                    key_sum_kernel{part}));
  KVKEEP_TRY(launch(on, head_grid(o.batch.n, heads, 1, key_mean_kernel::most_threads),
                    shared_pieces::bytes<double>(key_diff_part::strands * dim) +
                        shared_pieces::bytes<double>(warp_size),
                    key_mean_kernel{part}));
  offset_t const strips = ceil_div(kv.shape.max_slots, key_cosine_kernel::slots_per_block);
  return launch(on, in_turn(strips, key_cosine_kernel::most_threads), 0, key_cosine_kernel{part});
}

/// LagKV. Scratch: 12 bytes per slot.
KVKEEP_CUDA_OP status enqueue(context& c, op::lag_score<device_space> const& o,
                              workspace& ws) noexcept {
  kv_ref<device_space> const& kv = o.layer.kv;
  if (!readable(kv.k) || !readable(kv.v)) return status::unsupported;
  if (!slots_contiguous(o.out) || !slots_contiguous(o.layer.slots.positions) || o.lag < 1 ||
      o.sinks < 0)
    return status::bad_argument;
  workspace::frame const frame(ws);
  index_t const heads = kv.shape.n_kv_heads;
  lag_kernel kernel{o, take_orders(ws, o.batch, o.layer.slots), std::max(kv.k.dim, kv.v.dim),
                    nullptr, nullptr};
  std::size_t const ranks = product(o.batch.n, heads, kernel.orders.n_slots);
  kernel.keys = ws.take<float>(ranks);
  kernel.values = ws.take<float>(ranks);
  if (!ws.ok()) return status::workspace_too_small;
  context const on = launching(c, ws);
  KVKEEP_TRY(find_orders(on, o.batch, o.layer.slots, kernel.orders));
  offset_t const parts = std::clamp<offset_t>(kv.shape.max_slots / o.lag, 1, 65535);
  offset_t const work = static_cast<offset_t>(o.lag) * kernel.most_dim / 8;
  return launch(
      on, head_grid(o.batch.n, heads, parts, std::min(threads_for(work), lag_kernel::most_threads)),
      lag_kernel::bytes(kernel.most_dim), kernel);
}

}  // namespace kvkeep::cuda
