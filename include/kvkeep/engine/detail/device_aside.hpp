// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// Device session: decisions in a second context.
#pragma once

#include <algorithm>
#include <utility>

#include "../device_session.hpp"
#include "measure.hpp"

namespace kvkeep {

/// Scratch of a decision that another context makes.
template <backend Ctx, class P, class D>
status device_session<Ctx, P, D>::measure_aside(layer_data& l, score_input<space> const& in,
                                                detail::token_steps<space> t) noexcept {
  workspace count;
  t.without_attention(in);
  status const s = decide_by({*aside_.measured, count}, l, in, t);
  aside_.bytes = std::max(aside_.bytes, count.peak());
  return s;
}

/// Attention in the session's context; the decision follows it in the other one.
template <backend Ctx, class P, class D>
status device_session<Ctx, P, D>::decide_aside(layer_data& l, score_input<space> const& in,
                                               detail::token_steps<space>& t,
                                               workspace& w) noexcept {
  KVKEEP_TRY(detail::attend_alone(*ctx_, in, t, w));
  t.without_attention(in);
  if constexpr (orders<Ctx>) KVKEEP_TRY(follow(*aside_.ctx, *ctx_));
  aside_.open[static_cast<std::size_t>(l.number)] = 1;
  aside_.any = true;
  workspace there({aside_.scratch, aside_.bytes});
  return decide_by({*aside_.ctx, there}, l, in, t);
}

template <backend Ctx, class P, class D>
std::size_t device_session<Ctx, P, D>::aside_bytes(Ctx& other) noexcept {
  Ctx* const used = std::exchange(aside_.ctx, nullptr);
  std::size_t const had = std::exchange(aside_.bytes, 0);
  aside_.measured = &other;
  queries q;
  q.n_rows = q.tokens = 1;
  batch_ref<space> batch;
  batch.n = limits_.max_batch;
  for (auto& l : layers_) {
    workspace w;
    if (weigh(l, batch, q, false, nullptr, nullptr, w) != status::ok)
      break;  // it could when it was bound
  }
  std::size_t const bytes = std::exchange(aside_.bytes, had);
  aside_.ctx = used;
  aside_.measured = nullptr;
  return bytes > 0 ? detail::padded_scratch(bytes) : 0;
}

template <backend Ctx, class P, class D>
status device_session<Ctx, P, D>::decide_in(
    Ctx& other, std::span<std::byte> memory) noexcept requires orders<Ctx> {
  std::size_t const bytes = aside_bytes(other);
  if (memory.size() < bytes) return status::workspace_too_small;
  KVKEEP_TRY(join());
  // For what has been enqueued so far; and it tells whether they can.
  KVKEEP_TRY(follow(other, *ctx_));
  KVKEEP_TRY(follow(*ctx_, other));
  aside_.ctx = &other;
  aside_.scratch = memory.data();
  aside_.bytes = bytes;
  return status::ok;
}

template <backend Ctx, class P, class D>
status device_session<Ctx, P, D>::join() noexcept {
  if (!aside_.any) return status::ok;
  if constexpr (orders<Ctx>) KVKEEP_TRY(follow(*ctx_, *aside_.ctx));
  std::fill(aside_.open.begin(), aside_.open.end(), std::uint8_t{0});
  aside_.any = false;
  return status::ok;
}

/// Before the state of a layer is changed or read again.
template <backend Ctx, class P, class D>
status device_session<Ctx, P, D>::wait_for_decision(index_t m) noexcept {
  // A step begins with the first layer: what an incomplete one has left goes before it.
  bool const waits = aside_.open[static_cast<std::size_t>(m)] != 0 || m == 0;
  return waits ? join() : status::ok;
}

}  // namespace kvkeep
