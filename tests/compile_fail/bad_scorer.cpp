// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
// EXPECT: no matching function for call to .bind_session
// A scorer that does not score.
#include <kvkeep/kvkeep.hpp>

struct nothing_to_score : kvkeep::scorer_base {
  kvkeep::scorer_traits traits() const { return {}; }
};

int main() {
  kvkeep::policy<nothing_to_score> p;
  kvkeep::cpu::context c;
  kvkeep::layer_spec<> const layers[1];
  auto s =
      kvkeep::bind_session(c, p, std::span<kvkeep::layer_spec<> const>(layers), kvkeep::limits{});
  return s.verify() == kvkeep::status::ok ? 0 : 1;
}
