// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// H2O's score: attention mass accumulated since a token entered the cache; ObservedAttention with age.
#pragma once

#include "scorer.hpp"

namespace kvkeep {

/// Spec 3.5, 4.1; arXiv 2306.14048, FMInference/H2O utils_real_drop/modify_llama.py, KVCache-Factory
/// H2OKVCluster; `by_age`: kvpress ObservedAttentionPress.
/// State: one fp32 sum per slot (a row per query head with `group = max`). The attention of a token is
/// taken before anything is evicted for it.
/// Deviations: sums per KV head over the group (the published decode code has no GQA), fp32, one batch
/// entry at a time never mixes with another.
struct heavy_hitter_score : scorer_base {
  reduction group = reduction::mean;  ///< over the query heads of a group
  bool by_age = false;                ///< divide by the number of rows that saw the token

  scorer_traits traits() const {
    scorer_traits t;
    t.name = by_age ? "observed_attention" : "heavy_hitter";
    t.prompt = evidence::all_queries;
    t.decode = evidence::token_queries;
    t.prefix_safe = false;  // the rows of a shared prefix were never seen
    return t;
  }
  state_spec state(cache_shape const& s) const { return {n_rows(s), 0, 1, true}; }
  std::uint64_t key() const { return config_key(group, by_age); }

  template <class Ctx>
  status observe_prompt(Ctx& ctx, score_input<space_of<Ctx>> const& in,
                        query_rows<space_of<Ctx>> const& rows, workspace& ws) const {
    return run(ctx,
               op::column_sums<space_of<Ctx>>{in.batch, in.layer, rows, in.rows, true,
                                              group == reduction::max, false},
               ws);
  }
  template <class Space>
  weight_fold<Space> attention_fold(score_input<Space> const& in) const {
    return {in.rows, true, group == reduction::max, false, 1, in.fresh};
  }
  template <class Ctx>
  status fold(Ctx& ctx, score_input<space_of<Ctx>> const& in, workspace& ws) const {
    return fold_weights(ctx, in, attention_fold(in), ws);
  }
  template <class Ctx>
  status score(Ctx& ctx, score_input<space_of<Ctx>> const& in, score_map<space_of<Ctx>> out,
               workspace& ws) const {
    return run(ctx, reduce(in, out), ws);
  }
  template <class Space, class Run>
  status score_ops(score_input<Space> const& in, score_map<Space> out, Run const& run) const {
    return run(reduce(in, out));
  }

 private:
  template <class Space>
  op::reduce_rows<Space> reduce(score_input<Space> const& in, score_map<Space> out) const {
    float const scale =
        group == reduction::mean ? 1.0F / static_cast<float>(in.layer.kv.shape.group()) : 1.0F;
    op::reduce_rows<Space> r{
        in.batch, in.layer.slots, in.rows, true, group == reduction::max ? group : reduction::sum,
        scale};
    r.by_age = by_age;
    r.seen = in.seen;
    r.out = out;
    return r;
  }
  index_t n_rows(cache_shape const& s) const { return group == reduction::max ? s.group() : 1; }
};

/// TOVA's score: the newest token's attention row, mean over all query heads of the layer.
/// Spec 4.2, 3.9; arXiv 2401.06104, schwartz-lab-NLP/TOVA tova_cache.py, kvpress TOVAPress.
/// State: one fp32 row per slot, the newest row summed over the group.
struct last_row_score : scorer_base {
  scorer_traits traits() const {
    scorer_traits t;
    t.name = "last_row";
    t.prompt = evidence::window_queries;
    t.decode = evidence::token_queries;
    t.whole_layer = true;
    return t;
  }
  state_spec state(cache_shape const&) const { return {1, 1, 1, true}; }

  /// The last prompt token's row stands in until the first decoded token has one.
  template <class Ctx>
  status settle(Ctx& ctx, score_input<space_of<Ctx>> const& in, workspace& ws) const {
    return last_row(ctx, in, in.rows, true, ws);
  }
  template <class Space>
  weight_fold<Space> attention_fold(score_input<Space> const& in) const {
    return {in.rows, true, false, true};
  }
  template <class Ctx>
  status fold(Ctx& ctx, score_input<space_of<Ctx>> const& in, workspace& ws) const {
    return fold_weights(ctx, in, attention_fold(in), ws);
  }
  template <class Ctx>
  status score(Ctx& ctx, score_input<space_of<Ctx>> const& in, score_map<space_of<Ctx>> out,
               workspace& ws) const {
    op::reduce_rows<space_of<Ctx>> mean = group_mean(in, out);
    if (in.newest_row == nullptr) {
      KVKEEP_TRY(last_row(ctx, in, as_rows(out), false, ws));
      mean.in = as_rows(out);
      mean.in_by_id = false;
    }
    return run(ctx, mean, ws);
  }
  template <class Space, class Run>
  status score_ops(score_input<Space> const& in, score_map<Space> out, Run const& run) const {
    return run(group_mean(in, out));
  }

 private:
  /// Of the newest row.
  template <class Space>
  static op::reduce_rows<Space> group_mean(score_input<Space> const& in, score_map<Space> out) {
    float const scale = 1.0F / static_cast<float>(in.layer.kv.shape.group());
    op::reduce_rows<Space> r{in.batch, in.layer.slots, in.rows, true, reduction::sum, scale};
    r.out = out;
    return r;
  }
  /// The last prompt query's attention row, summed over the group.
  template <class Ctx>
  static status last_row(Ctx& ctx, score_input<space_of<Ctx>> const& in,
                         tensor_ref<float, 4, space_of<Ctx>> out, bool by_id, workspace& ws) {
    query_rows<space_of<Ctx>> q;
    KVKEEP_TRY(last_queries(ctx, in, 1, q, ws));
    return run(ctx, op::column_sums<space_of<Ctx>>{in.batch, in.layer, q, out, by_id, false, true},
               ws);
  }
};

}  // namespace kvkeep
