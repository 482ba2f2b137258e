// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// A user functor per slot, and a small functor per index: the extension points of new policies.
#pragma once

#include "backend.hpp"
#include "common.hpp"

namespace kvkeep {

/// What a slot functor sees: the slot's position and its rows as fp32 (null if not asked for).
struct slot_values {
  index_t position = 0;  ///< original position of the slot's token
  index_t seen = 0;      ///< tokens that the sequence has seen when this is asked
  float const* k = nullptr;
  float const* v = nullptr;
  index_t dim_k = 0;
  index_t dim_v = 0;
  index_t entry = 0;  ///< of the batch
  index_t head = 0;   ///< KV head
  index_t slot = 0;
};

namespace op {

/// out[entry, kv_head, slot] = fn(slot_values). `Fn` is trivially copyable and callable on the backend:
/// `KVKEEP_HD float operator()(slot_values const&) const`, with `static constexpr bool reads_k, reads_v`.
/// Bytes: the rows that Fn reads, once. One head's slots are visited in slot order.
template <class Fn, class Space = host_space>
struct score_slots {
  using space = Space;
  batch_ref<Space> batch{};
  layer_ref<Space> layer{};
  Fn fn{};
  index_t const* seen = nullptr;  ///< [id] tokens seen, or null
  index_t first_slot = 0;         ///< skip earlier slots (their scores stay)
  /// [id, kv_head] the one slot to score (none if that is not in use), or null: all
  tensor_ref<index_t const, 2, Space> only{};
  score_map<Space> out{};  ///< [entry or id, kv_head, slot]
  bool out_by_id = false;
};

/// fn(i) for i in [0, n), on the backend. For budgets: a few integers per index.
template <class Fn, class Space = host_space>
struct for_each {
  using space = Space;
  index_t n = 0;
  Fn fn{};
};

}  // namespace op
}  // namespace kvkeep
