// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// Blocks of packed query rows against panels of 16 keys: the loops of all scoring by query rows.
#pragma once

#include <cmath>

#include "guard.hpp"
#include "kernels/panel_softmax.hpp"
#include "rows.hpp"

namespace kvkeep::cpu {
inline namespace KVKEEP_CPU_ISA {

inline constexpr index_t block_rows = 512;  ///< packed rows of a block: the second-level cache
inline constexpr index_t tile_rows = 128;   ///< rows whose logits stay in the first-level cache
/// Logits that a worker keeps between two passes, 16 MiB: reading them is cheaper than multiplying again,
/// wherever they lie.
inline constexpr std::size_t most_kept_logits = std::size_t{4} << 20;

/// Slots of the panels that hold so many.
constexpr index_t whole_panels(index_t n_slots) noexcept {
  return (n_slots + panel_keys - 1) / panel_keys * panel_keys;
}

/// Query rows of one KV head, packed. Row i of the block, head g of the group: index i * group + g,
/// or g * n + i when `by_head`. Only present rows are packed, in ascending order.
struct query_block_scratch {
  worker_scratch<float> floats;
  worker_scratch<index_t> integers;
  worker_scratch<float> kept;
  index_t capacity = 0;  ///< packed rows, a multiple of the group
  index_t group = 1;
  index_t dim = 0;

  /// @param two_passes keys are passed twice: logits of the first pass are kept, as many as may be
  static query_block_scratch take(workspace& ws, int workers, cache_shape const& s, plane const& k,
                                  index_t n_rows, bool two_passes) {
    query_block_scratch r;
    r.group = s.group();
    r.dim = s.dim_k;
    index_t const rows = std::max<index_t>(1, std::min(n_rows, block_rows / r.group));
    r.capacity = rows * r.group;
    std::size_t const n = size_of(r.capacity);
    r.floats = take_each<float>(
        ws, workers, n * size_of(r.dim) + n * 18 + panel_floats(r.dim) + gather_floats(k) + 64);
    r.integers = take_each<index_t>(ws, workers, n * 2 + 16);
    std::size_t const all = n * size_of(whole_panels(s.max_slots));
    if (two_passes) r.kept = take_each<float>(ws, workers, std::min(all, most_kept_logits));
    return r;
  }
};

/// One worker's block.
struct query_block {
  float* q = nullptr;      ///< [capacity][dim]
  float* panel = nullptr;  ///< [dim][16]
  float* z = nullptr;      ///< [capacity][16], `tile_rows` at a time
  float* max = nullptr;    ///< [capacity]
  float* sum = nullptr;    ///< [capacity]
  float* gathered = nullptr;
  float* kept = nullptr;             ///< [panel][packed row][16] logits between two passes, or null
  std::size_t most_kept = 0;         ///< floats of `kept`
  index_t* position = nullptr;       ///< [capacity] of each packed row
  std::uint16_t* visible = nullptr;  ///< [capacity]
  index_t dim = 0;
  index_t group = 1;
  index_t n = 0;         ///< rows packed, group excluded
  index_t before = 0;    ///< rows of the head in earlier blocks
  index_t lowest = -1;   ///< smallest position of a packed row
  index_t highest = -1;  ///< largest position of a packed row
  bool by_head = false;
  logit_form form{};

  query_block(query_block_scratch const& s, int worker) noexcept
      : most_kept(s.kept.each), dim(s.dim), group(s.group) {
    offset_t const c = s.capacity;
    float* f = s.floats(worker);
    panel = f;
    f += panel_floats(dim);
    q = f;
    z = (f += c * dim);
    max = (f += c * panel_keys);
    sum = (f += c);
    gathered = f + c;
    if (most_kept > 0) kept = s.kept(worker);
    position = s.integers(worker);
    visible = reinterpret_cast<std::uint16_t*>(position + c);
  }

  index_t packed() const noexcept { return n * group; }
  /// Whether the logits of so many slots stay between two passes.
  bool keeps(index_t n_slots) const noexcept {
    return product(whole_panels(n_slots), packed()) <= most_kept;
  }
  /// Normalisers of the packed rows from `first` on, once the statistics are finished.
  row_norm norm(index_t first) const noexcept { return {max + first, sum + first}; }
  index_t index(index_t i, index_t g) const noexcept { return by_head ? g * n + i : i * group + g; }

  /// Packs rows: `source(i, g)` is query row i of head g, `at(i)` its position, i in [0, count).
  template <class Source, class At>
  void pack(index_t count, Source const& source, At const& at) noexcept {
    n = count;
    lowest = std::numeric_limits<index_t>::max();
    highest = -1;
    for (index_t i = 0; i < count; ++i) {
      lowest = std::min(lowest, at(i));
      highest = std::max(highest, at(i));
      for (index_t g = 0; g < group; ++g) {
        index_t const r = index(i, g);
        position[r] = at(i);
        std::memcpy(q + static_cast<offset_t>(r) * dim, source(i, g), size_of(dim) * sizeof(float));
      }
    }
  }

  /// Logits of packed rows [first, first + rows) for the current panel, to `to` `[rows][16]`. Not inlined: in a larger
  /// function the compiler moves accumulators of the inner loop to the stack.
  [[gnu::noinline]] logit_tile tile(index_t first, index_t rows, float* to) const noexcept {
    query_rows const part{q + static_cast<offset_t>(first) * dim, dim, rows, dim, form};
    qk_panel(part, panel, to, panel_keys);
    return {to, panel_keys, rows, nullptr};
  }
};

/// A head's slots for scoring.
struct head_slots {
  head_rows k;
  index_t const* positions = nullptr;  ///< [n]
  index_t n = 0;
};

/// Panels of a head: packs those for which `wanted(first, n)` holds and calls f(first, n).
template <class W, class F>
void for_panels(query_block const& b, head_rows const& k, index_t n_slots, W const& wanted,
                F const& f) noexcept {
  for_row_chunks(k, {nullptr, 0, n_slots}, b.gathered,
                 [&](index_t at, index_t n, auto const* rows) {
                   for (index_t j = 0; j < n; j += panel_keys) {
                     index_t const count = std::min(panel_keys, n - j);
                     if (!wanted(at + j, count)) continue;
                     pack_panel(rows + j, count, b.dim, b.panel);
                     for (index_t i = j + panel_keys; i < std::min(n, j + 2 * panel_keys); ++i)
                       prefetch_row(rows[i], b.dim);
                     f(at + j, count);
                   }
                 });
}

/// Two passes over the panels for which `wanted(first, n)` holds, `first(at, n, tile)`, then `between()`, then
/// `second(at, n, tile)`; `tile(row, rows)` are a panel's logits. The second pass multiplies again only
/// where the logits could not be kept.
template <class W, class F, class M, class G>
void for_panels_twice(query_block const& b, head_rows const& k, index_t n_slots, W const& wanted,
                      F const& first, M const& between, G const& second) noexcept {
  bool const keeps = b.keeps(n_slots);
  auto const kept = [&](index_t at, index_t row) {
    return b.kept + (static_cast<offset_t>(at / panel_keys) * b.packed() + row) * panel_keys;
  };
  for_panels(b, k, n_slots, wanted, [&](index_t at, index_t n) {
    first(at, n, [&](index_t row, index_t rows) {
      return b.tile(row, rows, keeps ? kept(at, row) : b.z);
    });
  });
  between();
  if (!keeps) {
    for_panels(b, k, n_slots, wanted, [&](index_t at, index_t n) {
      second(at, n, [&](index_t row, index_t rows) { return b.tile(row, rows, b.z); });
    });
    return;
  }
  for (index_t at = 0; at < n_slots; at += panel_keys) {
    index_t const n = std::min(panel_keys, n_slots - at);
    if (wanted(at, n))
      second(at, n, [&](index_t row, index_t rows) {
        return logit_tile{kept(at, row), panel_keys, rows, nullptr};
      });
  }
}

/// Positions of the keys of a panel.
struct panel_positions {
  index_t at[panel_keys];  ///< INT32_MAX behind the last key: nobody sees it
  index_t low = 0;
  index_t high = 0;

  panel_positions(index_t const* positions, index_t n) noexcept {
    for (index_t j = 0; j < panel_keys; ++j)
      at[j] = j < n ? positions[j] : std::numeric_limits<index_t>::max();
    position_bounds const b = bounds_of(at, panel_keys);
    low = b.low;
    high = b.high;
  }
};

/// Which columns the packed rows [begin, begin + rows) see: those whose position is not above their
/// own.
struct causal_view {
  index_t skip = 0;  ///< leading rows that see none and can be left out
  std::uint16_t const* visible =
      nullptr;  ///< mask per row from `skip` on; null: they see all columns
};

inline causal_view see_causally(query_block const& block, panel_positions const& keys,
                                index_t begin, index_t rows) noexcept {
  if (keys.high <= block.lowest) return {};
  index_t const* const position = block.position + begin;
  causal_view r;
  while (r.skip < rows && position[r.skip] < keys.low) ++r.skip;
  bool all = true;
  vi const a = load(keys.at), b = load(keys.at + lanes);
  for (index_t i = r.skip; i < rows; ++i) {
    vi const p = splat(position[i]);
    unsigned const hidden = lane_bits(greater(a, p)) | lane_bits(greater(b, p)) << 8;
    block.visible[i] = static_cast<std::uint16_t>(~hidden);
    all &= hidden == 0;
  }
  if (!all) r.visible = block.visible + r.skip;
  return r;
}

/// f(first, rows) over packed rows [begin, end) in tiles. @param multiple tiles hold a multiple of
/// it
template <class F>
void for_tiles(index_t begin, index_t end, index_t multiple, F const& f) noexcept {
  index_t const step = std::max<index_t>(1, tile_rows / multiple) * multiple;
  for (index_t first = begin; first < end; first += step) f(first, std::min(step, end - first));
}

}  // namespace KVKEEP_CPU_ISA
}  // namespace kvkeep::cpu
