// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
// EXPECT: call to .run(.kvkeep::cpu::[a-z0-9_]+::context&, const kvkeep::op::mean_heads<kvkeep::device_space>&|.$)
// An op on device memory does not run on the host's context.
#include <kvkeep/backend/cpu/cpu.hpp>

int main() {
  kvkeep::cpu::context c;
  kvkeep::workspace w;
  kvkeep::op::mean_heads<kvkeep::device_space> const o{};
  return kvkeep::run(c, o, w) == kvkeep::status::ok ? 0 : 1;
}
