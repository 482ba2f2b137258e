// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
// EXPECT: call to .run(.user::context&, const kvkeep::op::mean_heads<>&|.$)
// A backend without an op: the first error is the constraint that names context and op.
#include <kvkeep/op/reduce.hpp>

namespace user {
struct context {};
}  // namespace user

template <>
struct kvkeep::backend_traits<user::context> {
  using space = kvkeep::host_space;
  static constexpr char const* name = "user";
};

int main() {
  user::context c;
  kvkeep::workspace w;
  kvkeep::op::mean_heads<> const o{};
  return kvkeep::run(c, o, w) == kvkeep::status::ok ? 0 : 1;
}
