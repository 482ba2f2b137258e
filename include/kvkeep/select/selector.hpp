// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// Selectors turn scores and budgets into a keep plan: best tokens, tokens of whole blocks, packed blocks.
#pragma once

#include "../op/compact.hpp"
#include "../op/select_k.hpp"

namespace kvkeep {

struct selector_traits {
  char const* name = "";
  index_t block = 1;         ///< slots per unit
  bool evicts_one = true;    ///< a single victim's slot may be reused
  bool moves_tokens = true;  ///< false: whole blocks leave, the block table changes
};

/// `select(ctx, batch, slots, scores, k, guard, plan, ws)`: see op::select_k for shapes.
template <class S, class Ctx>
concept selector = requires(S const& s, Ctx& c, batch_ref<space_of<Ctx>> const& b,
                            slot_state<space_of<Ctx>> const& state,
                            tensor_ref<float const, 3, space_of<Ctx>> m,
                            tensor_ref<index_t const, 2, space_of<Ctx>> k,
                            guard_ref<space_of<Ctx>> const& g, keep_plan<space_of<Ctx>> const& plan,
                            workspace& w) {
  { s.traits() } -> std::same_as<selector_traits>;
  { s.key() } -> std::same_as<std::uint64_t>;
  s.check();
  { s.select(c, b, state, m, k, g, plan, w) } -> std::same_as<status>;
};

/// The best tokens. With `block > 1` (packed blocks) floor(k / block) * block of them, then packed.
struct top_k {
  index_t block = 1;

  selector_traits traits() const {
    return {block > 1 ? "packed_blocks" : "top_k", block, block == 1, true};
  }
  std::uint64_t key() const { return static_cast<std::uint64_t>(block); }
  void check() const { KVKEEP_EXPECTS(block >= 1, "block", block, ">= 1"); }

  template <class Ctx>
  status select(Ctx& ctx, batch_ref<space_of<Ctx>> const& batch,
                slot_state<space_of<Ctx>> const& slots,
                tensor_ref<float const, 3, space_of<Ctx>> scores,
                tensor_ref<index_t const, 2, space_of<Ctx>> k,
                guard_ref<space_of<Ctx>> const& guard, keep_plan<space_of<Ctx>> const& plan,
                workspace& ws) const {
    return run(ctx, op::select_k<space_of<Ctx>>{batch, slots, scores, k, guard, plan}, ws);
  }
};

/// Whole blocks of the cache (op::select_blocks): no token moves, freed blocks go back to the engine.
struct whole_blocks {
  index_t block = 16;
  reduction how = reduction::sum;

  selector_traits traits() const { return {"whole_blocks", block, false, false}; }
  std::uint64_t key() const {
    return static_cast<std::uint64_t>(block) * 8 + 4 + static_cast<std::uint64_t>(how);
  }
  void check() const {
    KVKEEP_EXPECTS(block >= 1, "block", block, ">= 1");
    KVKEEP_EXPECTS(how != reduction::mean, "how", to_string(how), "sum or max");
  }

  template <class Ctx>
  status select(Ctx& ctx, batch_ref<space_of<Ctx>> const& batch,
                slot_state<space_of<Ctx>> const& slots,
                tensor_ref<float const, 3, space_of<Ctx>> scores,
                tensor_ref<index_t const, 2, space_of<Ctx>> k,
                guard_ref<space_of<Ctx>> const& guard, keep_plan<space_of<Ctx>> const& plan,
                workspace& ws) const {
    return run(ctx,
               op::select_blocks<space_of<Ctx>>{batch, slots, scores, k, guard, block, how, plan},
               ws);
  }
};

}  // namespace kvkeep
