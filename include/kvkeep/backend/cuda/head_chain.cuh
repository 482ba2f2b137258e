// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// CUDA: a chain's ops as stages of one kernel.
#pragma once

#include "launch.cuh"

namespace kvkeep::cuda {

/// The stages of a chain's ops, their scratch taken. The first check that fails is the result.
template <class... Ops>
auto plan_each(context const& c, sequence<Ops...> const& ops, workspace& ws,
               status& result) noexcept {
  if constexpr (sizeof...(Ops) == 0) {
    return sequence<>{};
  } else {
    auto const p = stage_of(c, ops.first, ws);
    if (result == status::ok) result = p.result;
    auto const rest = plan_each(c, ops.rest, ws, result);
    return [&]<class... Rest>(sequence<Rest...> const& r) {
      return sequence<typename decltype(stage_of(c, ops.first, ws))::stage_type, Rest...>{p.stage,
                                                                                          r};
    }(rest);
  }
}

/// Starts the kernels that stages have need of in front.
template <class... Stages>
status begin_each(context const& c, sequence<Stages...>& stages) noexcept {
  if constexpr (sizeof...(Stages) > 0) {
    if constexpr (requires { begin(c, stages.first); }) KVKEEP_TRY(begin(c, stages.first));
    return begin_each(c, stages.rest);
  }
  return status::ok;
}

/// One kernel, and before it those that its stages have need of.
template <class... Ops>
status enqueue(context& c, op::head_chain<device_space, Ops...> const& o, workspace& ws) noexcept {
  workspace::frame const frame(ws);
  status result = status::ok;
  auto stages = plan_each(c, o.ops, ws, result);
  if (result != status::ok) return result;
  if (!ws.ok()) return status::workspace_too_small;
  context const on = launching(c, ws);
  KVKEEP_TRY(begin_each(on, stages));
  return launch_stages(on, o.n_entries, o.n_heads, o.max_slots, stages);
}

/// One kernel for both.
template <class... Head, class... Entry>
status enqueue(context& c,
               op::joined_chain<device_space, op::head_chain<device_space, Head...>,
                                op::head_chain<device_space, Entry...>> const& o,
               workspace& ws) noexcept {
  if (!o.fits() || (o.tickets == nullptr && !ws.measuring())) return status::bad_argument;
  workspace::frame const frame(ws);
  status result = status::ok;
  auto heads = plan_each(c, o.heads.ops, ws, result);
  auto const entries = plan_each(c, o.entries.ops, ws, result);
  if (result != status::ok) return result;
  if (!ws.ok()) return status::workspace_too_small;
  context const on = launching(c, ws);
  KVKEEP_TRY(begin_each(on, heads));
  joined_kernel<decltype(heads), std::remove_const_t<decltype(entries)>> const kernel{
      {heads, o.heads.n_heads}, entries, reinterpret_cast<unsigned*>(o.tickets)};
  return launch_heads(on, o.heads.n_entries, o.heads.n_heads, o.heads.max_slots,
                      std::max(most_shared(heads), most_shared(entries)), kernel);
}

}  // namespace kvkeep::cuda
