// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// What a device session holds, whatever its policies.
#pragma once

#include <algorithm>
#include <vector>

#include "device_draft_steps.hpp"
#include "device_prompt_steps.hpp"
#include "device_state_steps.hpp"
#include "token_chain.hpp"

namespace kvkeep::detail {

/// Layers and sequences as the host sees them, and the memory that the backend alone reads.
template <class Ctx>
class device_core {
 public:
  using space = space_of<Ctx>;

  // Two of them would share the backend's memory, but not what the host knows of prompts.
  device_core(device_core&&) noexcept = default;
  device_core& operator=(device_core&&) noexcept = default;

  /// Slots in use, `[id, kv_head]`. This and what follows lies in the backend's memory.
  tensor_ref<index_t const, 2, space> lengths(index_t layer) const noexcept {
    auto const* const l = find(layer);
    return l == nullptr ? tensor_ref<index_t, 2, space>{} : l->slots.lengths;
  }
  /// Original positions, `[id, kv_head, slot]`.
  tensor_ref<index_t const, 3, space> positions(index_t layer) const noexcept {
    auto const* const l = find(layer);
    return l == nullptr ? tensor_ref<index_t, 3, space>{} : l->slots.positions;
  }
  /// Free slot inside the slots in use, `[id, kv_head]`, -1: none.
  tensor_ref<index_t const, 2, space> free_slots(index_t layer) const noexcept {
    auto const* const l = find(layer);
    return l == nullptr ? tensor_ref<index_t, 2, space>{} : l->victim;
  }
  /// Tokens seen by each sequence and confirmed, `[id]`.
  index_t const* tokens(index_t layer) const noexcept {
    auto const* const l = find(layer);
    return l == nullptr ? nullptr : l->seen;
  }
  /// What went wrong, `[id]`: 0, or bits of device_fault. Cleared by `begin`.
  index_t const* faults() const noexcept { return faults_; }

  /// Bytes of memory that `bind_device_session` needs.
  std::size_t bytes() const noexcept { return state_bytes_ + scratch_bytes_; }

 protected:
  using layer_data = layer_state<space>;
  using source = cache_source<space>;

  device_core(Ctx& ctx, std::span<layer_spec<space> const> layers, limits const& lim)
      : ctx_(&ctx), limits_(lim) {
    for (auto const& spec : layers) {
      number_of_.push_back(spec.skip ? -1 : static_cast<index_t>(layers_.size()));
      if (spec.skip) continue;
      layer_data l;
      l.kv = spec.kv;
      l.spec = static_cast<index_t>(number_of_.size()) - 1;
      l.number = number_of_.back();
      layers_.push_back(l);
    }
  }

  index_t n_layers() const noexcept { return static_cast<index_t>(layers_.size()); }
  bool is_last(layer_data const& l) const noexcept { return l.number + 1 == n_layers(); }
  bool alive(index_t id) const noexcept {
    return id >= 0 && id < limits_.max_sequences && sequences_[static_cast<std::size_t>(id)].alive;
  }
  /// Where a sequence may begin: as asked, or the first that is free.
  status find_place(index_t wanted, index_t& id) const noexcept {
    id = wanted;
    if (id < 0)
      for (id = 0; id < limits_.max_sequences && alive(id); ++id) {
      }
    if (id >= limits_.max_sequences)
      return wanted < 0 ? status::capacity_exceeded : status::bad_sequence;
    return alive(id) ? status::bad_sequence : status::ok;
  }
  index_t managed(index_t layer) const noexcept {
    bool const known = layer >= 0 && layer < static_cast<index_t>(number_of_.size());
    return known ? number_of_[static_cast<std::size_t>(layer)] : -2;
  }
  /// A managed layer, or null.
  layer_data const* find(index_t layer) const noexcept {
    index_t const m = managed(layer);
    return m < 0 ? nullptr : &layers_[static_cast<std::size_t>(m)];
  }
  prompt_state& prompt_of(layer_data const& l, index_t id) noexcept {
    return prompts_[product(l.number, limits_.max_sequences) + static_cast<std::size_t>(id)];
  }
  /// Whether a sequence is in the middle of a prompt.
  bool in_prompt(index_t id) noexcept {
    index_t const ended = sequences_[static_cast<std::size_t>(id)].ended_layers;
    if (ended == n_layers()) return false;
    return ended > 0 || std::any_of(layers_.begin(), layers_.end(),
                                    [&](auto const& l) { return prompt_of(l, id).observed; });
  }
  /// Others may use what a sequence in the middle of its prompt has kept from them.
  void leave_prompt(index_t id) noexcept {
    if (prompt_owner_ == id) prompt_owner_ = -1;
    if (shared_.staging_id == id) shared_.staging_id = -1;
  }
  /// Whether the buffer of transient prompts holds part of one that has not ended.
  bool staging_taken() noexcept {
    index_t const id = shared_.staging_id, m = shared_.staging_layer;
    return id >= 0 && sequences_[static_cast<std::size_t>(id)].ended_layers <= m &&
           prompt_of(layers_[static_cast<std::size_t>(m)], id).tokens > 0;
  }
  /// One sequence as a batch: `numbers_` holds 0, 1, 2, ... in the backend's memory.
  batch_ref<space> one(index_t id, index_t row) const noexcept {
    return {1, numbers_ + row, numbers_ + id};
  }
  source pool(layer_data const& l, batch_ref<space> const& b) const noexcept {
    return {b, {l.kv, l.slots}, l.weight_sum, l.gathered, 0};
  }
  every_layer<space> every(batch_ref<space> const& b) const noexcept {
    return {layer_table_, n_layers(), shape_.cache.n_kv_heads, b};
  }
  note_held<space> holding(layer_data const& l) const noexcept {
    bool const paged = l.kv.k.layout.kind == layout_kind::paged;
    return {l.slots, plan_.held, l.number, paged ? l.kv.k.layout.paged.block_size : 1};
  }
  /// What reports wait for, where somebody counts it.
  tensor_ref<index_t, 3, space> n_kept() const noexcept {
    return tracks_tables_ ? plan_.n_kept : tensor_ref<index_t, 3, space>{};
  }
  /// A layer's part of the plan for `n` entries.
  keep_plan<space> plan_of(layer_data const& l, index_t n) const noexcept {
    return {rebase(plan_.slots, l.number * n), rebase(plan_.count, l.number * n)};
  }
  /// Scores of the heads of `n` entries, in the scratch.
  score_map<space> take_scores(index_t n, workspace& w) const noexcept {
    index_t const heads = shape_.cache.n_kv_heads, slots = shape_.cache.max_slots;
    return row_major<space>(w.take<float>(product(n, heads, slots)), n, heads, slots);
  }
  /// Takes the memory of a cut from the scratch.
  cut_memory<space> take_cut(index_t n, workspace& w) const noexcept {
    index_t const heads = shape_.cache.n_kv_heads, slots = shape_.cache.max_slots;
    index_t const n_ids = shape_.n_sequences;
    auto const ids = product(n_ids, heads), size = product(n, heads);
    cut_memory<space> c;
    c.keep = row_major<space>(w.take<index_t>(ids), n_ids, heads);
    c.due = row_major<space>(w.take<index_t>(ids), n_ids, heads);
    c.scores = take_scores(n, w);
    c.plan = {row_major<space>(w.take<index_t>(product(size, slots)), n, heads, slots),
              row_major<space>(w.take<index_t>(size), n, heads)};
    return c;
  }
  workspace scratch() const noexcept { return workspace({scratch_, scratch_bytes_}); }
  template <class F>
  status each(index_t n, F const& f, workspace& w) const noexcept {
    return runner<Ctx>{*ctx_, w}.each(n, f);
  }

  /// Gives the tokens of a prompt's chunk the tail slots of a sequence.
  status extend(extend_prompt<space> const& step, workspace& w) const noexcept {
    return each(shape_.cache.n_kv_heads * step.each_head(), step, w);
  }
  /// Plans and appended tokens wait for the end of a prompt.
  status mark(layer_data const& l, index_t id, index_t state, workspace& w) const noexcept {
    mark_prompt<space> const step{plan_.n_kept, l.number, id, state};
    return each(shape_.cache.n_kv_heads, step, w);
  }
  /// Ring rows of a layer's newest tokens, `[entry]`.
  index_t* newest_rows_of(layer_data const& l) const noexcept {
    bool const rings = shape_.rows.weight_ring > 1 && newest_rows_ != nullptr;
    return newest_rows_ + (rings ? l.number * limits_.max_batch : 0);
  }
  /// Storing the newest token's queries, where there is a ring for them.
  op::for_each<push_token<space>, space> pushing(layer_data const& l, batch_ref<space> const& b,
                                                 queries const& q) const noexcept {
    return {shape_.rows.rings_tokens ? b.n * shape_.cache.n_q_heads * shape_.cache.dim_k : 0,
            {l.ring_q, l.appended, b, q}};
  }
  /// The newest tokens' rows in a ring of weights, as ops read them: nothing where there is one row.
  op::for_each<ring_rows_of<space>, space> listing(layer_data const& l,
                                                   batch_ref<space> const& b) const noexcept {
    index_t const ring = shape_.rows.weight_ring;
    return {ring > 1 ? b.n : 0, {l.appended, b, ring, newest_rows_of(l)}};
  }
  /// A sequence cannot freeze what it does not hold. Less scratch than `verify` takes.
  status check_prefix(layer_data const& l, index_t id, index_t n, workspace& w) const noexcept {
    workspace::frame const frame(w);
    index_t const heads = shape_.cache.n_kv_heads;
    auto* const found = w.take<std::uint8_t>(product(heads, n));
    auto* const of_head = w.take<index_t>(product(heads));
    if (!w.ok()) return status::workspace_too_small;
    KVKEEP_TRY(each(heads * n, find_unfrozen<space>{l, id, n, found}, w));
    KVKEEP_TRY(each(heads, join_found{found, n, of_head}, w));
    return each(1, blame_sequence{of_head, heads, faults_, id, device_fault::bad_prefix}, w);
  }
  /// What follows a token: nothing is decided yet.
  settle_victims<space> settling(layer_data const& l, batch_ref<space> const& b) const noexcept {
    settle_victims<space> s{b, shape_.cache.n_kv_heads};
    s.lengths = l.slots.lengths;
    s.victim = l.victim;
    s.fresh = l.fresh;
    s.appended = l.appended;
    s.seen = l.seen;
    return s;
  }
  /// A step for every number of a sequence in a layer: indices have 31 bits.
  template <class F>
  status each_number(F f, workspace& w) const noexcept {
    constexpr offset_t most = offset_t{1} << 30;
    if (!f.all.whole()) return status::unsupported;
    for (; f.first < f.all.total; f.first += most)
      KVKEEP_TRY(each(static_cast<index_t>(std::min(most, f.all.total - f.first)), f, w));
    return status::ok;
  }

  Ctx* ctx_ = nullptr;
  limits limits_{};
  bool one_leaves_ = true;      ///< no bursts: victims alone once a prompt has ended
  bool tracks_tables_ = false;  ///< tokens wait for the end of prompts and the report of tables
  bound_rows bound_{};
  state_shape shape_{};
  std::vector<index_t> number_of_;    ///< [layer] managed number, or -1
  std::vector<layer_data> layers_;    ///< managed layers
  std::vector<index_t> usual_slots_;  ///< [managed layer] of a head while decoding; 0: nobody knows
  std::vector<host_state> sequences_;
  std::vector<prompt_state> prompts_;  ///< [managed layer, id]
  index_t prompt_owner_ = -1;          ///< sequence whose coupled layers are being decided
  shared_state<space> shared_{};
  plan_memory<space> plan_{};
  layer_data* layer_table_ = nullptr;  ///< [managed layer] `layers_`, in the backend's memory
  index_t* numbers_ = nullptr;
  index_t n_numbers_ = 0;
  /// [managed layer, entry] ring rows; one list of 0 for small rings
  index_t* newest_rows_ = nullptr;
  index_t* tickets_ = nullptr;      ///< [max_batch] of op::joined_chain
  index_t* row_tickets_ = nullptr;  ///< [max_batch, q_head] of op::attend
  index_t* faults_ = nullptr;
  aside_state<Ctx> aside_;
  std::size_t state_bytes_ = 0;
  std::size_t scratch_bytes_ = 0;
  std::byte* scratch_ = nullptr;
};

}  // namespace kvkeep::detail
