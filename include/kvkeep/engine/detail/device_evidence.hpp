// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// Device session: what it is told of the newest tokens.
#pragma once

#include "../device_session.hpp"

namespace kvkeep {

template <backend Ctx, class P, class D>
status device_session<Ctx, P, D>::attend(index_t layer, batch_ref<space> const& b, queries const& q,
                                         float* out, float* lse) noexcept {
  if (out == nullptr) return status::bad_argument;
  return show_token(layer, b, q, false, out, lse);
}

template <backend Ctx, class P, class D>
status device_session<Ctx, P, D>::observe(index_t layer, batch_ref<space> const& b,
                                          queries const& q) noexcept {
  if (detail::decides_late(decode_.when)) return status::unsupported;
  bool const looks =
      shape_.rows.rings_tokens || bound_.attention_folds || shape_.rows.weight_ring > 0;
  if (q.n_rows == 0 && q.tokens == 1 && !looks) return take_evidence(layer, b, nullptr);
  return show_token(layer, b, q, false, nullptr, nullptr);
}

template <backend Ctx, class P, class D>
status device_session<Ctx, P, D>::show_token(index_t layer, batch_ref<space> const& b,
                                             queries const& q, bool pushed, float* out,
                                             float* lse) noexcept {
  index_t const m = managed(layer);
  if (m == -1) return out != nullptr ? status::unsupported : status::ok;
  KVKEEP_TRY(detail::check_token_query(q));
  if (limits_.decode != decode_offer::attend) return status::unsupported;
  if (m < 0 || b.n < 1 || b.n > limits_.max_batch) return status::bad_argument;
  KVKEEP_TRY(wait_for_decision(m));
  workspace w = scratch();
  return weigh(layers_[static_cast<std::size_t>(m)], b, q, pushed, out, lse, w);
}

template <backend Ctx, class P, class D>
status device_session<Ctx, P, D>::observe(index_t layer, batch_ref<space> const& b,
                                          attention_rows const& a) noexcept {
  if (limits_.decode != decode_offer::attention_rows || shape_.rows.weight_ring == 0)
    return status::unsupported;
  if (a.data == nullptr) return status::bad_argument;
  row_evidence e{a.data, a.entry_stride, a.head_stride, shape_.cache.n_q_heads};
  e.group = shape_.cache.group();
  e.first_row = shape_.rows.weights_at;
  e.row_step = shape_.rows.weight_ring;
  e.of_ring = true;
  return take_evidence(layer, b, &e);
}

template <backend Ctx, class P, class D>
status device_session<Ctx, P, D>::observe(index_t layer, index_t id, own_scores const& s) noexcept {
  index_t const m = managed(layer), heads = shape_.cache.n_kv_heads;
  if (m == -1) return status::ok;
  if (m < 0 || s.data == nullptr) return status::bad_argument;
  if (!alive(id)) return status::bad_sequence;
  if (prompt_.score.traits().prompt != evidence::engine_scores || limits_.max_prompt > 0)
    return status::unsupported;
  KVKEEP_TRY(join());
  layer_data const& l = layers_[static_cast<std::size_t>(m)];
  row_evidence const e{s.data, s.entry_stride, s.head_stride, heads};
  workspace w = scratch();
  return each(
      heads * l.kv.shape.max_slots,
      detail::store_slot_rows<space>{l.slots, one(id, 0), e, nullptr, {}, l.kv.shape.max_slots}, w);
}

template <backend Ctx, class P, class D>
status device_session<Ctx, P, D>::observe(index_t layer, batch_ref<space> const& b,
                                          own_scores const& s) noexcept {
  if (limits_.decode != decode_offer::scores ||
      decode_.score.traits().decode != evidence::engine_scores)
    return status::unsupported;
  if (s.data == nullptr) return status::bad_argument;
  row_evidence e{s.data, s.entry_stride, s.head_stride, shape_.cache.n_kv_heads};
  e.first_row = shape_.rows.decode_at;
  return take_evidence(layer, b, &e);
}

/// @param e  null: there is none
template <backend Ctx, class P, class D>
status device_session<Ctx, P, D>::take_evidence(index_t layer, batch_ref<space> const& b,
                                                row_evidence const* e) noexcept {
  index_t const m = managed(layer);
  if (m == -1) return status::ok;
  if (m < 0 || b.n < 1 || b.n > limits_.max_batch) return status::bad_argument;
  KVKEEP_TRY(wait_for_decision(m));
  workspace w = scratch();
  return decide_by_rows(layers_[static_cast<std::size_t>(m)], b, e, w);
}

/// A decision without attention.
template <backend Ctx, class P, class D>
status device_session<Ctx, P, D>::decide_by_rows(layer_data& l, batch_ref<space> const& b,
                                                 row_evidence const* e, workspace& w) noexcept {
  score_input<space> in;
  KVKEEP_TRY(newest(l, b, in, w));
  if (e != nullptr) {
    detail::store_slot_rows<space> store{l.slots, b, *e, nullptr, {}, l.kv.shape.max_slots};
    if (e->of_ring) {
      store.ring_row = newest_rows_of(l);
      store.sum = l.weight_sum;
    }
    KVKEEP_TRY(each(b.n * e->heads * store.max_slots, store, w));
  }
  detail::token_steps<space> t;
  t.without_attention(in);
  t.settle = settling(l, b);
  return decide(l, in, t, w);
}

/// What scorers see of the newest tokens.
template <backend Ctx, class P, class D>
status device_session<Ctx, P, D>::newest(layer_data const& l, batch_ref<space> const& b,
                                         score_input<space>& in, workspace& w,
                                         bool listed) const noexcept {
  auto const list = listing(l, b);
  if (list.n > 0 && !listed) KVKEEP_TRY(each(list.n, list.fn, w));
  in = input(l, pool(l, b), false);
  in.seen = l.appended;  // the newest tokens count, though not all heads may know it yet
  // While measuring any pointer says that there is a newest token.
  in.newest_row = w.measuring() ? &shape_.n_sequences : newest_rows_of(l);
  return status::ok;
}

}  // namespace kvkeep

#include "device_decode.hpp"
