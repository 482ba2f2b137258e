// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// What both phases of a session share: memory, batches, scorer inputs.
#pragma once

#include <algorithm>
#include <atomic>

#include "../session.hpp"
#include "measure.hpp"

namespace kvkeep {

template <backend Ctx, class P, class D>
void session<Ctx, P, D>::place(std::span<std::byte> memory) {
  if (memory.empty()) {
    KVKEEP_EXPECTS((std::is_same_v<space, host_space>), "memory", "empty",
                   "a block of device memory");
    // Not cleared: pages of scratch that no call needs cost nothing then.
    owned_ = std::make_unique_for_overwrite<std::byte[]>(bytes());
    memory = {owned_.get(), bytes()};
  }
  KVKEEP_EXPECTS(memory.size() >= bytes(), "memory.size", memory.size(),
                 ">= " + std::to_string(bytes()));
  workspace w(memory);
  carve(w);
  scratch_ = memory.data() + state_bytes_;
  index_t const n = limits_.max_sequences;
  std::fill_n(shared_.alive, n, std::uint8_t{0});
  std::fill_n(shared_.generation, n, 0U);
  std::fill_n(shared_.frozen, n, 0);
  std::fill_n(shared_.confirmed, n, 0);
  (void)detail::list_tables(layers_.data(), static_cast<index_t>(layers_.size()), plan_.owner);
}

template <backend Ctx, class P, class D>
workspace session<Ctx, P, D>::scratch(index_t number) const noexcept {
  std::size_t const at = limits_.concurrent_layers ? static_cast<std::size_t>(number) : 0;
  return workspace({scratch_ + at * scratch_bytes_, scratch_bytes_});
}

template <backend Ctx, class P, class D>
void session<Ctx, P, D>::note_scratch(layer_data& l, workspace const& w) const noexcept {
  l.count.scratch_peak = std::max(l.count.scratch_peak, w.peak());
}

/// Runs every step with a measuring workspace and the largest arguments.
template <backend Ctx, class P, class D>
void session<Ctx, P, D>::measure() {
  detail::scratch_meter take;
  queries q;
  q.n_rows = q.tokens = limits_.max_chunk;
  index_t const n = limits_.max_batch;
  batch largest;
  for (auto& l : layers_) {
    source const in_place = pool(l, nullptr, nullptr, 1);
    source const from = detail::largest_prompt(in_place, shared_.staging, limits_.max_prompt);
    take([&](workspace& w) { return feed_scorers(l, from, q, 0, w); });
    take([&](workspace& w) { return decide_prompt(l, 0, from, in_place, w); });
    take([&](workspace& w) { return fix_decode_budget(l, 0, 0, w); });  // begin
    if (limits_.decode == decode_offer::attend)
      take([&](workspace& w) { return weigh(l, largest, q, nullptr, nullptr, w); });
    take([&](workspace& w) {  // append: ids, rows, slots; positions and the like
      for (int i = 0; i < 5; ++i) w.take<index_t>(static_cast<std::size_t>(n));
      w.take<index_t>(product(n, shape_.cache.n_kv_heads));
      return status::ok;
    });
    take([&](workspace& w) {  // confirm and rollback
      for (int i = 0; i < 4; ++i) w.take<index_t>(static_cast<std::size_t>(n));
      KVKEEP_TRY(after_token(l, nullptr, nullptr, n, w));
      if (decode_.width() != scope::sequence) return status::ok;
      return decide_sequences(nullptr, nullptr, n, w);
    });
    take([&](workspace& w) {  // verify
      w.take<index_t>(static_cast<std::size_t>(shape_.cache.max_slots));
      return status::ok;
    });
    if (limits_.engine_commits && detail::cuts_while_decoding(decode_.score))
      take([&](workspace& w) { return choose_layers(n, w); });
  }
  scratch_bytes_ = take.bytes();
}

template <backend Ctx, class P, class D>
template <class F>
status session<Ctx, P, D>::each(index_t n, F const& f, workspace& w) const noexcept {
  if (w.measuring()) return status::ok;
  return run(*ctx_, op::for_each<F, space>{n, f}, w);
}

template <backend Ctx, class P, class D>
bool session<Ctx, P, D>::alive(index_t id) const noexcept {
  return id >= 0 && id < limits_.max_sequences && shared_.alive[id] != 0;
}

template <backend Ctx, class P, class D>
index_t session<Ctx, P, D>::managed(index_t layer) const noexcept {
  return layer >= 0 && layer < n_all_layers_ ? number_of_[static_cast<std::size_t>(layer)] : -2;
}

template <backend Ctx, class P, class D>
status session<Ctx, P, D>::check_batch(batch const& b) const noexcept {
  if (b.ids.empty() || b.ids.size() > static_cast<std::size_t>(limits_.max_batch))
    return status::bad_argument;
  if (!b.rows.empty() && b.rows.size() != b.ids.size()) return status::bad_argument;
  index_t const rows = layers_[0].kv.shape.n_seq;
  for (std::size_t i = 0; i < b.ids.size(); ++i) {
    if (!alive(b.ids[i])) return status::bad_sequence;
    index_t const row = b.rows.empty() ? b.ids[i] : b.rows[i];
    if (row < 0 || row >= rows) return status::bad_argument;
    for (std::size_t j = 0; j < i; ++j) {
      if (b.ids[j] == b.ids[i]) return status::bad_argument;
      if (!b.rows.empty() && b.rows[j] == row) return status::bad_argument;
    }
  }
  return status::ok;
}

/// Ids and rows of a batch in scratch; the largest batch while measuring.
template <backend Ctx, class P, class D>
auto session<Ctx, P, D>::list(batch const& b, workspace& w) const noexcept -> entries {
  std::size_t const n = w.measuring() ? static_cast<std::size_t>(limits_.max_batch) : b.ids.size();
  entries const e{static_cast<index_t>(n), w.take<index_t>(n), w.take<index_t>(n)};
  for (std::size_t i = 0; i < n && e.ids != nullptr && e.rows != nullptr; ++i) {
    e.ids[i] = b.ids[i];
    e.rows[i] = b.rows.empty() ? b.ids[i] : b.rows[i];
  }
  return e;
}

/// Room for `more` tokens in every head, of which a free slot takes the first, and block table entries
/// in range for all slots in use then.
template <backend Ctx, class P, class D>
status session<Ctx, P, D>::check_blocks(layer_data const& l, index_t row, index_t id,
                                        index_t more) const noexcept {
  for (index_t h = 0; h < shape_.cache.n_kv_heads; ++h) {
    if (plan_.n_kept(l.number, id, h) >= 0) return status::bad_order;  // report not taken yet
    index_t const tail = more > 0 && l.victim(id, h) >= 0 ? more - 1 : more;
    index_t const used = l.slots.lengths(id, h);
    if (tail > l.kv.shape.max_slots - used) return status::capacity_exceeded;
    index_t const n = used + tail;
    for (auto const* p : {&l.kv.k, &l.kv.v}) {
      index_t const room =
          visit_layout(p->layout, [&](auto const& layout) { return layout.capacity(row, h); });
      if (n > room) return status::capacity_exceeded;
      if (p->layout.kind != layout_kind::paged) continue;
      auto const& pages = p->layout.paged;
      for (index_t i = 0; i * pages.block_size < n; ++i) {
        index_t const entry = pages.entry(row, h, i);
        if (entry < 0 || entry >= pages.n_blocks) return status::bad_table;
      }
    }
  }
  return status::ok;
}

template <backend Ctx, class P, class D>
auto session<Ctx, P, D>::pool(layer_data const& l, index_t const* ids, index_t const* rows,
                              index_t n) const noexcept -> source {
  return {{n, rows, ids}, {l.kv, l.slots}, l.weight_sum, l.gathered, 0};
}

template <backend Ctx, class P, class D>
auto session<Ctx, P, D>::transient(layer_data const&, index_t id, kv_ref<space> const& prompt,
                                   index_t const* zero, index_t const* row) const noexcept
    -> source {
  auto const& own = shared_.staging;
  return {{1, row, zero}, {prompt, own.slots}, own.weight_sum, own.gathered, id};
}

template <backend Ctx, class P, class D>
auto session<Ctx, P, D>::guard_of(bool prompt, index_t id0) const noexcept -> guard_ref<space> {
  guard const g = prompt ? prompt_.keep : decode_.keep;
  return {g.sinks, g.recent, shared_.frozen == nullptr ? nullptr : shared_.frozen + id0};
}

/// Slots moved or changed hands: plans made before are stale. Layers may do so at the same time.
template <backend Ctx, class P, class D>
void session<Ctx, P, D>::next_generation(index_t id) const noexcept {
  std::atomic_ref<std::uint32_t>(shared_.generation[id]).fetch_add(1, std::memory_order_relaxed);
}

/// What a scorer of the given role sees of a cache. `newest` `[entry]` is null at the end of a prompt.
template <backend Ctx, class P, class D>
auto session<Ctx, P, D>::input(layer_data const& l, source const& s, bool prompt,
                               index_t const* newest) const noexcept -> score_input<space> {
  score_input<space> in = detail::view_of(l, shape_.rows, s, prompt);
  in.guard = guard_of(prompt, s.id0);
  // Log-sum-exps serve the end of a prompt, where a batch has one entry; measuring assumes them.
  in.has_lse = newest == nullptr &&
               (l.has_lse == nullptr || (s.batch.n == 1 && l.has_lse[s.id0 + s.batch.id[0]] != 0));
  in.newest_row = newest;
  return in;
}

}  // namespace kvkeep

#include "life_cycle.hpp"
