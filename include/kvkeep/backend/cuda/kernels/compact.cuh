// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// Survivors move: one block per head and part, a part being the state, a state row, or a strip of the
/// bytes of K or V. A strip's block reads a number of slots, waits, writes them, waits: in ascending
/// plans no later slot lies where an earlier one goes, so a cache is packed in place.
#pragma once

#include "../../../op/compact.hpp"
#include "rows.cuh"

namespace kvkeep::cuda {

inline constexpr index_t strip_bytes = 32;  ///< a sector: the most blocks without waste

/// The moves of one head.
class slot_moves {
 public:
  /// @param kept [count] ascending, device
  __device__ slot_moves(index_t const* kept, index_t count, bool into_holes)
      : kept_(kept), count_(count), into_holes_(into_holes) {
    if (into_holes) stay_ = first_where([&](index_t i) { return kept[i] >= count; });
  }
  __device__ index_t n() const { return into_holes_ ? count_ - stay_ : count_; }
  __device__ index_t source(index_t i) const { return kept_[i + (into_holes_ ? stay_ : 0)]; }
  /// Hole i: below `count`, and not kept. Before kept slot j there are `kept[j] - j` holes.
  __device__ index_t target(index_t i) const {
    if (!into_holes_) return i;
    index_t const j = first_where([&](index_t k) { return k >= stay_ || kept_[k] - k > i; });
    return i + j;
  }

 private:
  template <class F>
  __device__ index_t first_where(F const& f) const {
    index_t low = 0, high = count_;
    while (low < high) {
      index_t const middle = low + (high - low) / 2;
      if (f(middle))
        high = middle;
      else
        low = middle + 1;
    }
    return low;
  }

  index_t const* kept_;
  index_t count_;
  index_t stay_ = 0;
  bool into_holes_;
};

/// Moves `pieces` words of every slot, not more than the block has threads. A thread takes the same word of
/// several slots: what it has to look up for each, it looks up for all at once. Words that stay are neither read nor
/// written.
/// @param from, to address of word w of slot s
template <class Word, class From, class To>
__device__ void move_words(slot_moves const& m, index_t pieces, From const& from, To const& to) {
  constexpr int each = 4;
  index_t const n = m.n(), across = threads_of_block() / pieces;
  index_t const row = thread_of_block() / pieces, piece = thread_of_block() - row * pieces;
  for (offset_t base = 0; base < n; base += static_cast<offset_t>(each) * across) {
    index_t slot[each];
    Word const* at[each];
    Word* goal[each];
    Word word[each];
    auto const number = [&](int e) { return base + static_cast<offset_t>(e) * across + row; };
    unrolled<each>([&](int e) {
      slot[e] = row < across && number(e) < n ? m.source(static_cast<index_t>(number(e))) : -1;
    });
    unrolled<each>([&](int e) { at[e] = slot[e] >= 0 ? from(slot[e], piece) : nullptr; });
    unrolled<each>([&](int e) {
      goal[e] = slot[e] >= 0 ? to(m.target(static_cast<index_t>(number(e))), piece) : nullptr;
    });
    unrolled<each>([&](int e) {
      if (at[e] != goal[e]) word[e] = *at[e];
    });
    __syncthreads();
    unrolled<each>([&](int e) {
      if (at[e] != goal[e]) *goal[e] = word[e];
    });
    __syncthreads();
  }
}

/// Strips of a plane's rows.
KVKEEP_HD inline index_t strips_of(plane_ref<device_space> const& p) {
  index_t const bytes = p.type == dtype::opaque ? p.row_bytes : p.dim * dtype_bytes(p.type);
  return (bytes + strip_bytes - 1) / strip_bytes;
}

struct compact_kernel {
  static constexpr int most_threads = 256, blocks_per_sm = 4;
  op::compact<device_space> o;
  index_t rows;  ///< state rows that move

  /// Parts of a head: state, state rows, strips of K, strips of V.
  index_t parts() const {
    bool const planes = o.how != op::move_kind::renumber;
    return 1 + rows + (planes ? strips_of(o.from.kv.k) + strips_of(o.from.kv.v) : 0);
  }

  __device__ void operator()() const {
    block_head const at(o.from.kv.shape.n_kv_heads);
    index_t const count = o.plan.count(at.entry, at.head);
    index_t const to_row = o.to_batch.row_of(at.entry), to_id = o.to_batch.id_of(at.entry);
    if (count > room(o.to.kv.k, to_row, at.head) || count > room(o.to.kv.v, to_row, at.head) ||
        count > o.to.kv.shape.max_slots)
      return;
    slot_moves const m(o.plan.slots.at(at.entry, at.head, 0), count,
                       o.how == op::move_kind::fill_holes);
    index_t const from_id = o.batch.id_of(at.entry);
    index_t part = static_cast<index_t>(blockIdx.y);
    if (part <= rows) {
      move_state(m, at.head, from_id, to_id, part);
      return;
    }
    part -= 1 + rows;
    bool const keys = part < strips_of(o.from.kv.k);
    move_strip(m, at, to_row, keys ? o.from.kv.k : o.from.kv.v, keys ? o.to.kv.k : o.to.kv.v,
               keys ? part : part - strips_of(o.from.kv.k));
  }

 private:
  __device__ static index_t room(plane_ref<device_space> const& p, index_t seq, index_t head) {
    any_layout const& l = p.layout;
    return l.kind == layout_kind::paged    ? l.paged.capacity(seq, head)
           : l.kind == layout_kind::ragged ? l.ragged.capacity(seq, head)
                                           : l.strided.capacity(seq, head);
  }

  __device__ void move_state(slot_moves const& m, index_t head, index_t from_id, index_t to_id,
                             index_t part) const {
    auto const move = [&](auto const* from, auto* to) {
      move_words<std::remove_reference_t<decltype(*to)>>(
          m, 1, [&](index_t slot, index_t) { return from + slot; },
          [&](index_t slot, index_t) { return to + slot; });
    };
    if (part > 0)
      return move(o.from.slots.rows.at(from_id, head, part - 1, 0),
                  o.to.slots.rows.at(to_id, head, part - 1, 0));
    move(o.from.slots.positions.at(from_id, head, 0), o.to.slots.positions.at(to_id, head, 0));
    if (thread_of_block() == 0)
      o.to.slots.lengths(to_id, head) =
          o.plan.count(static_cast<index_t>(blockIdx.x) / o.from.kv.shape.n_kv_heads, head);
  }

  __device__ void move_strip(slot_moves const& m, block_head const& at, index_t to_row,
                             plane_ref<device_space> const& a, plane_ref<device_space> const& b,
                             index_t strip) const {
    head_rows const from(a, o.batch.row_of(at.entry), at.head), to(b, to_row, at.head);
    index_t const size = dtype_bytes(a.type);
    index_t const bytes = a.type == dtype::opaque ? a.row_bytes : a.dim * size;
    index_t const first = strip * strip_bytes, n = min(strip_bytes, bytes - first);
    if (!a.contiguous() || !b.contiguous()) {  // element by element
      auto const element = [&](auto const* type) {
        using T = std::remove_const_t<std::remove_pointer_t<decltype(type)>>;
        auto const address = [=](head_rows const& r, plane_ref<device_space> const& p, index_t slot,
                                 index_t d) {
          return reinterpret_cast<T*>(r.bytes(slot)) + p.features(first / size + d);
        };
        move_words<T>(
            m, n / size, [&](index_t slot, index_t d) { return address(from, a, slot, d); },
            [&](index_t slot, index_t d) { return address(to, b, slot, d); });
      };
      if (size == 4)
        element(static_cast<unsigned const*>(nullptr));
      else if (size == 2)
        element(static_cast<unsigned short const*>(nullptr));
      else
        element(static_cast<unsigned char const*>(nullptr));
      return;
    }
    auto const words = [&](auto const* type) {
      using T = std::remove_const_t<std::remove_pointer_t<decltype(type)>>;
      auto const address = [=](head_rows const& r, index_t slot, index_t w) {
        return reinterpret_cast<T*>(r.bytes(slot) + first) + w;
      };
      move_words<T>(
          m, n / static_cast<index_t>(sizeof(T)),
          [&](index_t slot, index_t w) { return address(from, slot, w); },
          [&](index_t slot, index_t w) { return address(to, slot, w); });
    };
    index_t const unit = min(from.alignment(bytes), to.alignment(bytes));
    if (unit >= 16)
      words(static_cast<uint4 const*>(nullptr));
    else if (unit >= 4)
      words(static_cast<unsigned const*>(nullptr));
    else if (unit >= 2)
      words(static_cast<unsigned short const*>(nullptr));
    else
      words(static_cast<unsigned char const*>(nullptr));
  }
};

}  // namespace kvkeep::cuda
