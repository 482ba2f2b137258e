// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// LagKV: tokens judged against the range of the partition after theirs.
#pragma once

#include "../score/geometry.hpp"
#include "policy.hpp"

namespace kvkeep {

/// Spec 3.8; arXiv 2504.04704, kvpress LagKVPress. At the end of the prompt; prompts shorter than
/// sinks + 2 * lag are not cut. The capacity is a number of tokens, not a ratio.
/// Deviations: see score/geometry.hpp.
using lagkv = policy<lag_score>;

struct lagkv_options {
  index_t capacity = 1024;
  index_t sinks = 4;
  index_t lag = 128;
  bool cross_scoring = false;
};

inline lagkv make_lagkv(lagkv_options const& o) {
  lag_score s;
  s.sinks = o.sinks;
  s.lag = o.lag;
  s.cross_scoring = o.cross_scoring;
  return {"lagkv", s, {o.capacity}, {}, {}};
}

}  // namespace kvkeep
