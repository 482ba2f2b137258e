// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// Selection: the best slots of each head, the best whole blocks, or the one victim.
/// Order everywhere: score descending, then position ascending; -0 equals +0; NaN ranks lowest.
#pragma once

#include "backend.hpp"
#include "common.hpp"

namespace kvkeep::op {

/// Keeps the protected slots and the best of the others, `k` in all (the protected ones are kept even
/// when they are more than k; k is clamped to the slots in use).
/// Bytes: 8 per slot. Operations: O(slots).
template <class Space = host_space>
struct select_k {
  using space = Space;
  batch_ref<Space> batch{};
  slot_state<Space> slots{};
  tensor_ref<float const, 3, Space> scores{};  ///< [entry, kv_head, slot]
  tensor_ref<index_t const, 2, Space> k{};     ///< [id, kv_head] tokens to keep
  guard_ref<Space> guard{};
  keep_plan<Space> out{};
};

/// Whole blocks of `block` slots (spec 5.6): a block's score is the sum (fp32, slot order) or maximum of
/// its tokens' scores, a protected token protects its block, the best floor(k / block) blocks are kept
/// besides the open tail block; ties: the block with the lower first position.
/// The plan lists the kept blocks' slots.
template <class Space = host_space>
struct select_blocks {
  using space = Space;
  batch_ref<Space> batch{};
  slot_state<Space> slots{};
  tensor_ref<float const, 3, Space> scores{};  ///< [entry, kv_head, slot]
  tensor_ref<index_t const, 2, Space> k{};     ///< [id, kv_head] tokens to keep
  guard_ref<Space> guard{};
  index_t block = 16;
  reduction how = reduction::sum;  ///< sum or max
  keep_plan<Space> out{};
};

/// The unprotected slot that ranks last, per entry and KV head; -1 when all are protected.
/// Bytes: 8 per slot.
template <class Space = host_space>
struct evict_one {
  using space = Space;
  batch_ref<Space> batch{};
  slot_state<Space> slots{};
  tensor_ref<float const, 3, Space> scores{};  ///< [entry, kv_head, slot]
  guard_ref<Space> guard{};
  tensor_ref<index_t, 2, Space> victim{};  ///< [id, kv_head] slot
};

}  // namespace kvkeep::op
