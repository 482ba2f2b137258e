// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// Device session: slots for new tokens.
#pragma once

#include "../device_session.hpp"

namespace kvkeep {

template <backend Ctx, class P, class D>
status device_session<Ctx, P, D>::append(index_t layer, batch_ref<space> const& b,
                                         index_t* slots) noexcept {
  index_t const m = managed(layer);
  if (m == -1) return status::ok;
  if (m < 0 || slots == nullptr || b.n < 1 || b.n > limits_.max_batch) return status::bad_argument;
  KVKEEP_TRY(wait_for_decision(m));
  workspace w = scratch();
  return give_slots(layers_[static_cast<std::size_t>(m)], b, nullptr, nullptr, slots, w);
}

template <backend Ctx, class P, class D>
status device_session<Ctx, P, D>::append(index_t layer, batch_ref<space> const& b,
                                         token_kv const& kv, index_t* slots) noexcept {
  return append_rows(layer, b, kv, nullptr, slots);
}

template <backend Ctx, class P, class D>
status device_session<Ctx, P, D>::decode(index_t layer, batch_ref<space> const& b,
                                         token_io const& t) noexcept {
  if (managed(layer) == -1 || limits_.decode != decode_offer::attend) return status::unsupported;
  KVKEEP_TRY(detail::check_token_query(t.q));
  if (t.out == nullptr) return status::bad_argument;
  KVKEEP_TRY(append_rows(layer, b, t.kv, &t.q, nullptr));
  return show_token(layer, b, t.q, true, t.out, t.lse);
}

/// @param q  queries to be stored too, for an attention that follows with the same batch; or null
template <backend Ctx, class P, class D>
status device_session<Ctx, P, D>::append_rows(index_t layer, batch_ref<space> const& b,
                                              token_kv const& kv, queries const* q,
                                              index_t* slots) noexcept {
  index_t const m = managed(layer);
  if (m == -1) return status::unsupported;  // nobody would write them
  if (m < 0 || kv.k.data == nullptr || kv.v.data == nullptr || b.n < 1 || b.n > limits_.max_batch)
    return status::bad_argument;
  layer_data& l = layers_[static_cast<std::size_t>(m)];
  if (!detail::can_write(l.kv.k, kv.k) || !detail::can_write(l.kv.v, kv.v))
    return status::unsupported;
  KVKEEP_TRY(wait_for_decision(m));
  workspace w = scratch();
  return give_slots(l, b, &kv, q, slots, w);
}

/// A block per entry: a head has a slot only if all have.
template <backend Ctx, class P, class D>
status device_session<Ctx, P, D>::give_slots(layer_data& l, batch_ref<space> const& b,
                                             token_kv const* kv, queries const* q, index_t* slots,
                                             workspace& w) noexcept {
  index_t const heads = shape_.cache.n_kv_heads, n = b.n * heads;
  auto* const found = w.take<index_t>(static_cast<std::size_t>(n));
  auto* const own_slots = w.take<index_t>(static_cast<std::size_t>(n));
  index_t const drafts = limits_.max_draft;
  auto* const position = drafts > 0 ? w.take<index_t>(static_cast<std::size_t>(b.n)) : nullptr;
  if (!w.measuring() && !w.ok()) return status::workspace_too_small;
  if (slots == nullptr) slots = own_slots;
  using find = detail::find_faults<space>;
  using take = detail::take_slots<space>;
  op::for_each<find, space> const look{n, find{l, b, n_kept(), faults_, found, drafts, position}};
  op::for_each<take, space> const give{
      n, take{l, shape_.rows, b, found, faults_, shared_.generation, slots, position}};
  // A block has as much to do as it has heads, not slots,
  if (kv == nullptr) return run(*ctx_, op::make_chain<space>(b.n, 1, heads, look, give), w);
  // or elements of a token.
  detail::write_token_kv<space> const write{l.kv, b, *kv, slots};
  index_t const each_entry = heads * write.elements();
  op::for_each<detail::write_token_kv<space>, space> const put{b.n * each_entry, write};
  if (q == nullptr || (!shape_.rows.rings_tokens && shape_.rows.weight_ring <= 1))
    return run(*ctx_, op::make_chain<space>(b.n, 1, each_entry, look, give, put), w);
  return run(
      *ctx_,
      op::make_chain<space>(b.n, 1, each_entry, look, give, put, pushing(l, b, *q), listing(l, b)),
      w);
}

}  // namespace kvkeep

#include "device_evidence.hpp"
