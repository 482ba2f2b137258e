// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// CPU: attention mass per column.
#pragma once

#include "causal_rows.hpp"

namespace kvkeep::cpu {
inline namespace KVKEEP_CPU_ISA {

/// Adds the rows' probabilities to the sums of a panel's columns, in packed order.
struct add_mass {
  float* out;       ///< rows of [n] sums, one per segment
  offset_t stride;  ///< between them

  void begin(query_block const&) const noexcept {}
  void operator()(query_block const& block, index_t at, index_t n, index_t segment, index_t from,
                  logit_tile const& t) const noexcept {
    float* const to = out + segment * stride + at;
    float acc[panel_keys] = {};
    std::memcpy(acc, to, size_of(n) * sizeof(float));
    exp_rows_accumulate(t, block.norm(from), row_fold::sum, acc);
    std::memcpy(to, acc, size_of(n) * sizeof(float));
  }
};

/// Column sums. Cost as the op says; the query rows are packed in blocks of 512.
KVKEEP_CPU_OP status enqueue(context& c, op::column_sums<host_space> const& o,
                             workspace& ws) noexcept {
  KVKEEP_TRY(check_columns(o));
  workspace::frame const frame(ws);
  return for_query_blocks(
      c, o, ws, [&](index_t b, index_t h, query_block& block, index_t capacity, int) {
        index_t const id = o.batch.id_of(b), rows = o.per_query_head ? block.group : 1;
        add_mass const add{o.out.at(o.out_by_id ? id : b, h, 0, 0), o.out.stride[2]};
        for (index_t r = 0; o.clear && r < rows; ++r)
          std::fill_n(add.out + r * add.stride, o.layer.slots.lengths(id, h), 0.0F);
        block.by_head = o.per_query_head;
        add_rows(o, block, capacity, b, h, add);
      });
}

}  // namespace KVKEEP_CPU_ISA
}  // namespace kvkeep::cpu
