// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// The layouts and element types that tests run over.
#pragma once

#include <cstring>
#include <ostream>
#include <vector>

#include <kvkeep/view/kv_view.hpp>

namespace kvkeep {

inline std::ostream& operator<<(std::ostream& out, dtype t) { return out << to_string(t); }

namespace test {

inline std::size_t uz(offset_t i) { return static_cast<std::size_t>(i); }

enum class layout_id : std::uint8_t {
  hnd,             ///< [seq, kv_head, slot, dim], no gaps
  nhd,             ///< [seq, slot, kv_head, dim], no gaps
  padded,          ///< as hnd with odd gaps after every row, head and sequence
  paged,           ///< one shuffled block table per sequence, blocks [slot, kv_head, dim]
  paged_per_head,  ///< a shuffled table per KV head, blocks [kv_head, slot, dim]
  ragged,          ///< shuffled ranges of one pool with guard rows between them
  tiled,   ///< pages with K [kv_head, dim / x, slot, x] and V [kv_head, dim, slot]; opaque: paged
  custom,  ///< a slot_layout that the library does not know, through kv_view
  mixed    ///< K ragged, V padded
};

inline char const* to_string(layout_id l) {
  constexpr char const* names[] = {"hnd",    "nhd",   "padded", "paged", "paged_per_head",
                                   "ragged", "tiled", "custom", "mixed"};
  return names[static_cast<int>(l)];
}
inline std::ostream& operator<<(std::ostream& out, layout_id l) { return out << to_string(l); }

/// Device code cannot call an engine's layout on the host, nor a reader of opaque rows.
#if defined(KVKEEP_TEST_CUDA)
inline constexpr bool host_reads_rows = false;
#else
inline constexpr bool host_reads_rows = true;
#endif

inline std::vector<layout_id> all_layouts() {
  std::vector<layout_id> all{layout_id::hnd,
                             layout_id::nhd,
                             layout_id::padded,
                             layout_id::paged,
                             layout_id::paged_per_head,
                             layout_id::ragged,
                             layout_id::tiled,
                             layout_id::mixed};
  if (host_reads_rows) all.push_back(layout_id::custom);
  return all;
}
/// Types of rows that can be moved.
inline std::vector<dtype> all_dtypes() {
  return {dtype::f32, dtype::f16, dtype::bf16, dtype::e4m3, dtype::e5m2, dtype::opaque};
}
/// Types of rows that the backend under test can look into.
inline std::vector<dtype> readable_dtypes() {
  std::vector<dtype> all{dtype::f32, dtype::f16, dtype::bf16, dtype::e4m3, dtype::e5m2};
  if (host_reads_rows) all.push_back(dtype::opaque);
  return all;
}

/// The engine's own layout: slots run backwards from a turned start.
struct ring_layout {
  index_t heads = 0, slots = 0, turn = 0, row = 0;
  offset_t offset(index_t seq, index_t head, index_t slot) const noexcept {
    offset_t const range = static_cast<offset_t>(seq) * heads + head;
    return (range * slots + slots - 1 - (slot + turn) % slots) * row;
  }
  index_t capacity(index_t, index_t) const noexcept { return slots; }
};

/// Reads rows of a float scale followed by `dim` signed bytes.
inline void read_int8_row(void const*, std::byte const* row, index_t dim, float* out) {
  float scale;
  std::memcpy(&scale, row, sizeof scale);
  for (index_t d = 0; d < dim; ++d)
    out[d] = scale * static_cast<float>(static_cast<signed char>(row[sizeof scale + uz(d)]));
}

struct cache_options {
  layout_id layout = layout_id::hnd;
  dtype type = dtype::f32;
  cache_shape shape{};
  index_t block_size = 4;             ///< pages
  std::uint64_t seed = 1;             ///< order of blocks and ranges
  std::vector<index_t> capacities{};  ///< [seq, kv_head] of ragged planes; empty: max_slots
  /// Gaps are multiples of 16 elements, so that rows can be read in pieces of 16 bytes (of every third
  /// ragged range they cannot). Else gaps are odd and nothing is aligned by chance.
  bool aligned = false;
};

}  // namespace test
}  // namespace kvkeep
