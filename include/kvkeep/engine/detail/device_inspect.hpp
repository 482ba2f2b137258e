// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// Device session: saving, loading and verifying sequences.
#pragma once

#include <algorithm>

#include "../device_session.hpp"
#include "device_state_steps.hpp"

namespace kvkeep {

template <backend Ctx, class P, class D>
std::size_t device_session<Ctx, P, D>::saved_bytes() const noexcept {
  offset_t numbers = 0;
  for (auto const& l : layers_) numbers += detail::sequence_arrays(l).total;
  return sizeof(detail::saved_header) + static_cast<std::size_t>(numbers) * 4;
}

template <backend Ctx, class P, class D>
detail::saved_header device_session<Ctx, P, D>::header() const noexcept {
  detail::saved_header h;
  h.config = detail::config_of(prompt_, decode_, limits_, layers_);
  h.bytes = saved_bytes();
  h.on_device = 1;
  return h;
}

template <backend Ctx, class P, class D>
status device_session<Ctx, P, D>::save(index_t id, std::span<std::byte> out) noexcept {
  if (!alive(id)) return status::bad_sequence;
  if (out.size() < saved_bytes()) return status::workspace_too_small;
  if (in_prompt(id)) return status::bad_order;
  KVKEEP_TRY(join());
  workspace w = scratch();
  KVKEEP_TRY(each(1, detail::write_header{header(), shared_.frozen, faults_, id, out.data()}, w));
  std::byte* to = out.data() + sizeof(detail::saved_header);
  for (auto const& l : layers_) {
    detail::sequence_arrays const all(l);
    KVKEEP_TRY(each_number(detail::save_numbers<space>{all, id, to}, w));
    to += all.total * 4;
  }
  return status::ok;
}

template <backend Ctx, class P, class D>
status device_session<Ctx, P, D>::load(index_t id, std::span<std::byte const> in) noexcept {
  if (!alive(id)) return status::bad_sequence;
  if (in.size() < saved_bytes()) return status::bad_argument;
  KVKEEP_TRY(join());
  workspace w = scratch();
  auto* const refused = w.take<index_t>(1);
  if (!w.ok()) return status::workspace_too_small;
  KVKEEP_TRY(each(1,
                  detail::read_header{header(), in.data(), shared_.frozen, faults_,
                                      shared_.generation, id, refused},
                  w));
  std::byte const* from = in.data() + sizeof(detail::saved_header);
  index_t const heads = shape_.cache.n_kv_heads;
  for (auto const& l : layers_) {
    detail::sequence_arrays const all(l);
    KVKEEP_TRY(each_number(detail::load_numbers<space>{all, id, from, refused}, w));
    KVKEEP_TRY(each(heads, detail::open_tables<space>{plan_, l.number, id, detail::settled}, w));
    from += all.total * 4;
  }
  sequences_[static_cast<std::size_t>(id)].ended_layers = n_layers();
  this->leave_prompt(id);
  return status::ok;
}

template <backend Ctx, class P, class D>
status device_session<Ctx, P, D>::verify() noexcept {
  KVKEEP_TRY(join());
  workspace w = scratch();
  for (index_t id = 0; id < limits_.max_sequences; ++id) {
    if (!alive(id) || in_prompt(id)) continue;
    for (auto const& l : layers_) KVKEEP_TRY(verify_layer(l, id, w));
  }
  return status::ok;
}

template <backend Ctx, class P, class D>
status device_session<Ctx, P, D>::verify_layer(layer_data const& l, index_t id,
                                               workspace& w) noexcept {
  workspace::frame const frame(w);
  bool const cuts = decode_.score.traits().at_decode;
  guard const& p = prompt_.keep;
  guard const& d = cuts ? decode_.keep : prompt_.keep;
  index_t const heads = shape_.cache.n_kv_heads;
  detail::find_corrupt<space> find{
      l,
      detail::rule_of(prompt_, decode_, one_policy_, n_layers(), shape_.cache, shape_.drafts,
                      limits_.engine_commits),
      shared_.frozen,
      decode_.width() == scope::sequence ? layers_.back().seen : l.seen,
      faults_,
      id,
      std::min(p.sinks, d.sinks),
      std::min(p.recent, d.recent),
      nullptr};
  index_t const n = heads * find.items();
  find.found = w.take<std::uint8_t>(static_cast<std::size_t>(n));
  auto* const of_head = w.take<index_t>(static_cast<std::size_t>(heads));
  if (!w.measuring() && !w.ok()) return status::workspace_too_small;
  KVKEEP_TRY(each(n, find, w));
  KVKEEP_TRY(each(heads, detail::join_found{find.found, find.items(), of_head}, w));
  return each(1, detail::blame_sequence{of_head, heads, faults_, id, device_fault::corrupt}, w);
}

}  // namespace kvkeep
