// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// Key and value rows of one head on the device: here layouts end.
#pragma once

#include "../../../view/kv_ref.hpp"
#include "block.cuh"

namespace kvkeep::cuda {

/// Rows of one sequence and KV head of a plane. `bytes(slot)` is the address of a slot's feature 0.
/// Strided and ragged heads are a base and a stride; pages add a table.
class head_rows {
 public:
  __device__ head_rows(plane_ref<device_space> const& p, index_t seq, index_t head)
      : size_(dtype_bytes(p.type)) {
    any_layout const& l = p.layout;
    if (l.kind == layout_kind::paged) {
      paged_layout const& pages = l.paged;
      table_ = pages.table + seq * pages.table_seq_stride + head * pages.table_head_stride;
      block_size_ = pages.block_size;
      block_stride_ = pages.block_stride * size_;
      slot_stride_ = pages.slot_stride * size_;
      base_ = p.data + head * pages.head_stride * size_;
      return;
    }
    bool const ragged = l.kind == layout_kind::ragged;
    offset_t const first = ragged ? l.ragged.offset(seq, head, 0) : l.strided.offset(seq, head, 0);
    base_ = p.data + first * size_;
    slot_stride_ = (ragged ? l.ragged.slot_stride : l.strided.slot_stride) * size_;
  }

  __device__ std::byte* bytes(index_t slot) const {
    if (table_ == nullptr) return base_ + slot * slot_stride_;
    index_t const block = slot / block_size_;
    return base_ + table_[block] * block_stride_ + (slot - block * block_size_) * slot_stride_;
  }
  template <class T>
  __device__ T const* row(index_t slot) const {
    return reinterpret_cast<T const*>(bytes(slot));
  }

  /// The largest of 16, 4, 2, 1 that divides every row's address, and `row_bytes`.
  __device__ index_t alignment(index_t row_bytes) const {
    offset_t const all =
        reinterpret_cast<offset_t>(base_) | slot_stride_ | block_stride_ | row_bytes;
    return all % 16 == 0 ? 16 : all % 4 == 0 ? 4 : all % 2 == 0 ? 2 : 1;
  }

 private:
  std::byte* base_ = nullptr;
  index_t const* table_ = nullptr;
  index_t block_size_ = 1;
  index_t size_ = 0;
  offset_t block_stride_ = 0;
  offset_t slot_stride_ = 0;
};

/// Feature d of a row, whatever the element type and the feature map. Precondition: not opaque.
__device__ inline float feature(plane_ref<device_space> const& p, std::byte const* row, index_t d) {
  offset_t const at = p.features(d);
  switch (p.type) {
    case dtype::f16:
      return to_float(reinterpret_cast<fp16 const*>(row)[at]);
    case dtype::bf16:
      return to_float(reinterpret_cast<bf16 const*>(row)[at]);
    case dtype::e4m3:
      return to_float(reinterpret_cast<fp8_e4m3 const*>(row)[at]);
    case dtype::e5m2:
      return to_float(reinterpret_cast<fp8_e5m2 const*>(row)[at]);
    default:
      return reinterpret_cast<float const*>(row)[at];
  }
}

/// NaN becomes -FLT_MAX, infinities the largest finite numbers. By integers: safe under fast-math.
__device__ inline float sanitise(float z) {
  constexpr unsigned infinity = 0x7f800000u;
  unsigned const u = __float_as_uint(z), magnitude = u & 0x7fffffffu;
  if (magnitude > infinity) return -largest_float;
  if (magnitude == infinity) return u >> 31 ? -largest_float : largest_float;
  return z;
}

/// What turns q . k into a logit: z = scale * (q . k), then z = softcap * tanh(z / softcap).
struct logit_form {
  float scale = 1;
  float softcap = 0;  ///< 0: none

  __device__ float operator()(float dot) const {
    float const z = dot * scale;
    if (!(softcap > 0) || (__float_as_uint(z) & 0x7fffffffu) > 0x7f800000u) return sanitise(z);
    return softcap * tanhf(sanitise(z) / softcap);
  }
};

/// e^x with 0 below the range of normal numbers, so that a hidden slot's weight is exactly 0.
__device__ inline float weight_of(float x) { return x < -87.336f ? 0.0f : expf(x); }

}  // namespace kvkeep::cuda
