// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// CPU: means, deviations and entropies of attention weights per column.
#pragma once

#include "causal_rows.hpp"

namespace kvkeep::cpu {
inline namespace KVKEEP_CPU_ISA {

/// Takes the rows into the moments of a panel's columns, a query head's rows in one segment.
struct add_moments {
  static constexpr index_t moments = op::column_moments<host_space>::moments;
  float* out;       ///< [moment][group] rows of slots
  offset_t stride;  ///< between them
  float* scratch;   ///< [2][rows] what `begin` leaves for moment_rows
  index_t rows;     ///< packed ones, at most
  float most;       ///< of -ln p

  void begin(query_block const& block) const noexcept {
    for (index_t r = 0; r < block.packed(); ++r) {
      scratch[r] = block.sum[r] > 0 ? std::log(block.sum[r]) : 0.0F;
      scratch[rows + r] = 1.0F / static_cast<float>(block.before + r % block.n + 1);
    }
  }
  void operator()(query_block const& block, index_t at, index_t n, index_t segment, index_t from,
                  logit_tile const& t) const noexcept {
    float acc[moments][panel_keys] = {};
    auto const row = [&](index_t m) { return out + (m * block.group + segment) * stride + at; };
    for (index_t m = 0; m < moments; ++m) std::memcpy(acc[m], row(m), size_of(n) * sizeof(float));
    exp_rows_moments(t, block.norm(from), {scratch + from, scratch + rows + from, most}, acc[0]);
    for (index_t m = 0; m < moments; ++m) std::memcpy(row(m), acc[m], size_of(n) * sizeof(float));
  }
};

/// Column moments. Cost as the op says; the query rows are packed in blocks of 512.
KVKEEP_CPU_OP status enqueue(context& c, op::column_moments<host_space> const& o,
                             workspace& ws) noexcept {
  KVKEEP_TRY(check_columns(o));
  workspace::frame const frame(ws);
  int const workers = c.workers(o.batch.n * o.layer.kv.shape.n_kv_heads);
  index_t const rows = std::max(block_rows, o.layer.kv.shape.group());
  worker_scratch<float> const scratch = take_each<float>(ws, workers, size_of(2 * rows));
  float const most = -std::log(o.least_weight);
  return for_query_blocks(
      c, o, ws, [&](index_t b, index_t h, query_block& block, index_t capacity, int worker) {
        index_t const id = o.batch.id_of(b);
        add_moments const add{o.out.at(b, h, 0, 0), o.out.stride[2], scratch(worker), rows, most};
        for (index_t r = 0; r < o.moments * block.group; ++r)
          std::fill_n(add.out + r * add.stride, o.layer.slots.lengths(id, h), 0.0F);
        block.by_head = true;
        add_rows(o, block, capacity, b, h, add);
      });
}

}  // namespace KVKEEP_CPU_ISA
}  // namespace kvkeep::cpu
