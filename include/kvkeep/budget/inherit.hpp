// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// A decode budget that keeps what the prompt's policy left in every layer and head.
#pragma once

#include "budget.hpp"

namespace kvkeep {

/// For a decode policy beside a prompt policy with uneven budgets (say AdaKV, then MorphKV): every head
/// stays at the count that the first cut left, or at the prompt policy's mean capacity where the prompt
/// was too short to be cut. A head that is left fewer tokens than the decode policy protects grows back
/// to as many; that the mean capacity exceeds them is checked when both policies are bound.
struct inherit {
  budget_traits traits() const {
    budget_traits t{"inherit"};
    t.inherits = true;
    return t;
  }
  std::uint64_t key() const { return 1; }
  index_t capacity() const { return 0; }
  index_t most(index_t, cache_shape const&, index_t, index_t) const { return 0; }
  layer_range due(index_t layer, index_t) const { return {layer, layer + 1}; }
  void check(index_t, cache_shape const&, index_t) const {}
  template <class Ctx>
  status allocate(Ctx&, budget_input<space_of<Ctx>> const&, workspace&) const {
    return status::ok;
  }
};

}  // namespace kvkeep
