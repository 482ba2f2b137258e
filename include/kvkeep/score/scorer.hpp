// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// What a scorer is: it ranks the slots of one layer, per sequence and KV head; higher is kept.
#pragma once

#include <algorithm>
#include <concepts>
#include <cstdint>
#include <string_view>
#include <type_traits>

#include "../op/accumulate.hpp"
#include "../op/score_slots.hpp"
#include "../op/window_score.hpp"
#include "../view/evidence.hpp"

namespace kvkeep {

/// Bound of capacities, windows and the like: sums and products of two stay in range.
inline constexpr index_t most_tokens = 1 << 28;

/// What a scorer can do and what it needs.
struct scorer_traits {
  char const* name = "";
  bool at_prompt = true;  ///< can score at the end of the prompt
  bool at_decode = true;  ///< can score after every token
  evidence prompt = evidence::none;
  evidence decode = evidence::none;
  bool whole_layer = false;     ///< one kept set for all KV heads of a layer (TOVA)
  bool comparable = true;       ///< scores of different heads and layers have one scale
  bool chunk_invariant = true;  ///< any chunking of the prompt gives the same set
  bool prefix_safe = true;      ///< may start behind a shared, frozen prefix
  bool draft_safe = true;       ///< evidence of drafts is staged
  bool direct = false;          ///< has `score_direct`: may decide before a token's own attention
  bool finds_victims = false;   ///< has `victims`: finds the one that leaves without scores of all
  index_t victims_recent = 0;   ///< ... which protects so many recent tokens, and no others
  bool gives_spread = false;    ///< of a prompt: fills `score_input::spread`
};

/// Memory that a scorer asks the session for.
struct state_spec {
  index_t slot_rows = 0;    ///< floats per slot, moving with the slots
  index_t query_ring = 0;   ///< most recent queries kept per sequence and layer
  index_t weight_ring = 0;  ///< most recent tokens whose attention weights are kept per slot
  /// `attention_fold` does all that `fold` does: the ring serves drafts and rows of the engine alone.
  bool folds_weights = false;
  bool ring_at_decode =
      false;                ///< decoded tokens' queries enter the ring too, not only the prompt's
  index_t loose_rows = 0;   ///< floats per slot that a new token need not find cleared
  index_t head_floats = 0;  ///< floats per sequence and KV head
  /// Floats per sequence and KV head until its prompt has ended, for a prompt's scorer. What lies there before position
  /// 0 was observed says nothing.
  index_t prompt_floats = 0;
};

/// Everything that a scorer may look at in one call. All `[id, ...]` arrays are indexed by
/// `batch.id_of(entry)`.
template <class Space = host_space>
struct score_input {
  using space = Space;
  batch_ref<Space> batch{};
  layer_ref<Space> layer{};  ///< the cache that is scored, with its slot state
  guard_ref<Space> guard{};
  index_t const* seen = nullptr;       ///< [id] tokens seen (and confirmed)
  tensor_ref<float, 4, Space> rows{};  ///< [id, kv_head, row, slot] this scorer's slot rows

  tensor_ref<float const, 4, Space> ring_q{};    ///< [id, q_head, ring row, dim_k]
  tensor_ref<float const, 3, Space> ring_lse{};  ///< [id, q_head, ring row], natural
  index_t const* ring_from = nullptr;            ///< [id] oldest position in the query ring
  index_t query_ring = 0;    ///< rows of the query ring; position p is row p % ring
  bool rings_tokens = true;  ///< decoded tokens are there too: state_spec::ring_at_decode
  bool has_lse = false;

  tensor_ref<float, 4, Space> weights{};     ///< [id, kv_head, g, slot] of weight ring row 0
  tensor_ref<float, 4, Space> weight_sum{};  ///< [id, kv_head, g, ring row]
  tensor_ref<float, 4, Space> weight_max{};  ///< [id, kv_head, g, ring row] of their logits
  offset_t weight_stride = 0;                ///< elements between ring rows of `weights`
  index_t weight_ring = 0;  ///< rows of the weight ring; position p is row p % ring
  /// [entry] weight ring row of the newest token; null: a prompt ends
  index_t const* newest_row = nullptr;
  tensor_ref<index_t const, 2, Space> fresh{};  ///< [id, kv_head] slot of the newest token

  tensor_ref<float, 4, Space> loose{};     ///< [id, kv_head, row, slot] state_spec::loose_rows
  tensor_ref<float, 3, Space> head{};      ///< [id, kv_head, i] state_spec::head_floats
  tensor_ref<float, 3, Space> gathered{};  ///< [id, kv_head, i] state_spec::prompt_floats
  /// [entry, kv_head, 2] out, where a budget needs it (else null): entropies, and variances over rows, of the attention
  /// weights of the last queries, both summed over the columns that are older and over the group.
  tensor_ref<float, 3, Space> spread{};
};

/// No-op defaults of the optional steps; scorers derive from it.
struct scorer_base {
  void check(cache_shape const&) const {}
  state_spec state(cache_shape const&) const { return {}; }
  std::uint64_t key() const { return 0; }
  /// Heads with fewer tokens are never cut.
  index_t least_tokens() const { return 0; }
  /// A chunk of prompt queries (fp32, positions set). Called in order; the keys are written.
  template <class Ctx>
  status observe_prompt(Ctx&, score_input<space_of<Ctx>> const&, query_rows<space_of<Ctx>> const&,
                        workspace&) const {
    return status::ok;
  }
  /// After the slots that remain of a prompt were decided and moved.
  template <class Ctx>
  status settle(Ctx&, score_input<space_of<Ctx>> const&, workspace&) const {
    return status::ok;
  }
  /// What attention itself folds of a token that needs no confirmation, instead of a call of `fold`.
  template <class Space>
  weight_fold<Space> attention_fold(score_input<Space> const&) const {
    return {};
  }
  /// After the attention of one confirmed token.
  template <class Ctx>
  status fold(Ctx&, score_input<space_of<Ctx>> const&, workspace&) const {
    return status::ok;
  }
};

/// One victim per sequence and KV head, where a head has more slots in use than `keep` `[id, kv_head]`. Called
/// after `fold`, with the newest token's row, when something is due: not for every token.
template <class S, class Ctx>
concept finds_victims = requires(S const& s, Ctx& c, score_input<space_of<Ctx>> const& in,
                                 tensor_ref<index_t const, 2, space_of<Ctx>> keep,
                                 tensor_ref<index_t, 2, space_of<Ctx>> victim, workspace& w) {
  { s.victims(c, in, keep, victim, w) } -> std::same_as<status>;
};

/// Takes any ops.
struct any_ops {
  template <class... Ops>
  status operator()(Ops const&...) const {
    return status::ok;
  }
};
/// Optional: the ops that `fold` (where attention does not do it) and `score` run for a decoded token, handed to
/// `run(ops...)`. Each is independent per entry and KV head (op::head_chain), so that a backend may run them
/// in one go with what comes before and after.
template <class S, class Space>
concept hands_out_scores = requires(S const& s, score_input<Space> const& in, score_map<Space> out,
                                    any_ops run) {
  { s.score_ops(in, out, run) } -> std::same_as<status>;
};
/// The same of `fold` and `victims`, for a scorer that finds victims.
template <class S, class Space>
concept hands_out_victims = requires(S const& s, score_input<Space> const& in,
                                     tensor_ref<index_t const, 2, Space> keep,
                                     tensor_ref<index_t, 2, Space> victim, any_ops run) {
  { s.victim_ops(in, keep, victim, run) } -> std::same_as<status>;
};

/// The narrow waist: `score` fills a float per slot in use, `[entry, kv_head, slot]`.
template <class S, class Ctx>
concept scorer = requires(S const& s, Ctx& c, score_input<space_of<Ctx>> const& in,
                          query_rows<space_of<Ctx>> const& rows, cache_shape const& shape,
                          score_map<space_of<Ctx>> out, workspace& w) {
  { s.traits() } -> std::same_as<scorer_traits>;
  { s.state(shape) } -> std::same_as<state_spec>;
  { s.key() } -> std::same_as<std::uint64_t>;
  { s.least_tokens() } -> std::same_as<index_t>;
  s.check(shape);
  { s.observe_prompt(c, in, rows, w) } -> std::same_as<status>;
  { s.settle(c, in, w) } -> std::same_as<status>;
  { s.fold(c, in, w) } -> std::same_as<status>;
  { s.attention_fold(in) } -> std::same_as<weight_fold<space_of<Ctx>>>;
  { s.score(c, in, out, w) } -> std::same_as<status>;
};

/// FNV-1a over the bytes of configuration values: the identity that saved state carries.
template <class... T>
std::uint64_t config_key(T const&... values) noexcept {
  std::uint64_t h = 14695981039346656037ULL;
  auto const mix = [&h](auto const& v) {
    auto const* p = reinterpret_cast<unsigned char const*>(&v);
    for (std::size_t i = 0; i < sizeof v; ++i) h = (h ^ p[i]) * 1099511628211ULL;
  };
  (mix(values), ...);
  return h;
}
/// The same of a name: scorers without options of their own have the same key.
inline std::uint64_t name_key(std::string_view name) noexcept {
  std::uint64_t h = 0;
  for (char const c : name) h = config_key(h, c);
  return h;
}

namespace detail {

/// fn(i) for i in [0, n), on the backend.
template <class Ctx, class Fn>
status run_each(Ctx& ctx, index_t n, Fn const& fn, workspace& ws) {
  return run(ctx, op::for_each<Fn, space_of<Ctx>>{n, fn}, ws);
}

}  // namespace detail
using detail::run_each;  // for scorers and budgets of one's own, as fill_layer is

namespace detail {

/// Copies ring rows of the last queries into a dense block, oldest first. An index is a stretch of a row: on the host
/// a whole one, elsewhere so little that neighbours read neighbours.
template <class Space>
struct gather_queries {
  static constexpr index_t width(index_t dim) {
    return std::is_same_v<Space, host_space> ? dim : std::min(dim, index_t{4});
  }

  tensor_ref<float const, 4, Space> ring_q{};
  tensor_ref<float const, 3, Space> ring_lse{};
  float* q;
  float* lse;
  index_t* position;
  index_t const* seen;
  index_t const* from;
  index_t const* id;
  index_t ring, n_rows, heads, dim, each;

  /// Stretches of a row.
  KVKEEP_HD index_t parts() const noexcept { return (dim + each - 1) / each; }
  KVKEEP_HD void operator()(index_t index) const noexcept {
    index_t const first = index % parts() * each, i = index / parts();
    index_t const row = i % n_rows;
    index_t const head = i / n_rows % heads;
    index_t const entry = i / n_rows / heads;
    index_t const s = id ? id[entry] : entry;
    index_t const p = seen[s] - n_rows + row;
    bool const present = p >= 0 && p >= from[s];
    if (head == 0 && first == 0) position[entry * n_rows + row] = present ? p : -1;
    if (!present) return;
    if (lse && first == 0) lse[i] = ring_lse(s, head, p % ring);
    float const* src = ring_q.at(s, head, p % ring);
    float* dst = q + static_cast<offset_t>(i) * dim;
    index_t const end = first + each < dim ? first + each : dim;
    for (index_t d = first; d < end; ++d) dst[d] = src[d];
  }
};

}  // namespace detail

/// The last `n` confirmed queries of every entry as dense rows (absent ones marked), in scratch.
/// @return unsupported for decoded tokens whose queries the scorer has not asked for (state_spec::ring_at_decode)
template <class Ctx>
status last_queries(Ctx& ctx, score_input<space_of<Ctx>> const& in, index_t n,
                    query_rows<space_of<Ctx>>& out, workspace& ws) {
  using space = space_of<Ctx>;
  if (in.newest_row != nullptr && !in.rings_tokens) return status::unsupported;
  auto const& shape = in.layer.kv.shape;
  std::size_t const rows = product(in.batch.n, shape.n_q_heads, n);
  float* q = ws.take<float>(product(rows, shape.dim_k));
  float* lse = in.has_lse ? ws.take<float>(rows) : nullptr;
  index_t* position = ws.take<index_t>(product(in.batch.n, n));
  out.q =
      row_major<space>(static_cast<float const*>(q), in.batch.n, shape.n_q_heads, n, shape.dim_k);
  out.position = row_major<space>(static_cast<index_t const*>(position), in.batch.n, n);
  out.lse = row_major<space>(static_cast<float const*>(lse), in.batch.n, shape.n_q_heads, n);
  out.by_id = false;
  if (ws.measuring()) return status::ok;
  if (!ws.ok()) return status::workspace_too_small;
  using gather = detail::gather_queries<space>;
  index_t const each = gather::width(shape.dim_k);
  gather const fn{in.ring_q,       in.ring_lse,  q,           lse,           position,
                  in.seen,         in.ring_from, in.batch.id, in.query_ring, n,
                  shape.n_q_heads, shape.dim_k,  each};
  return detail::run_each(ctx, static_cast<index_t>(rows) * fn.parts(), fn, ws);
}

/// Folds the newest token's weights where attention has not done it (`attention_fold`).
template <class Ctx>
status fold_weights(Ctx& ctx, score_input<space_of<Ctx>> const& in,
                    weight_fold<space_of<Ctx>> const& fold, workspace& ws) {
  return run(ctx,
             op::accumulate<space_of<Ctx>>{in.batch, in.layer.slots, in.weights, in.weight_sum,
                                           in.newest_row, in.weight_stride, fold},
             ws);
}

}  // namespace kvkeep
