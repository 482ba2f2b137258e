// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// SnapKV's score: attention mass from the last W queries of the prompt, pooled over neighbours.
#pragma once

#include <string>

#include "scorer.hpp"

namespace kvkeep {

/// Spec 3.3; arXiv 2404.14469, FasterDecoding/SnapKV snapkv_utils.py, KVCache-Factory SnapKVCluster.
/// Softmax over all columns (window columns take part in the normaliser), summed over the window rows.
/// Deviations from the published code: fp32 sums, never rounded to 16 bit; ties by position.
struct window_score : scorer_base {
  index_t window = 32;  ///< W query rows
  op::pooling pooling = op::pooling::average;
  index_t kernel = 5;                 ///< odd
  reduction group = reduction::mean;  ///< over the query heads of a group
  reduction rows = reduction::sum;    ///< sum or mean over the window
  bool group_before_pool = true;      ///< false: kvpress' order

  scorer_traits traits() const {
    scorer_traits t;
    t.name = "window";
    t.at_decode = false;
    t.prompt = evidence::window_queries;
    return t;
  }
  void check(cache_shape const&) const {
    KVKEEP_EXPECTS(window >= 1, "window", window, ">= 1");
    KVKEEP_EXPECTS(kernel >= 1 && kernel % 2 == 1, "kernel", kernel, "an odd number >= 1");
    KVKEEP_EXPECTS(rows != reduction::max, "rows", to_string(rows), "sum or mean");
  }
  state_spec state(cache_shape const&) const { return {0, window, 0}; }
  std::uint64_t key() const {
    return config_key(window, pooling, kernel, group, rows, group_before_pool);
  }

  template <class Ctx>
  status score(Ctx& ctx, score_input<space_of<Ctx>> const& in, score_map<space_of<Ctx>> out,
               workspace& ws) const {
    using space = space_of<Ctx>;
    auto const& shape = in.layer.kv.shape;
    index_t const g = shape.group();
    query_rows<space> q;
    KVKEEP_TRY(last_queries(ctx, in, window, q, ws));
    std::size_t const n = product(in.batch.n, shape.n_q_heads, shape.max_slots);
    auto const sums =
        row_major<space>(ws.take<float>(n), in.batch.n, shape.n_kv_heads, g, shape.max_slots);
    KVKEEP_TRY(
        run(ctx, op::column_sums<space>{in.batch, in.layer, q, sums, false, true, true}, ws));
    if (!group_before_pool) KVKEEP_TRY(run(ctx, pool(in, sums), ws));
    float const by_rows = rows == reduction::mean ? 1.0F / static_cast<float>(window) : 1.0F;
    op::reduce_rows<space> reduce{in.batch, in.layer.slots, sums, false, group, by_rows};
    reduce.out = out;
    KVKEEP_TRY(run(ctx, reduce, ws));
    if (!group_before_pool) return status::ok;
    return run(ctx, pool(in, as_rows(out)), ws);
  }

 private:
  template <class Space>
  op::pool_rows<Space> pool(score_input<Space> const& in, tensor_ref<float, 4, Space> v) const {
    return {in.batch, in.layer.slots, in.guard.recent, pooling, kernel, v};
  }
};

}  // namespace kvkeep
