// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// Device session: set-up and memory.
#pragma once

#include <algorithm>

#include "../device_session.hpp"
#include "bind_checks.hpp"
#include "measure.hpp"

namespace kvkeep {

template <backend Ctx, class P, class D>
void device_session<Ctx, P, D>::check_setup() const {
  KVKEEP_EXPECTS(!layers_.empty(), "layers", layers_.size(), "at least one that is not skipped");
  detail::check_layers(layers_);
  cache_shape const& first = layers_[0].kv.shape;
  auto const n = n_layers();
  check_policy(prompt_, n, first);
  check_policy(decode_, n, first);
  detail::check_evidence(prompt_, decode_, one_policy_, layers_, limits_);
  detail::check_pair(prompt_, decode_, one_policy_, layers_, limits_);
  bool const rows =
      limits_.decode == decode_offer::attention_rows || limits_.decode == decode_offer::scores;
  offset_t const floats = static_cast<offset_t>(limits_.max_batch) * first.n_q_heads;
  offset_t const indices = offset_t{1} << 31;
  KVKEEP_EXPECTS(offset_t{first.n_kv_heads} * limits_.max_prompt < indices, "limits.max_prompt",
                 limits_.max_prompt, "less, by which KV heads are multiplied");
  KVKEEP_EXPECTS(offset_t{n} * first.n_kv_heads * limits_.max_batch < indices, "limits.max_batch",
                 limits_.max_batch, "less, by which the KV heads of all layers are multiplied");
  for (auto const& l : layers_) {
    index_t const slots = l.kv.shape.max_slots;
    KVKEEP_EXPECTS(offset_t{first.n_kv_heads} * slots * 2 < indices, "max_slots", slots,
                   "less, by which twice the KV heads are multiplied");
    KVKEEP_EXPECTS(!rows || floats * slots < indices, "limits.max_batch", limits_.max_batch,
                   "less, by which query heads and max_slots are multiplied");
  }
  detail::check_slots(prompt_, decode_, layers_, limits_);
}

/// @return most slots of a layer's heads while decoding, 0 where some heads may have much more than others
template <backend Ctx, class P, class D>
index_t device_session<Ctx, P, D>::slots_while_decoding(layer_data const& l) const {
  auto const own = decode_.budget.traits();
  auto const b = own.inherits ? prompt_.budget.traits() : own;
  if (!detail::cuts_while_decoding(decode_.score) || b.varies_over_heads) return 0;
  cache_demand d{l.kv.shape, n_layers(), l.number, limits_};
  d.longest_prompt = limits_.max_prompt > 0 ? limits_.max_prompt : l.kv.shape.max_slots;
  return detail::decoding_slots(prompt_, decode_, d) + limits_.max_draft;
}

template <backend Ctx, class P, class D>
device_session<Ctx, P, D>::device_session(Ctx& ctx, P const& p, D const& d,
                                          std::span<layer_spec<space> const> layers,
                                          limits const& lim)
    : core(ctx, layers, lim), prompt_(p), decode_(d) {
  if (limits_.max_batch == 0) limits_.max_batch = limits_.max_sequences;
  detail::check_limits(limits_);
  if constexpr (std::is_same_v<P, D>) one_policy_ = p.key() == d.key();
  check_setup();
  for (auto const& l : layers_) usual_slots_.push_back(slots_while_decoding(l));
  cache_shape cache = layers_[0].kv.shape;
  for (auto const& l : layers_) cache.max_slots = std::max(cache.max_slots, l.kv.shape.max_slots);
  shape_.cache = cache;
  shape_.n_sequences = limits_.max_sequences;
  shape_.max_prompt = limits_.max_prompt;
  shape_.drafts = std::max(1, limits_.max_draft);
  bound_ = detail::plan_rows(prompt_, decode_, one_policy_, limits_, cache);
  shape_.rows = bound_.rows;
  bool const moves = prompt_.select.traits().moves_tokens;
  tracks_tables_ = limits_.engine_commits || !moves;
  one_leaves_ = decode_.when.evict_after == 1 && moves;
  auto const n = n_layers();
  n_numbers_ = std::max({limits_.max_sequences, cache.n_seq, n, shape_.rows.total + 1});
  sequences_.resize(static_cast<std::size_t>(limits_.max_sequences));
  prompts_.resize(product(n, limits_.max_sequences));
  aside_.open.resize(static_cast<std::size_t>(n));
  workspace counting;
  carve(counting);
  state_bytes_ = counting.peak() + workspace::alignment;
  measure();
}

template <backend Ctx, class P, class D>
void device_session<Ctx, P, D>::carve(workspace& w) {
  auto const n = n_layers();
  for (auto& l : layers_) {
    detail::state_shape s = shape_;
    s.cache = l.kv.shape;
    detail::carve_layer(w, l, s);
  }
  bool const scores = prompt_.budget.traits().needs_scores;
  bool const wide = prompt_.width() == scope::sequence || decode_.width() == scope::sequence;
  bool const whole = !prompt_.select.traits().moves_tokens || !decode_.select.traits().moves_tokens;
  detail::carve_shared(w, shared_, shape_, n, scores ? n : 0, wide ? limits_.max_batch : 0);
  detail::carve_plan(w, plan_, layers_, shape_, limits_.engine_commits ? limits_.max_batch : 0,
                     whole);
  layer_table_ = w.take<layer_data>(product(n));
  numbers_ = w.take<index_t>(static_cast<std::size_t>(n_numbers_));
  newest_rows_ = w.take<index_t>(product(shape_.rows.weight_ring > 1 ? n : 1, limits_.max_batch));
  tickets_ = w.take<index_t>(static_cast<std::size_t>(limits_.max_batch));
  row_tickets_ = w.take<index_t>(product(limits_.max_batch, shape_.cache.n_q_heads));
  faults_ = w.take<index_t>(static_cast<std::size_t>(limits_.max_sequences));
}

/// Runs every step with a measuring workspace and the largest arguments.
template <backend Ctx, class P, class D>
void device_session<Ctx, P, D>::measure() {
  detail::scratch_meter take;
  queries q;
  q.n_rows = q.tokens = limits_.max_chunk;
  batch_ref<space> batch;
  batch.n = 1;
  for (auto& l : layers_) {
    source const in_place = pool(l, batch);
    source const from = detail::largest_prompt(in_place, shared_.staging, limits_.max_prompt);
    take([&](workspace& w) { return feed_scorers(l, from, q, 0, w); });
    take([&](workspace& w) { return decide_prompt(l, 0, from, in_place, w); });
    take([&](workspace& w) { return fix_budget(l, 0, 0, w); });  // begin
  }
  batch.n = limits_.max_batch;
  q.n_rows = 1;
  for (auto& l : layers_) {
    take([&](workspace& w) { return verify_layer(l, 0, w); });
    take([&](workspace& w) { return give_slots(l, batch, nullptr, nullptr, nullptr, w); });
    if (limits_.decode == decode_offer::attend)
      take([&](workspace& w) { return weigh(l, batch, q, false, nullptr, nullptr, w); });
    if (!detail::decides_late(decode_.when))
      take([&](workspace& w) { return decide_by_rows(l, batch, nullptr, w); });
  }
  take([&](workspace& w) { return give_tails(batch, nullptr, w); });
  if (limits_.max_draft > 0) take([&](workspace& w) { return confirm_drafts(batch, nullptr, w); });
  if (limits_.engine_commits && detail::cuts_while_decoding(decode_.score)) {
    take([&](workspace& w) { return choose_layers(batch, w); });
    take([&](workspace& w) { return commit_layers(batch.n, w); });
  }
  scratch_bytes_ = take.bytes();
}

template <backend Ctx, class P, class D>
void device_session<Ctx, P, D>::place(std::span<std::byte> memory) {
  KVKEEP_EXPECTS(memory.size() >= this->bytes(), "memory.size", memory.size(),
                 ">= " + std::to_string(this->bytes()) + " bytes of the backend's memory");
  workspace w(memory);
  carve(w);
  scratch_ = memory.data() + state_bytes_;
  if (fill(w) != status::ok) fail_setup("the backend cannot write the session's memory");
}

/// What the session's memory holds from the beginning.
template <backend Ctx, class P, class D>
status device_session<Ctx, P, D>::fill(workspace& w) noexcept {
  using none = detail::count_none<index_t>;
  KVKEEP_TRY(each(n_numbers_, detail::count_up{numbers_}, w));
  KVKEEP_TRY(each(limits_.max_batch, none{newest_rows_}, w));
  KVKEEP_TRY(each(limits_.max_batch, none{tickets_}, w));
  KVKEEP_TRY(each(limits_.max_batch * shape_.cache.n_q_heads, none{row_tickets_}, w));
  KVKEEP_TRY(each(limits_.max_sequences, detail::count_none<std::uint32_t>{shared_.generation}, w));
  for (auto const& l : layers_)
    KVKEEP_TRY(each(1, detail::store_layer<space>{l, layer_table_ + l.number}, w));
  return each(1, detail::write_owners<space>{layer_table_, n_layers(), plan_.owner}, w);
}

template <backend Ctx, class P, class D>
auto device_session<Ctx, P, D>::guard_of(bool prompt, index_t id0) const noexcept
    -> guard_ref<space> {
  guard const g = prompt ? prompt_.keep : decode_.keep;
  return {g.sinks, g.recent, shared_.frozen == nullptr ? nullptr : shared_.frozen + id0};
}

template <backend Ctx, class P, class D>
auto device_session<Ctx, P, D>::input(layer_data const& l, source const& s,
                                      bool prompt) const noexcept -> score_input<space> {
  auto in = detail::view_of(l, shape_.rows, s, prompt);
  in.guard = guard_of(prompt, s.id0);
  return in;
}

/// Binds policies to the layers of a model. @see device_session
/// @param memory  `device_session_bytes` bytes in the backend's memory space
/// @throws std::invalid_argument naming field, value and allowed range
template <backend Ctx, policy_on<Ctx> P, policy_on<Ctx> D>
device_session<Ctx, P, D> bind_device_session(Ctx& ctx, P const& prompt, D const& decode,
                                              std::span<layer_spec<space_of<Ctx>> const> layers,
                                              limits const& lim, std::span<std::byte> memory) {
  device_session<Ctx, P, D> s(ctx, prompt, decode, layers, lim);
  s.place(memory);
  return s;
}

/// Bytes of memory that `bind_device_session` with the same arguments needs.
template <backend Ctx, policy_on<Ctx> P, policy_on<Ctx> D>
std::size_t device_session_bytes(Ctx& ctx, P const& prompt, D const& decode,
                                 std::span<layer_spec<space_of<Ctx>> const> layers,
                                 limits const& lim) {
  return device_session<Ctx, P, D>(ctx, prompt, decode, layers, lim).bytes();
}

}  // namespace kvkeep

#include "device_life_cycle.hpp"
#include "device_prompt.hpp"
