// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
#include <kvkeep/kvkeep.hpp>

#include <vector>

/// Slots in use after a prompt of 12 tokens under a typed policy that keeps 8.
int kept_in_a() {
  using namespace kvkeep;
  cache_shape const shape{1, 2, 1, 4, 4, 12};
  std::vector<float> k(12 * 4, 0.5F), v = k;
  layer_spec<> const layers[] = {contiguous_view(k.data(), v.data(), shape)};
  cpu::context ctx;
  auto s = bind_session(ctx, make_knorm({.capacity = 8}), std::span<layer_spec<> const>(layers),
                        limits{});
  index_t id = 0;
  if (s.begin(id) != status::ok || s.observe(0, id, tokens_only(12)) != status::ok ||
      s.end_prompt(id) != status::ok)
    return -1;
  return s.lengths(0)(id, 0);
}
