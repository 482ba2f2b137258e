// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// Sessions of run-time-chosen policies on the CPU: their names, and where they are compiled.
#pragma once

#include "../backend/cpu/cpu.hpp"
#include "policy_table.hpp"
#include "session.hpp"

namespace kvkeep {

using any_cpu_policy = any_policy<cpu::context>;
using any_cpu_session = session<cpu::context, any_cpu_policy>;

#if defined(KVKEEP_CPU_COMPILED)
extern template any_cpu_policy make_policy<cpu::context>(std::string_view, policy_options const&);
extern template class session<cpu::context, any_cpu_policy>;
extern template any_cpu_session bind_session<cpu::context, any_cpu_policy, any_cpu_policy>(
    cpu::context&, any_cpu_policy const&, any_cpu_policy const&, std::span<layer_spec<> const>,
    limits const&, std::span<std::byte>);
#endif

}  // namespace kvkeep
