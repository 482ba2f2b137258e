// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
#include <kvkeep/policy/streamingllm.hpp>

#include "steps.hpp"

namespace bench {
namespace {

parts_of_unit const steps_streamingllm(
    {{"steps of streamingllm", [](suite& s) {
        add_policy_rows(s, "streamingllm", false, [](point const& p) {
          return make_streamingllm({.capacity = p.capacity, .make_room_first = false});
        });
      }}});

}  // namespace
}  // namespace bench
