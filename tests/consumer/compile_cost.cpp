// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// The unit whose compile time and memory are bounded by ctest: it includes everything and runs one policy.
#include <kvkeep/kvkeep.hpp>

using namespace kvkeep;

status generate(std::span<layer_spec<> const> layers, queries const& prompt, queries const& token,
                float* out) {
  cpu::context ctx;
  auto s = bind_session(ctx, make_morphkv({.capacity = 64, .window = 16}), layers, limits{});
  index_t id = 0;
  index_t slots[64];
  KVKEEP_TRY(s.begin(id));
  KVKEEP_TRY(s.observe(0, id, prompt));
  KVKEEP_TRY(s.end_prompt(id));
  KVKEEP_TRY(s.append(0, {{&id, 1}}, slots));
  KVKEEP_TRY(s.attend(0, {{&id, 1}}, token, out));
  KVKEEP_TRY(s.confirm({{&id, 1}}, 1));
  return s.end(id);
}
