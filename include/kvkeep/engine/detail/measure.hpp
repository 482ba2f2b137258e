// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// How much scratch a session needs: its steps run once with a workspace that only counts.
#pragma once

#include <algorithm>
#include <string>

#include "../state.hpp"

namespace kvkeep::detail {

/// Bytes of an arena that begins anywhere.
constexpr std::size_t padded_scratch(std::size_t n) noexcept {
  return (n + 2 * workspace::alignment) / workspace::alignment * workspace::alignment;
}

/// The scratch that the largest of a session's steps takes.
class scratch_meter {
 public:
  /// Runs `step(workspace)` with a measuring workspace.
  template <class F>
  KVKEEP_COLD void operator()(F&& step) {
    workspace w;
    if (status const s = step(w); s != status::ok)
      fail_setup(std::string("the backend cannot run a step of this policy: ") + to_string(s));
    most_ = std::max(most_, w.peak());
  }
  std::size_t bytes() const noexcept { return padded_scratch(most_); }

 private:
  std::size_t most_ = 0;
};

/// The largest transient prompt, or the cache itself, for such measures.
template <class Space>
cache_source<Space> largest_prompt(cache_source<Space> pool, staging_state<Space> const& staging,
                                   index_t max_prompt) noexcept {
  if (max_prompt == 0) return pool;
  pool.layer.kv.shape.max_slots = max_prompt;
  pool.layer.slots = staging.slots;
  return pool;
}

}  // namespace kvkeep::detail
