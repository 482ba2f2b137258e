// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// A session whose state the host never reads, for backends with memory and a stream of their own.
#pragma once

#include <string>
#include <vector>

#include "../budget/inherit.hpp"
#include "../op/attend.hpp"
#include "../op/reduce.hpp"
#include "detail/device_core.hpp"
#include "detail/device_rows.hpp"
#include "detail/device_state_steps.hpp"
#include "detail/offers.hpp"
#include "detail/prompt_steps.hpp"
#include "slots.hpp"

namespace kvkeep {

/// Made by `bind_device_session`. The same policies and the same kept sets as `session`; what differs is who
/// knows: here lengths, positions, budgets and victims are read by the backend's ops alone. A call only
/// enqueues. While decoding it depends on nothing but the addresses and the size of the batch, so that a
/// step (append, write K and V, attend, for every layer; join, where decisions run aside) can be captured in a graph
/// and replayed.
///
/// - The host says how long prompts are; after their end only the backend counts. With `limits::max_prompt` a prompt's
///   keys and values stay in a view of its own, layer after layer, and survivors alone come into the cache.
/// - Batches of decode calls (`batch_ref`: rows and ids) lie in the backend's memory.
/// - A token is confirmed by its attention, or by what `observe` is told of it; with `limits::max_draft` by `confirm`.
/// - Where a sequence keeps one set, a token's last layer decides for all of them, in the session's own context.
/// - Slots that have been freed are written to: sequences share no pages but those of a frozen prefix.
/// - What only the backend can see goes wrong there: `faults`, a sticky word per sequence.
///
/// Without bursts one token leaves per step, by its slot being given to the next one. With bursts
/// (`evict_after` > 1), and where a decision comes before its token's attention (`cadence`), every step
/// launches the cut; heads that are not due take no part in it, and where one token leaves, one moves.
///
/// Attention need not wait for decisions: with `decide_in` they run in a second context, beside what the engine
/// enqueues next, and the first one waits for them in `join`, at the end of a step.
/// What can be read of its state (lengths, positions, faults ...) is in `detail::device_core`. Calls do not overlap.
template <backend Ctx, class Prompt, class Decode = Prompt>
class device_session : public detail::device_core<Ctx> {
  using core = detail::device_core<Ctx>;
  using core::ctx_, core::limits_, core::bound_, core::shape_, core::layers_, core::usual_slots_,
      core::sequences_, core::prompts_, core::prompt_owner_, core::shared_, core::plan_,
      core::layer_table_, core::numbers_, core::n_numbers_, core::newest_rows_, core::tickets_,
      core::row_tickets_, core::faults_, core::aside_, core::state_bytes_, core::scratch_bytes_,
      core::scratch_;
  using core::n_layers, core::is_last, core::alive, core::find_place, core::managed,
      core::prompt_of, core::one, core::pool, core::scratch, core::each, core::each_number,
      core::every, core::holding, core::n_kept, core::extend, core::mark, core::newest_rows_of,
      core::pushing, core::listing, core::settling, core::plan_of, core::take_scores,
      core::take_cut, core::in_prompt, core::staging_taken, core::one_leaves_, core::tracks_tables_;

 public:
  using space = space_of<Ctx>;
  using plan_type = plan<space>;

  // -- life cycle ---------------------------------------------------------------------------------
  /// Starts a sequence; `id` is set on success.
  status begin(index_t& id, sequence_options const& o = {}) noexcept;
  /// Starts a sequence as a copy of `from`: all state, faults too, not K and V (the engine copies those). Not while its
  /// prompt's layers are cut together or pass through a buffer. At most all tokens of `from` are frozen, while they lie
  /// in their first slots (device_fault::bad_prefix). Cost: three launches per layer (with a prefix six), its state.
  status fork(index_t from, index_t& id, sequence_options const& o = {}) noexcept;
  status end(index_t id) noexcept;

  // -- prompt -------------------------------------------------------------------------------------
  /// A chunk of the prompt in one layer, keys and values already written at the tail of the cache (or of `prompt`, a
  /// transient view in the backend's memory that holds the whole prompt, where there is limits.max_prompt). `row` is
  /// the sequence row in that view (-1: the id, or 0 of a transient one; below the cache's rows or
  /// limits.max_sequences). Unsupported: features that lie apart in that view and not in the cache.
  status observe(index_t layer, index_t id, queries const& q, kv_ref<space> const* prompt = nullptr,
                 index_t row = -1) noexcept;
  /// Own scores for the slots in use, `[1, kv_head, slot]` (engine_score), after the tokens; not of transient prompts.
  status observe(index_t layer, index_t id, own_scores const& s) noexcept;
  /// The first cut of a layer, in place, or from `prompt` into row `id` of the cache. Layers end in ascending order. A
  /// transient prompt may be overwritten by what the context is given next; where the cache has no room for what a head
  /// keeps, or no page, none of the layer's heads gets anything, and the sequence has a fault.
  status end_prompt(index_t layer, index_t id, kv_ref<space> const* prompt = nullptr,
                    index_t row = -1) noexcept;
  /// The first cut of all layers, in place.
  status end_prompt(index_t id) noexcept;
  /// Layers that `end_prompt(layer, ...)` decides: earlier ones too where budgets couple layers.
  layer_range due(index_t layer) const noexcept;

  // -- decoding -----------------------------------------------------------------------------------
  /// A slot per sequence and KV head for the next token, `slots` `[entry, kv_head]`; -1 where the
  /// sequence has a fault: nothing shall be written there.
  status append(index_t layer, batch_ref<space> const& b, index_t* slots) noexcept;
  /// The same, and writes the token's keys and values there, in the launch that finds the slots. `kv` lies in the
  /// backend's memory, in any element type (rounded to the cache's; opaque rows from opaque ones); `slots` may be null.
  /// @return unsupported, and nothing is enqueued, if the types do not fit, a layout is behind host functions, or the
  ///   layer is skipped
  status append(index_t layer, batch_ref<space> const& b, token_kv const& kv,
                index_t* slots = nullptr) noexcept;
  /// Both in one call: the token's queries are stored with its rows, so that attention is all that follows.
  /// On CUDA, for policies that make one launch of a decision and up to 4096 slots (1024 where its weights are folded
  /// or kept), that is two launches before it. Unsupported for skipped layers. A sequence with a fault has no output.
  /// @see append, attend
  status decode(index_t layer, batch_ref<space> const& b, token_io const& t) noexcept;
  /// Attention of the newest token over all slots in use, with evidence and the next decision.
  /// `q` has one row per entry; `out` is `[entry, q_head, dim_v]` fp32, `lse` `[entry, q_head]` or null.
  status attend(index_t layer, batch_ref<space> const& b, queries const& q, float* out,
                float* lse = nullptr) noexcept;
  /// The engine has attended itself: the newest token's queries (K is read once more), or, for policies that look at
  /// none, `tokens_only(1)`. Unsupported where a decision comes before attention.
  status observe(index_t layer, batch_ref<space> const& b, queries const& q) noexcept;
  /// The same with the attention probabilities it has exported (limits.decode = attention_rows): no key is read.
  status observe(index_t layer, batch_ref<space> const& b, attention_rows const& a) noexcept;
  /// The same with scores of its own for the slots in use (limits.decode = scores).
  status observe(index_t layer, batch_ref<space> const& b, own_scores const& s) noexcept;

  /// Of the tokens since the last call, up to limits::max_draft, accepts the oldest `accepted[entry]` (in the backend's
  /// memory), drops the others, and evicts in all layers. Until then nothing is evicted for them.
  status confirm(batch_ref<space> const& b, index_t const* accepted) noexcept;

  // -- engines that allocate and commit themselves ----------------------------------------------------
  /// One token at the tail of every layer, where the engine writes it. `slot_mapping` `[entry]` is the pool row
  /// `block * block_size + offset`, in the backend's memory (null: not checked). A sequence without such a slot in some
  /// layer gets none, and has a fault.
  status append_at(batch_ref<space> const& b, std::int64_t const* slot_mapping = nullptr) noexcept;
  /// Decides for all layers and moves nothing (limits::engine_commits). The plan lives in the session, in the backend's
  /// memory, until the next choose; all heads are scored, and those for which nothing is due keep all slots.
  status choose(batch_ref<space> const& b, plan_type& out) noexcept;
  /// Applies the last plan in place, by the rows that `choose` was given. A sequence that has had a token since, ended
  /// or begun anew is left alone: generations are compared in the backend (device_fault::stale_plan).
  /// @return stale_plan if this is not the session's last plan
  status commit(plan_type const& p) noexcept;
  /// Lengths, freed blocks, block tables and faults of one sequence after cuts (see plan.hpp). `row` is its sequence
  /// row in the views (-1: the id). The engine frees blocks and changes tables once this has been done; where whole
  /// blocks leave, before it appends.
  status report(index_t id, report_buffer const& out, index_t row = -1) noexcept;

  // -- decisions beside what follows them -----------------------------------------------------------
  /// From now on decisions run in `other` (on CUDA: a second stream, both contexts with a mark), each after its own
  /// token's attention; only that, and what it leaves in the state, stays in the session's context. The kept sets are
  /// the same. Decisions before attention, of drafts, of plans and of whole sequences stay there too. Set-up.
  /// On CUDA neither stream is the legacy default one, nor `other` one that waits for it; of a lower priority it stands
  /// in nobody's way.
  /// @param other   outlives the session
  /// @param memory  `aside_bytes(other)` bytes of the backend's memory
  /// @return workspace_too_small if there are fewer, bad_argument if a context has no mark; nothing changes then
  status decide_in(Ctx& other, std::span<std::byte> memory) noexcept requires orders<Ctx>;
  /// Bytes of memory that `decide_in` needs with this context.
  std::size_t aside_bytes(Ctx& other) noexcept;
  /// The session's context waits for all decisions so far: the end of every step. The session's own calls do so where
  /// they have to, but it sees neither that a capture begins or ends, nor that a graph is launched, nor who else reads
  /// the state, reads or writes keys and values, changes batches or block tables, or takes back memory. To wait for the
  /// session's context alone, on the host or in a stream, does not wait for decisions.
  status join() noexcept;

  // -- saved state, and proof -----------------------------------------------------------------------
  std::size_t saved_bytes() const noexcept;
  /// Writes a sequence's state, `saved_bytes`, to the backend's memory; not K and V, nor in the middle of a prompt. One
  /// saved before its prompt takes none when it is loaded.
  status save(index_t id, std::span<std::byte> out) noexcept;
  /// Restores it into a sequence that was begun. Another version or configuration is device_fault::bad_save.
  status load(index_t id, std::span<std::byte const> in) noexcept;
  /// Checks every live sequence, but for prompts: slots, positions, protected tokens, budgets. What cannot be is
  /// device_fault::corrupt. For tests: three launches per sequence and layer, slots squared comparisons per head.
  status verify() noexcept;

 private:
  template <backend C, policy_on<C> P, policy_on<C> D>
  friend device_session<C, P, D> bind_device_session(C&, P const&, D const&,
                                                     std::span<layer_spec<space_of<C>> const>,
                                                     limits const&, std::span<std::byte>);
  template <backend C, policy_on<C> P, policy_on<C> D>
  friend std::size_t device_session_bytes(C&, P const&, D const&,
                                          std::span<layer_spec<space_of<C>> const>, limits const&);

  using layer_data = detail::layer_state<space>;
  using source = detail::cache_source<space>;
  using host_state = detail::host_state;
  using prompt_state = detail::prompt_state;

  KVKEEP_COLD device_session(Ctx& ctx, Prompt const& p, Decode const& d,
                             std::span<layer_spec<space> const> layers, limits const& lim);
  KVKEEP_COLD void check_setup() const;
  KVKEEP_COLD index_t slots_while_decoding(layer_data const& l) const;
  KVKEEP_COLD void carve(workspace& w);
  KVKEEP_COLD void measure();
  KVKEEP_COLD void place(std::span<std::byte> memory);
  KVKEEP_COLD status fill(workspace& w) noexcept;

  using runner = detail::runner<Ctx>;
  guard_ref<space> guard_of(bool prompt, index_t id0) const noexcept;
  score_input<space> input(layer_data const& l, source const& s, bool prompt) const noexcept;

  // device_prompt.hpp
  status find_prompt(layer_data const& l, index_t id, kv_ref<space> const* prompt, index_t row,
                     index_t more, source& from) noexcept;
  status push_prompt(layer_data& l, index_t id, queries const& q, index_t p0,
                     workspace& w) noexcept;
  status feed_scorers(layer_data& l, source const& s, queries const& q, index_t p0,
                      workspace& w) noexcept;

  // device_prompt_cut.hpp
  status decide_prompt(layer_data& l, index_t id, source const& from, source const& to,
                       workspace& w) noexcept;
  status score_prompt(layer_data& l, index_t id, source const& s, score_map<space> out,
                      workspace& w) noexcept;
  status join_layers(layer_data& l, index_t id, source const& to, score_map<space> scores,
                     workspace& w) noexcept;
  status settle(layer_data& l, index_t id, source const& to, workspace& w) noexcept;
  status hand_over(layer_data& l, index_t id, source const& to, workspace& w) noexcept;
  status cut_once(layer_data& l, batch_ref<space> const& b, workspace& w) noexcept;
  status cut_prompt(layer_data& l, index_t id, source const& from, source const& to,
                    tensor_ref<float const, 3, space> scores, workspace& w) noexcept;
  status refuse_misfits(layer_data& l, source const& to, keep_plan<space> const& plan,
                        workspace& w) noexcept;
  status fix_budget(layer_data& l, index_t id, index_t tokens, workspace& w) noexcept;

  // device_append.hpp
  status append_rows(index_t layer, batch_ref<space> const& b, token_kv const& kv, queries const* q,
                     index_t* slots) noexcept;
  status give_slots(layer_data& l, batch_ref<space> const& b, token_kv const* kv, queries const* q,
                    index_t* slots, workspace& w) noexcept;

  // device_evidence.hpp
  using row_evidence = detail::row_evidence;
  status show_token(index_t layer, batch_ref<space> const& b, queries const& q, bool pushed,
                    float* out, float* lse) noexcept;
  status take_evidence(index_t layer, batch_ref<space> const& b, row_evidence const* e) noexcept;
  status decide_by_rows(layer_data& l, batch_ref<space> const& b, row_evidence const* e,
                        workspace& w) noexcept;
  status newest(layer_data const& l, batch_ref<space> const& b, score_input<space>& in,
                workspace& w, bool listed = false) const noexcept;

  // device_decode.hpp
  status weigh(layer_data& l, batch_ref<space> const& b, queries const& q, bool pushed, float* out,
               float* lse, workspace& w) noexcept;
  status decide(layer_data& l, score_input<space> const& in, detail::token_steps<space>& t,
                workspace& w) noexcept;
  status decide_by(runner const& by, layer_data& l, score_input<space> const& in,
                   detail::token_steps<space>& t) noexcept;
  status score_tokens(runner const& by, score_input<space> const& in,
                      score_map<space> out) noexcept;
  status evict(runner const& by, layer_data& l, score_input<space> const& in,
               detail::token_steps<space>& t) noexcept;
  detail::resolve_keep<space> resolving(layer_data const& l, batch_ref<space> const& b,
                                        index_t extra,
                                        tensor_ref<index_t, 2, space> const& keep) const noexcept;
  status list_cut(runner const& by, layer_data const& l, batch_ref<space> const& b, index_t extra,
                  detail::cut_memory<space> const& c) const noexcept;
  template <class... After>
  status apply_cut(runner const& by, layer_data& l, score_input<space> in,
                   detail::cut_memory<space> const& c, After const&... after) noexcept;
  template <class... After>
  status cut(runner const& by, layer_data& l, score_input<space> in,
             After const&... after) noexcept;

  // device_inspect.hpp
  detail::saved_header header() const noexcept;
  status verify_layer(layer_data const& l, index_t id, workspace& w) noexcept;

  // device_drafts.hpp
  status confirm_drafts(batch_ref<space> const& b, index_t const* accepted, workspace& w) noexcept;
  status fold_drafts(batch_ref<space> const& b, detail::draft_folds<space> const& folds,
                     workspace& w) noexcept;

  // device_sequences.hpp
  status fold_token(score_input<space> const& in, detail::token_steps<space>& t,
                    workspace& w) noexcept;
  status add_layer(runner const& by, layer_data const& l, bool comparable,
                   op::mean_layers<space> const& m) noexcept;
  status decide_sequences(batch_ref<space> const& b, workspace& w) noexcept;
  status evict_sequences(batch_ref<space> const& b, workspace& w) noexcept;
  status cut_sequences(batch_ref<space> const& b, workspace& w) noexcept;

  // device_moving.hpp
  status give_tails(batch_ref<space> const& b, std::int64_t const* slot_mapping,
                    workspace& w) noexcept;
  status choose_layers(batch_ref<space> const& b, workspace& w) noexcept;
  status commit_layers(index_t n, workspace& w) noexcept;

  // device_aside.hpp
  status decide_aside(layer_data& l, score_input<space> const& in, detail::token_steps<space>& t,
                      workspace& w) noexcept;
  status measure_aside(layer_data& l, score_input<space> const& in,
                       detail::token_steps<space> t) noexcept;
  status wait_for_decision(index_t m) noexcept;

  // device_special.hpp
  status attend_special(layer_data& l, score_input<space> in, detail::token_steps<space>& t,
                        workspace& w) noexcept;
  status mask_heads(score_input<space> const& in, tensor_ref<float, 3, space> const& own,
                    tensor_ref<std::uint8_t, 3, space> const& visible,
                    detail::cut_memory<space> const& c, workspace& w) noexcept;

  Prompt prompt_{};
  Decode decode_{};
  bool one_policy_ = false;
};

}  // namespace kvkeep

#include "detail/device_setup.hpp"
