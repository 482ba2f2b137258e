// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// ExpectedAttention's score: the attention that queries to come are expected to pay.
#pragma once

#include <algorithm>
#include <cmath>

#include "expected_logits.hpp"

namespace kvkeep {

/// ||v||_2 of a value.
struct value_norm_fn {
  static constexpr char const* name = "value_norm";
  static constexpr bool reads_k = false;
  static constexpr bool reads_v = true;

  KVKEEP_HD float operator()(slot_values const& s) const noexcept {
    float sum = 0;
    for (index_t d = 0; d < s.dim_v; ++d) sum += s.v[d] * s.v[d];
    return std::sqrt(sum);
  }
};

/// Spec 3.10; arXiv 2510.00636, NVIDIA/kvpress presses/expected_attention_press.py. Queries to come are taken for
/// normal variables with the mean and covariance that the prompt's have before rotation, turned by the mean rotation of
/// the next `ahead` positions; a key's expected exp(logit) is then known, and its share times ||v|| its score. The
/// first `sinks` tokens' queries and keys take no part; these tokens score infinity.
/// Memory per query head: 4 (dim_k^2 + dim_k) bytes (4 dim_k without covariance), for every sequence and layer of a
/// session; for one layer of one sequence alone with `limits::max_prompt`. Scratch besides, for the call under way: 4
/// bytes per rotated feature and row of a chunk (CUDA: 4 dim_k per query head too), or as much as that memory and 4
/// bytes per slot.
/// Operations: dim_k^2 / 2 multiplications with additions per token and query head while the prompt comes, and as many
/// to score. Bytes: K and V once, 12 per slot and query head in scratch.
/// Deviations: queries come as all scorers get them, rotated, and are turned back (`rotated`); fp32 sums, by chunks.
/// The view's softcap and sink logits are of no account. A key that is not a number has no share; with `epsilon` it
/// still scores epsilon * ||v||. A query that is not finite leaves its head's keys equal shares.
struct expected_attention_score : scorer_base {
  rope rotation{};
  bool rotated = true;  ///< queries come with their rotation (else before it)
  index_t ahead = 512;  ///< F, positions to come
  index_t sinks = 4;
  bool covariance = true;
  bool value_norms = true;
  float epsilon = 0;  ///< added to a share before it is multiplied by ||v||

  scorer_traits traits() const {
    scorer_traits t;
    t.name = "expected_attention";
    t.at_decode = false;
    t.prompt = evidence::all_queries;
    t.chunk_invariant = false;  // sums are rounded chunk by chunk
    t.prefix_safe = false;      // the queries of a shared prefix were never seen
    return t;
  }
  state_spec state(cache_shape const& s) const {
    state_spec r;
    r.prompt_floats = layout(s).floats();
    return r;
  }
  void check(cache_shape const& s) const {
    rotation.check(s);
    std::string const most = std::to_string(most_tokens);
    KVKEEP_EXPECTS(ahead >= 1 && ahead <= most_tokens, "ahead", ahead, ">= 1 and <= " + most);
    KVKEEP_EXPECTS(sinks >= 0 && sinks <= most_tokens, "sinks", sinks, ">= 0 and <= " + most);
    KVKEEP_EXPECTS(epsilon >= 0 && epsilon <= 1, "epsilon", epsilon, "0..1");
    KVKEEP_EXPECTS(!covariance || product(s.n_q_heads, s.dim_k, s.dim_k + 1) < std::size_t{1} << 31,
                   "shape.dim_k", s.dim_k, "less, for a covariance per query head");
  }
  std::uint64_t key() const {
    return config_key(rotation.theta, rotation.dims, rotation.interleaved,
                      rotation.frequencies != nullptr, rotated, ahead, sinks, covariance,
                      value_norms, epsilon);
  }

  template <class Ctx>
  status observe_prompt(Ctx& ctx, score_input<space_of<Ctx>> const& in,
                        query_rows<space_of<Ctx>> const& rows, workspace& ws) const {
    using space = space_of<Ctx>;
    cache_shape const& s = in.layer.kv.shape;
    detail::rope_pairs const pairs(rotation, s.dim_k);
    index_t const n = rows.q.extent[2], turned = rotated ? pairs.pairs() : 0;
    std::size_t const turns = product(in.batch.n, n, turned);
    if (turns >= std::size_t{1} << 31) return status::unsupported;
    workspace::frame const frame(ws);
    op::query_moments<space> o{in.batch, rows, sinks, layout(s), pairs, {}, in.gathered};
    if (turned > 0) {
      float* const table = ws.take<float>(2 * turns);
      if (!ws.ok()) return status::workspace_too_small;
      o.turns = row_major<space>(static_cast<float const*>(table), in.batch.n, n, 2, turned);
      if (!ws.measuring())
        KVKEEP_TRY(detail::run_each(ctx, static_cast<index_t>(turns),
                                    detail::row_turns<space>{pairs, rows.position, table}, ws));
    }
    return run(ctx, o, ws);
  }
  template <class Ctx>
  status score(Ctx& ctx, score_input<space_of<Ctx>> const& in, score_map<space_of<Ctx>> out,
               workspace& ws) const {
    using space = space_of<Ctx>;
    workspace::frame const frame(ws);
    detail::softmax_rows<space> rows{in.layer.slots, in.batch, {}};
    KVKEEP_TRY(logits(ctx, in, rows.logits, ws));
    index_t const entries = in.batch.n, heads = rows.heads();
    rows.parts = ws.take<float>(product(entries, heads, rows.n_parts(), 2));
    rows.totals = ws.take<float>(product(entries, heads, 2));
    if (value_norms)
      KVKEEP_TRY(run(
          ctx,
          op::score_slots<value_norm_fn, space>{in.batch, in.layer, {}, in.seen, 0, {}, out, false},
          ws));
    if (ws.measuring()) return status::ok;
    if (!ws.ok()) return status::workspace_too_small;
    index_t const kv_heads = in.layer.kv.shape.n_kv_heads, slots = rows.logits.extent[2];
    KVKEEP_TRY(detail::run_each(ctx, entries * heads * rows.n_parts(),
                                detail::sum_parts<space>{rows}, ws));
    KVKEEP_TRY(detail::run_each(ctx, entries * heads, detail::sum_totals<space>{rows}, ws));
    return detail::run_each(ctx, entries * kv_heads * slots,
                            detail::expected_share<space>{rows, out, sinks, epsilon, value_norms},
                            ws);
  }

 private:
  moment_layout layout(cache_shape const& s) const { return {s.group(), s.dim_k, covariance}; }

  /// `[entry, q_head, slot]` in scratch.
  template <class Ctx>
  status logits(Ctx& ctx, score_input<space_of<Ctx>> const& in,
                tensor_ref<float, 3, space_of<Ctx>>& out, workspace& ws) const {
    using space = space_of<Ctx>;
    cache_shape const& s = in.layer.kv.shape;
    index_t const n = in.batch.n, heads = s.n_q_heads, columns = covariance ? 1 + s.dim_k : 1;
    std::size_t const numbers = product(n, heads, s.max_slots),
                      size = product(n, heads, s.dim_k, columns);
    if (std::max(numbers, size) >= std::size_t{1} << 31) return status::unsupported;
    out = row_major<space>(ws.take<float>(numbers), n, heads, s.max_slots);
    workspace::frame const frame(ws);
    detail::rope_pairs const pairs(rotation, s.dim_k);
    float* const turns = ws.take<float>(product(n, pairs.pairs(), 2));
    auto const form = row_major<space>(ws.take<float>(size), n, heads, s.dim_k, columns);
    if (!ws.measuring()) {
      if (!ws.ok()) return status::workspace_too_small;
      KVKEEP_TRY(detail::run_each(ctx, n * pairs.pairs(),
                                  detail::mean_turns<space>{pairs, in.batch, in.seen, ahead, turns},
                                  ws));
      detail::fill_form<space> const fill{form,    layout(s), in.batch, in.gathered,
                                          in.seen, pairs,     turns,    in.layer.kv.scale};
      KVKEEP_TRY(detail::run_each(ctx, static_cast<index_t>(size), fill, ws));
    }
    return run(ctx, op::quadratic_logits<space>{in.batch, in.layer, sinks, covariance, form, out},
               ws);
  }
};

}  // namespace kvkeep
