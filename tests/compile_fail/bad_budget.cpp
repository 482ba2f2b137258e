// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
// EXPECT: no matching function for call to .bind_session
// A budget without the members of budget_rule.
#include <kvkeep/kvkeep.hpp>

struct half_of_everything {
  kvkeep::index_t tokens = 8;
};

int main() {
  kvkeep::policy<kvkeep::heavy_hitter_score, half_of_everything> p;
  kvkeep::cpu::context c;
  kvkeep::layer_spec<> const layers[1];
  auto s =
      kvkeep::bind_session(c, p, std::span<kvkeep::layer_spec<> const>(layers), kvkeep::limits{});
  return s.verify() == kvkeep::status::ok ? 0 : 1;
}
