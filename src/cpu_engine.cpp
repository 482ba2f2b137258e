// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
// Sessions of run-time-chosen policies, compiled once (target kvkeep::cpu).
#include <kvkeep/engine/cpu_engine.hpp>

namespace kvkeep {

template any_cpu_policy make_policy<cpu::context>(std::string_view, policy_options const&);
template class session<cpu::context, any_cpu_policy>;
template any_cpu_session bind_session<cpu::context, any_cpu_policy, any_cpu_policy>(
    cpu::context&, any_cpu_policy const&, any_cpu_policy const&, std::span<layer_spec<> const>,
    limits const&, std::span<std::byte>);

}  // namespace kvkeep
