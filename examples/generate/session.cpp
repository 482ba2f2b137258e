// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
// The one file that compiles a session: it takes as long as the rest of the engine.
#include "generate/engine_state.hpp"

template class kvkeep::session<kvkeep::cpu::context, kvkeep::generate::any, kvkeep::generate::any>;

namespace kvkeep::generate::detail {

session_type bind(cpu::context& ctx, policy_pair const& p, std::span<layer_spec<> const> layers,
                  limits const& lim) {
  return bind_session(ctx, p.prompt, p.decode, layers, lim);
}

}  // namespace kvkeep::generate::detail
