// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// Device session: begin, copy and end of sequences.
#pragma once

#include <algorithm>

#include "../device_session.hpp"
#include "prompt_steps.hpp"

namespace kvkeep {

template <backend Ctx, class P, class D>
status device_session<Ctx, P, D>::begin(index_t& id, sequence_options const& o) noexcept {
  index_t at = -1;
  KVKEEP_TRY(find_place(o.id, at));
  if (o.frozen < 0) return status::bad_argument;
  if (o.frozen > 0 && (limits_.max_prompt > 0 || !prompt_.score.traits().prefix_safe ||
                       !decode_.score.traits().prefix_safe))
    return status::unsupported;
  for (auto const& l : layers_)
    if (o.frozen > l.kv.shape.max_slots) return status::capacity_exceeded;
  KVKEEP_TRY(join());
  workspace w = scratch();
  index_t const heads = shape_.cache.n_kv_heads;
  KVKEEP_TRY(
      each(1, detail::set_sequence{shared_.frozen, faults_, shared_.generation, at, o.frozen}, w));
  for (auto& l : layers_) {
    KVKEEP_TRY(each_number(detail::clear_sequence<space>{detail::sequence_arrays(l), at}, w));
    KVKEEP_TRY(each(heads, detail::open_head<space>{l, {plan_, l.number, at, detail::settled}}, w));
    if (o.frozen > 0) KVKEEP_TRY(extend({l.slots, at, 0, o.frozen, 0}, w));
    KVKEEP_TRY(each(
        1, detail::set_counters<space>{l, faults_, shared_.generation, at, -1, o.frozen, o.frozen},
        w));
    KVKEEP_TRY(fix_budget(l, at, 0, w));
    prompt_of(l, at) = {o.frozen, true, false, o.frozen, o.frozen};
  }
  sequences_[static_cast<std::size_t>(at)] = {true, 0};
  id = at;
  return status::ok;
}

template <backend Ctx, class P, class D>
status device_session<Ctx, P, D>::fork(index_t from, index_t& id,
                                       sequence_options const& o) noexcept {
  if (!alive(from)) return status::bad_sequence;
  if (o.frozen < 0 || o.frozen > shape_.cache.max_slots) return status::bad_argument;
  bool const buffered = limits_.max_prompt > 0 && shared_.staging_id == from && staging_taken();
  if (prompt_owner_ == from || buffered) return status::bad_order;
  index_t to = -1;
  KVKEEP_TRY(find_place(o.id, to));
  KVKEEP_TRY(join());
  workspace w = scratch();
  KVKEEP_TRY(each(
      1, detail::fork_sequence{shared_.frozen, faults_, shared_.generation, from, to, o.frozen},
      w));
  for (auto& l : layers_) {
    KVKEEP_TRY(each_number(detail::copy_sequence<space>{detail::sequence_arrays(l), from, to}, w));
    KVKEEP_TRY(
        each(shape_.cache.n_kv_heads, detail::fork_tables<space>{plan_, l.number, from, to}, w));
    if (o.frozen > 0) {
      KVKEEP_TRY(this->check_prefix(l, to, o.frozen, w));
      KVKEEP_TRY(each(shape_.cache.n_kv_heads,
                      detail::raised_budget<space>(decode_, l, to, shared_.frozen), w));
    }
    prompt_of(l, to) = prompt_of(l, from);
  }
  sequences_[static_cast<std::size_t>(to)] = sequences_[static_cast<std::size_t>(from)];
  id = to;
  return status::ok;
}

template <backend Ctx, class P, class D>
status device_session<Ctx, P, D>::end(index_t id) noexcept {
  if (!alive(id)) return status::bad_sequence;
  if (limits_.engine_commits) {  // plans may be under way
    workspace w = scratch();
    KVKEEP_TRY(join());
    KVKEEP_TRY(each(1, detail::next_generation{shared_.generation, id}, w));
  }
  sequences_[static_cast<std::size_t>(id)].alive = false;
  this->leave_prompt(id);
  return status::ok;
}

}  // namespace kvkeep

#include "device_inspect.hpp"
