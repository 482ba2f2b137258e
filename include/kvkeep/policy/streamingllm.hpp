// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// StreamingLLM: attention sinks and the most recent tokens.
#pragma once

#include "policy.hpp"

namespace kvkeep {

/// Spec 3.2; arXiv 2309.17453, mit-han-lab/streaming-llm kv_cache.py. Keeps the S oldest and the C - S
/// newest tokens. `make_room_first` (what the published loop calls): attention never sees more than C
/// tokens; otherwise a token is appended, attended to with C others, and then the oldest leaves.
/// Deviations: positions stay the original ones (the published model code rotates by cache rank);
/// sinks are explicit (KVCache-Factory's variant is sinks = C - W).
using streamingllm = policy<slot_score<position_fn>>;

struct streamingllm_options {
  index_t capacity = 1024;  ///< C = sinks + recent
  index_t sinks = 4;
  bool make_room_first = true;
};

inline streamingllm make_streamingllm(streamingllm_options const& o) {
  cadence when;
  when.room = o.make_room_first ? 1 : 0;
  return {"streamingllm", {}, {o.capacity}, {}, {o.sinks, 0}, scope::head, when};
}

}  // namespace kvkeep
