// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// CPU: a chain's ops, one after another.
#pragma once

#include "../../op/head_chain.hpp"
#include "context.hpp"

namespace kvkeep::cpu {
inline namespace KVKEEP_CPU_ISA {

template <class First, class... Rest>
status enqueue_each(context& c, sequence<First, Rest...> const& ops, workspace& ws) noexcept {
  KVKEEP_TRY(enqueue(c, ops.first, ws));
  if constexpr (sizeof...(Rest) == 0)
    return status::ok;
  else
    return enqueue_each(c, ops.rest, ws);
}

/// Scratch: the most of any op.
template <class... Ops>
status enqueue(context& c, op::head_chain<host_space, Ops...> const& o, workspace& ws) noexcept {
  {
    workspace::frame const frame(ws);
    workspace need;
    KVKEEP_TRY(enqueue_each(c, o.ops, need));
    ws.take<std::byte>(need.peak());  // all of them find room, or none runs
    if (!placed(ws)) return not_placed(ws);
  }
  return enqueue_each(c, o.ops, ws);
}

/// One after the other. Scratch: the most of either.
template <class Heads, class Entries>
status enqueue(context& c, op::joined_chain<host_space, Heads, Entries> const& o,
               workspace& ws) noexcept {
  if (!o.fits()) return status::bad_argument;
  {
    workspace::frame const frame(ws);
    workspace need;
    KVKEEP_TRY(enqueue(c, o.heads, need));
    KVKEEP_TRY(enqueue(c, o.entries, need));
    ws.take<std::byte>(need.peak());  // both find room, or none runs
    if (!placed(ws)) return not_placed(ws);
  }
  KVKEEP_TRY(enqueue(c, o.heads, ws));
  return enqueue(c, o.entries, ws);
}

}  // namespace KVKEEP_CPU_ISA
}  // namespace kvkeep::cpu
