// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// Plans of engines that move tokens themselves, and what they read back afterwards.
#pragma once

#include <span>

#include "../op/common.hpp"

namespace kvkeep {

/// What `choose` decided, for all managed layers of a batch. A view into the session's memory, in its space.
template <class Space = host_space>
struct plan {
  index_t n = 0;             ///< entries
  index_t n_layers = 0;      ///< managed layers
  std::uint64_t number = 0;  ///< of the call of `choose`, from 1: the last one's can be committed
  index_t const* id = nullptr;                ///< [entry]
  index_t const* row = nullptr;               ///< [entry]
  std::uint32_t const* generation = nullptr;  ///< [entry] of the sequences when chosen
  /// Slots to keep, ascending, `[layer * entries + entry, kv_head, i]`.
  tensor_ref<index_t const, 3, Space> slots{};
  tensor_ref<index_t const, 2, Space> count{};  ///< [layer * entries + entry, kv_head]
};

/// Caller's memory for a report of one sequence, which the backend can write (pinned, where that is a device). Empty
/// spans are not written. A table is one distinct block table of the sequence: one if layers and heads share it,
/// else in layer order, then head order.
/// A session refuses spans that are too small for what there is to say, and to say nothing of blocks that have left
/// (one of `freed` and `tables` is not empty then). A device session cannot know that: there a span has room for all
/// that may be said, `freed` for `blocks_per_table` of every table.
struct report_buffer {
  std::span<index_t> lengths{};   ///< [managed layer, kv_head] slots in use
  std::span<index_t> freed{};     ///< blocks that no slot uses any more, tables one after another
  std::span<index_t> freed_of{};  ///< [table] how many of them belong to each table
  /// Entries to use from now on: tables one after another, each with room for its `blocks_per_table`.
  std::span<index_t> tables{};
  std::span<index_t> table_sizes{};  ///< [table] entries in use
  std::span<index_t> faults{};       ///< [1] bits of device_fault, 0 in a session
};

}  // namespace kvkeep
