// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// Key and value rows of one head as pointers: here layouts end, and kernels see element types
/// only.
#pragma once

#include "context.hpp"
#include "kernels/decode.hpp"

namespace kvkeep::cpu {
inline namespace KVKEEP_CPU_ISA {

using plane = plane_ref<host_space>;

inline constexpr index_t row_chunk = 32;  ///< rows handed over at once
static_assert(row_chunk == row_block, "value sums run in the blocks of the kernels");

/// Element types that kernels read where they lie.
template <class T>
inline constexpr bool in_place = sizeof(T) > 1;
/// Whether they do so with a plane's rows; others are first gathered as floats.
inline bool direct(plane const& p) noexcept { return dtype_bytes(p.type) > 1 && p.contiguous(); }
/// Opaque rows need a reader before anybody can look into them.
inline bool readable(plane const& p) noexcept {
  return p.type != dtype::opaque || p.reader.read != nullptr;
}
/// Floats of scratch for gathered rows of a plane.
inline std::size_t gather_floats(plane const& p) noexcept {
  return direct(p) ? 0 : size_of(row_chunk) * size_of(p.dim);
}

/// Rows of one sequence and KV head.
struct head_rows {
  plane const* p = nullptr;
  index_t seq = 0;
  index_t head = 0;
};

/// Addresses of slots [first, first + n). @param out [n]
template <class T>
void row_pointers(head_rows const& h, index_t first, index_t n, T const** out) noexcept {
  T const* const data = reinterpret_cast<T const*>(h.p->data);
  auto const line = [&](offset_t at, offset_t stride, index_t count, T const** to) {
    for (index_t i = 0; i < count; ++i) to[i] = data + (at + i * stride);
  };
  any_layout const& l = h.p->layout;
  switch (l.kind) {
    case layout_kind::strided:
      return line(l.strided.offset(h.seq, h.head, first), l.strided.slot_stride, n, out);
    case layout_kind::ragged:
      return line(l.ragged.offset(h.seq, h.head, first), l.ragged.slot_stride, n, out);
    case layout_kind::paged:
      for (index_t i = 0; i < n;) {
        index_t const slot = first + i;
        index_t const left = l.paged.block_size - slot % l.paged.block_size;
        index_t const count = std::min(left, n - i);
        line(l.paged.offset(h.seq, h.head, slot), l.paged.slot_stride, count, out + i);
        i += count;
      }
      return;
    case layout_kind::custom:
      for (index_t i = 0; i < n; ++i) out[i] = data + l.custom.offset(h.seq, h.head, first + i);
      return;
  }
}

/// Addresses of listed slots. @param slots [n]  @param out [n]
template <class T>
void row_pointers(head_rows const& h, index_t const* slots, index_t n, T const** out) noexcept {
  T const* const data = reinterpret_cast<T const*>(h.p->data);
  visit_layout(h.p->layout, [&](auto const& l) {
    for (index_t i = 0; i < n; ++i) out[i] = data + l.offset(h.seq, h.head, slots[i]);
  });
}

/// Calls f(T const*) with a null pointer of the plane's element type (std::byte for opaque rows).
template <class F>
void visit_type(dtype t, F&& f) {
  switch (t) {
    case dtype::f32:
      return f(static_cast<float const*>(nullptr));
    case dtype::f16:
      return f(static_cast<fp16 const*>(nullptr));
    case dtype::bf16:
      return f(static_cast<bf16 const*>(nullptr));
    case dtype::e4m3:
      return f(static_cast<fp8_e4m3 const*>(nullptr));
    case dtype::e5m2:
      return f(static_cast<fp8_e5m2 const*>(nullptr));
    case dtype::opaque:
      return f(static_cast<std::byte const*>(nullptr));
  }
}

/// One row as floats, whatever its type and feature order. @param out [dim]
template <class T>
void read_row(plane const& p, T const* row, float* out) noexcept {
  if constexpr (std::is_same_v<T, std::byte>) {
    p.reader.read(p.reader.user, row, p.dim, out);
  } else if (p.contiguous()) {
    index_t d = 0;
    for (; d + lanes <= p.dim; d += lanes) store(out + d, load(row + d));
    for (; d < p.dim; ++d) out[d] = to_float(row[d]);
  } else {
    for (index_t d = 0; d < p.dim; ++d) out[d] = to_float(row[p.features(d)]);
  }
}

/// The element type of an array of row pointers.
template <class R>
using row_element =
    std::remove_cv_t<std::remove_pointer_t<std::remove_cv_t<std::remove_pointer_t<R>>>>;

/// Which slots: a list, or [first, first + n) where there is none.
struct slot_span {
  index_t const* list = nullptr;
  index_t first = 0;
  index_t n = 0;
};

/// Hands over rows in chunks of at most `row_chunk`, in the order of `slots`: f(at, n, rows) with
/// `at` the index of the first row in that order and `rows` an array of `T const*`, T = float, fp16
/// or bf16.
/// @param gathered gather_floats(plane) floats
template <class F>
void for_row_chunks(head_rows const& h, slot_span const& slots, float* gathered,
                    F const& f) noexcept {
  bool const as_is = direct(*h.p);
  visit_type(h.p->type, [&](auto const* type) {
    using T = std::remove_cv_t<std::remove_pointer_t<decltype(type)>>;
    T const* rows[row_chunk];
    for (index_t at = 0; at < slots.n; at += row_chunk) {
      index_t const n = std::min(row_chunk, slots.n - at);
      if (slots.list != nullptr)
        row_pointers(h, slots.list + at, n, rows);
      else
        row_pointers(h, slots.first + at, n, rows);
      if constexpr (in_place<T>) {
        if (as_is) {
          f(at, n, static_cast<T const* const*>(rows));
          continue;
        }
      }
      float const* copies[row_chunk];
      for (index_t i = 0; i < n; ++i) {
        float* const copy = gathered + static_cast<offset_t>(i) * h.p->dim;
        read_row(*h.p, rows[i], copy);
        copies[i] = copy;
      }
      f(at, n, static_cast<float const* const*>(copies));
    }
  });
}

/// The logit rule of a view.
inline logit_form form_of(kv_ref<host_space> const& kv) noexcept { return {kv.scale, kv.softcap}; }

}  // namespace KVKEEP_CPU_ISA
}  // namespace kvkeep::cpu
