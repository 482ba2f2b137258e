// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// A session: the state of one cache under a prompt policy and a decode policy.
#pragma once

#include <memory>
#include <utility>
#include <vector>

#include "../budget/inherit.hpp"
#include "../op/attend.hpp"
#include "../op/reduce.hpp"
#include "detail/tables.hpp"
#include "detail/token_rows.hpp"
#include "slots.hpp"
#include "steps.hpp"

namespace kvkeep {

/// Made by `bind_session`. After that: no allocation, no exception; every call returns a status, and a call that
/// is not `ok` has changed nothing. Per sequence and layer the calls are, in order:
///
/// - prompt: `observe` (once per chunk, keys and values already written), then `end_prompt`;
/// - decoding: `decode`, or `append`, write K and V into the slot, `attend` (or own attention and `observe`), and
///   when all layers are through, `confirm`.
///
/// Threads: calls of one session do not overlap, except calls for different layers with
/// `limits::concurrent_layers`; begin, fork, end, confirm, rollback, choose, commit are exclusive.
/// State is indexed by sequence id. All arrays passed in lie in the backend's memory space; id lists lie
/// on the host.
template <backend Ctx, class Prompt, class Decode = Prompt>
class session {
 public:
  using space = space_of<Ctx>;
  using plan_type = plan<space>;
  static_assert(std::is_same_v<space, host_space>,
                "a session reads lengths and budgets on the host: its state must be host memory");

  // -- life cycle ---------------------------------------------------------------------------------
  /// Starts a sequence; `id` is set on success. Clears its state.
  status begin(index_t& id, sequence_options const& o = {}) noexcept;
  /// Starts a sequence as a copy of `from`: all state, not K and V, which the engine copies (it may share what both
  /// have frozen). Not while the prompt's layers are being cut together. At most all tokens of `from` are frozen.
  KVKEEP_COLD status fork(index_t from, index_t& id, sequence_options const& o = {}) noexcept;
  /// Frees a sequence's state.
  status end(index_t id) noexcept;

  // -- prompt -------------------------------------------------------------------------------------
  /// A chunk of the prompt in one layer: `q.n_tokens()` new tokens whose keys and values have been written
  /// at the tail of the cache (or of `prompt`, a transient one-row view that holds the whole prompt). `row` is the
  /// sequence row there (-1: the id, of a transient prompt 0).
  status observe(index_t layer, index_t id, queries const& q, kv_ref<space> const* prompt = nullptr,
                 index_t row = -1) noexcept;
  /// Own scores for the slots in use, `[1, kv_head, slot]` (engine_score).
  status observe(index_t layer, index_t id, own_scores const& s) noexcept;
  /// The first cut of a layer, in place or from `prompt` into row `id` of the cache. Layers end in ascending order.
  /// @return bad_order also where a scorer of the last W queries lacks some: the newest chunks shall show them all
  status end_prompt(index_t layer, index_t id, kv_ref<space> const* prompt = nullptr,
                    index_t row = -1) noexcept;
  /// The first cut of all layers, in place.
  status end_prompt(index_t id) noexcept;
  /// Layers that `end_prompt(layer, ...)` decides: earlier ones too where budgets couple layers.
  layer_range due(index_t layer) const noexcept;

  // -- decoding -----------------------------------------------------------------------------------
  /// A slot per sequence and KV head for the next token; `slots` `[entry, kv_head]`, backend memory.
  status append(index_t layer, batch const& b, index_t* slots = nullptr) noexcept;
  /// The same, and writes the token's keys and values there: any element type, rounded to the cache's (opaque rows from
  /// opaque ones), any layout. Bytes: the rows, read and written.
  /// @return unsupported if the types do not fit or the layer is skipped
  status append(index_t layer, batch const& b, token_kv const& kv,
                index_t* slots = nullptr) noexcept;
  /// Both in one call: append, then attend (limits.decode = attend). Unsupported for skipped layers.
  status decode(index_t layer, batch const& b, token_io const& t) noexcept;
  /// The engine has allocated: one token at the tail in every layer. `slot_mapping[entry]` is the pool row
  /// `block * block_size + offset` (null: not checked).
  status append_at(batch const& b, std::int64_t const* slot_mapping = nullptr) noexcept;
  /// Attention of the newest token over all slots in use, with evidence and the next decision.
  /// `q` has one row per entry; `out` is `[entry, q_head, dim_v]` fp32, `lse` `[entry, q_head]` or null.
  status attend(index_t layer, batch const& b, queries const& q, float* out,
                float* lse = nullptr) noexcept;
  /// The engine has attended itself: the newest token's queries (K is read once more; unsupported where a policy
  /// decides before attention, MorphKV's include_current and per_head_mask: call attend) ...
  status observe(index_t layer, batch const& b, queries const& q) noexcept;
  /// ... or its attention probabilities ...
  status observe(index_t layer, batch const& b, attention_rows const& a) noexcept;
  /// ... or own scores of all slots in use.
  status observe(index_t layer, batch const& b, own_scores const& s) noexcept;
  /// Accepts the `n` oldest unconfirmed tokens; evicts once no token is left unconfirmed.
  status confirm(batch const& b, index_t n) noexcept;
  /// Of each entry's drafts accepts the oldest `accepted[entry]` and drops the others (limits::max_draft), as a device
  /// session does: none is left unconfirmed, and all evict.
  status confirm(batch const& b, std::span<index_t const> accepted) noexcept;
  /// Drops the `n` newest unconfirmed tokens.
  status rollback(batch const& b, index_t n) noexcept;

  // -- engines that move tokens themselves --------------------------------------------------------
  /// Whether some head of the batch is over its budget (limits::engine_commits).
  bool due(batch const& b) const noexcept;
  /// Decides for all layers and moves nothing. The plan lives in the session until the next choose.
  status choose(batch const& b, plan_type& out) noexcept;
  /// Applies a plan of the current generation in place.
  status commit(plan_type const& p) noexcept;
  /// Lengths, freed blocks and block tables of one sequence after a commit (see plan.hpp). `row` is its
  /// sequence row in the views (-1: the id).
  KVKEEP_COLD status report(index_t id, report_buffer const& out, index_t row = -1) noexcept;

  // -- reading ------------------------------------------------------------------------------------
  /// Slots in use, `[id, kv_head]`, backend memory; valid until the session ends.
  tensor_ref<index_t const, 2, space> lengths(index_t layer) const noexcept;
  /// Original positions, `[id, kv_head, slot]`.
  tensor_ref<index_t const, 3, space> positions(index_t layer) const noexcept;
  /// Free slot inside the slots in use (the next append takes it), `[id, kv_head]`, -1: none.
  tensor_ref<index_t const, 2, space> free_slots(index_t layer) const noexcept;
  /// Tokens seen by a sequence and confirmed; the next token's position while nothing is unconfirmed. 0: no such one.
  index_t tokens(index_t id) const noexcept { return alive(id) ? shared_.confirmed[id] : 0; }
  /// Most slots per head that this session may need, besides prompts that are written into the cache itself, frozen
  /// tokens beyond a budget and tokens that nothing evicts (the free function counts prompts, and needs no session).
  index_t slots_needed() const noexcept { return slots_needed_; }
  /// Checks every live sequence: budgets, protected tokens, positions, state. Host-readable memory only.
  KVKEEP_COLD status verify() const noexcept;
  counters count() const noexcept;

  // -- saved state (K and V are the engine's to save) ---------------------------------------------
  KVKEEP_COLD std::size_t saved_bytes() const noexcept;
  /// Not in the middle of a prompt that passes through a buffer or whose layers are being cut together, nor before a
  /// report.
  KVKEEP_COLD status save(index_t id, std::span<std::byte> out) const noexcept;
  /// Restores into a sequence that was begun. Refuses another version, configuration or byte order, and damage.
  KVKEEP_COLD status load(index_t id, std::span<std::byte const> in) noexcept;

  /// Bytes of memory that `bind_session` needs.
  std::size_t bytes() const noexcept { return state_bytes_ + scratch_bytes_ * scratch_count(); }

  session(session&&) noexcept = default;
  session& operator=(session&&) noexcept = default;

 private:
  template <backend C, policy_on<C> P, policy_on<C> D>
  friend session<C, P, D> bind_session(C&, P const&, D const&,
                                       std::span<layer_spec<space_of<C>> const>, limits const&,
                                       std::span<std::byte>);
  template <backend C, policy_on<C> P, policy_on<C> D>
  friend std::size_t session_bytes(C&, P const&, D const&, std::span<layer_spec<space_of<C>> const>,
                                   limits const&);

  using layer_data = detail::layer_state<space>;
  using source = detail::cache_source<space>;

  KVKEEP_COLD session(Ctx& ctx, Prompt const& p, Decode const& d,
                      std::span<layer_spec<space> const> layers, limits const& lim);

  /// A batch as two lists in scratch.
  struct entries {
    index_t n = 0;
    index_t* ids = nullptr;
    index_t* rows = nullptr;
  };
  /// Sequences that are due: from each of the first `single` one token leaves.
  struct due_entries : entries {
    index_t single = 0;
  };
  /// Scores of a batch, and what a decision keeps by them.
  struct ranking {
    tensor_ref<float const, 3, space> scores;
    guard_ref<space> guard;
    tensor_ref<index_t, 2, space> keep{};  ///< [id, kv_head]
  };

  // set-up (setup.hpp)
  KVKEEP_COLD void check_setup(std::span<layer_spec<space> const> layers) const;
  KVKEEP_COLD void plan_state();
  KVKEEP_COLD void carve(workspace& w);
  KVKEEP_COLD void measure();
  KVKEEP_COLD void place(std::span<std::byte> memory);
  std::size_t scratch_count() const noexcept {
    return limits_.concurrent_layers ? layers_.size() : 1;
  }
  workspace scratch(index_t number = 0) const noexcept;
  void note_scratch(layer_data& l, workspace const& w) const noexcept;

  // shared by both phases (common.hpp)
  bool alive(index_t id) const noexcept;
  status check_batch(batch const& b) const noexcept;
  entries list(batch const& b, workspace& w) const noexcept;
  status check_blocks(layer_data const& l, index_t row, index_t id, index_t more) const noexcept;
  index_t managed(index_t layer) const noexcept;
  template <class F>
  status each(index_t n, F const& f, workspace& w) const noexcept;
  source pool(layer_data const& l, index_t const* ids, index_t const* rows,
              index_t n) const noexcept;
  source transient(layer_data const& l, index_t id, kv_ref<space> const& prompt,
                   index_t const* zero, index_t const* row) const noexcept;
  score_input<space> input(layer_data const& l, source const& s, bool prompt,
                           index_t const* newest) const noexcept;
  guard_ref<space> guard_of(bool prompt, index_t id0) const noexcept;
  void next_generation(index_t id) const noexcept;

  // prompt_evidence.hpp, prompt_cut.hpp
  status take_staging(layer_data const& l, index_t id, index_t p0) noexcept;
  status keep_scores(layer_data const& l, source const& s, score_map<space> m,
                     workspace& w) noexcept;
  bool cuts_at_prompt(layer_data const& l, source const& s) const noexcept;
  status push_ring(layer_data& l, index_t id, queries const& q, index_t entry, index_t first,
                   workspace& w) noexcept;
  status feed_scorers(layer_data& l, source const& s, queries const& q, index_t p0,
                      workspace& w) noexcept;
  status score_prompt(layer_data& l, source const& s, score_map<space> out, workspace& w) noexcept;
  status decide_prompt(layer_data& l, index_t id, source const& from, source const& to,
                       workspace& w) noexcept;
  status cut_prompt(layer_data& l, source const& from, source const& to,
                    tensor_ref<float const, 3, space> scores, workspace& w) noexcept;
  KVKEEP_COLD status decide_sequence_prompt(source const& at, workspace& w) noexcept;
  KVKEEP_COLD status join_layers(layer_data& l, source const& to, score_map<space> scores,
                                 workspace& w) noexcept;
  KVKEEP_COLD status cut_earlier(layer_data const& l, index_t id, source const& to, index_t tokens,
                                 workspace& w) noexcept;
  status settle(layer_data& l, source const& to, workspace& w) noexcept;
  status hand_over(layer_data& l, source const& to, workspace& w) noexcept;
  status fix_decode_budget(layer_data& l, index_t id, index_t tokens, workspace& w) noexcept;

  // decode_slots.hpp, decode_evidence.hpp, decide.hpp
  status check_append(layer_data const& l, batch const& b) const noexcept;
  status take_slots(layer_data& l, batch const& b, index_t* slots, workspace& w) noexcept;
  status check_rows(index_t layer, batch const& b, token_kv const& kv) const noexcept;
  status store_rows(index_t m, batch const& b, token_kv const& kv, index_t* slots) noexcept;
  index_t pending(index_t id) const noexcept;
  status drop(index_t id, index_t n, workspace& w) noexcept;
  status check_token(layer_data const& l, batch const& b) const noexcept;
  status show_token(index_t m, batch const& b, queries const& q, float* out, float* lse) noexcept;
  bool wants_weights(layer_data const& l, entries const& e) const noexcept;
  status weigh(layer_data& l, batch const& b, queries const& q, float* out, float* lse,
               workspace& w) noexcept;
  status token_done(layer_data& l, entries const& e, workspace& w) noexcept;
  status settle_tokens(entries const& e, index_t confirmed, workspace& w) noexcept;
  status after_token(layer_data& l, index_t const* ids, index_t const* rows, index_t n,
                     workspace& w) noexcept;
  status fold(layer_data& l, index_t const* ids, index_t const* rows, index_t n, index_t draft,
              workspace& w) noexcept;
  status decide(layer_data& l, index_t const* ids, index_t const* rows, index_t n, index_t extra,
                workspace& w) noexcept;
  KVKEEP_COLD status decide_sequences(index_t const* ids, index_t const* rows, index_t n,
                                      workspace& w) noexcept;
  status newest_input(layer_data const& l, source const& s, score_input<space>& in,
                      workspace& w) const noexcept;
  status score_tokens(layer_data& l, source const& s, index_t extra, score_map<space> out,
                      workspace& w) noexcept;
  status resolve_keep(layer_data const& l, source const& s, index_t extra,
                      tensor_ref<index_t, 2, space>& keep, workspace& w) const noexcept;
  status take_victims(layer_data& l, source const& s, workspace& w) noexcept;
  status evict_single(layer_data& l, source const& s, ranking const& by, workspace& w) noexcept;
  status evict_several(layer_data& l, source const& s, ranking const& by, workspace& w) noexcept;
  status apply(layer_data& l, source const& s, tensor_ref<float const, 3, space> scores,
               index_t extra, workspace& w) noexcept;
  status add_layer(layer_data const& l, bool comparable, op::mean_layers<space> const& m,
                   workspace& w) const noexcept;
  KVKEEP_COLD status score_layers(batch_ref<space> const& b, score_map<space> scores,
                                  workspace& w) noexcept;
  KVKEEP_COLD status attend_special(layer_data& l, source const& s, op::attend<space>& a,
                                    workspace& w) noexcept;
  due_entries list_due(layer_data const& l, index_t const* ids, index_t const* rows, index_t n,
                       index_t extra, workspace& w) const noexcept;
  bool one_leaves(layer_data const& l, index_t id, index_t extra) const noexcept;
  index_t excess(layer_data const& l, index_t id, index_t extra) const noexcept;
  KVKEEP_COLD status let_go(layer_data& l, source const& s, score_map<space> scores,
                            workspace& w) noexcept;
  KVKEEP_COLD status mask_heads(layer_data& l, source const& s, tensor_ref<float, 3, space> own,
                                tensor_ref<std::uint8_t, 3, space> visible, workspace& w) noexcept;

  // inspect.hpp, moving.hpp
  KVKEEP_COLD status verify_head(layer_data const& l, index_t id, index_t h,
                                 index_t* sorted) const noexcept;
  KVKEEP_COLD status choose_layers(index_t n, workspace& w) noexcept;
  void note_victims(layer_data& l, batch_ref<space> const& b) noexcept;
  status room_for_plan(layer_data const& l, keep_plan<space> const& plan,
                       batch_ref<space> const& to) const noexcept;
  void note_cut(layer_data& l, source const& from, keep_plan<space> const& plan) noexcept;
  status record_blocks(layer_data const& l, batch_ref<space> const& b, keep_plan<space> const& plan,
                       workspace& w) noexcept;

  Ctx* ctx_ = nullptr;
  Prompt prompt_{};
  Decode decode_{};
  bool one_policy_ = false;
  bool attention_folds_ = false;  ///< attention does the decode scorer's fold
  limits limits_{};
  detail::state_shape shape_{};
  index_t n_all_layers_ = 0, slots_needed_ = 0;
  std::vector<index_t> number_of_;  ///< [layer] managed number, or -1
  std::vector<layer_data> layers_;  ///< managed layers
  detail::shared_state<space> shared_{};
  detail::plan_memory<space> plan_{};
  std::size_t state_bytes_ = 0, scratch_bytes_ = 0;
  std::byte* scratch_ = nullptr;
  std::unique_ptr<std::byte[]> owned_;
};

}  // namespace kvkeep

#include "detail/setup.hpp"
