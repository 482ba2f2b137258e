// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// Plans of engines that move tokens themselves, and what they read back afterwards.
#pragma once

#include <span>
#include <vector>

#include "../op/common.hpp"

namespace kvkeep {

/// What `choose` decided, for all managed layers of a batch. A view into the session's memory.
template <class Space = host_space>
struct plan {
  index_t n = 0;                      ///< entries
  index_t n_layers = 0;               ///< managed layers
  index_t const* id = nullptr;        ///< [entry] host
  index_t const* row = nullptr;       ///< [entry] host
  std::uint32_t const* generation = nullptr;  ///< [entry] host, of the sequences when chosen
  /// Slots to keep, ascending, `[layer * entries + entry, kv_head, i]`.
  tensor_ref<index_t const, 3, Space> slots{};
  tensor_ref<index_t const, 2, Space> count{};  ///< [layer * entries + entry, kv_head]
};

/// Memory of the current plan.
template <class Space>
struct plan_memory {
  index_t n = 0;
  index_t* id = nullptr;
  index_t* row = nullptr;
  std::uint32_t* generation = nullptr;
  tensor_ref<index_t, 3, Space> slots{};
  tensor_ref<index_t, 2, Space> count{};
  /// Blocks in use at the last report, `[layer, id, kv_head]`.
  tensor_ref<index_t, 3, Space> held{};
  /// Tables after whole blocks left, until the report: `[layer, id, kv_head * blocks_per_table + i]`.
  tensor_ref<index_t, 3, Space> kept{};
  tensor_ref<index_t, 3, Space> n_kept{};  ///< [layer, id, kv_head], -1: nothing to report
  tensor_ref<index_t, 3, Space> gone{};    ///< [layer, id, kv_head * blocks_per_table + i]
  tensor_ref<index_t, 3, Space> n_gone{};  ///< [layer, id, kv_head]
};

/// Caller's memory for a report of one sequence; pinned, where the backend is a device. Empty spans are
/// not written. A table is one distinct block table of the sequence: one if layers and heads share it,
/// else in layer order, then head order.
struct report_buffer {
  std::span<index_t> lengths{};      ///< [managed layer, kv_head] slots in use
  std::span<index_t> freed{};        ///< blocks that no slot uses any more, tables one after another
  std::span<index_t> freed_of{};     ///< [table] how many of them belong to each table
  std::span<index_t> tables{};       ///< [table, blocks_per_table] the entries to use from now on
  std::span<index_t> table_sizes{};  ///< [table] entries in use
};

}  // namespace kvkeep
