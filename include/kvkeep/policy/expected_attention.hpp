// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// ExpectedAttention: the prompt's tokens that queries to come are expected to attend to.
#pragma once

#include "../score/expected_attention.hpp"
#include "policy.hpp"

namespace kvkeep {

/// Spec 3.10; arXiv 2510.00636, kvpress ExpectedAttentionPress. At the end of the prompt only. The capacity is a number
/// of tokens, not a ratio. With budget `ada_heads` its scores are compared over the heads of a layer.
/// Deviations: see score/expected_attention.hpp.
using expected_attention = policy<expected_attention_score>;

struct expected_attention_options {
  index_t capacity = 1024;
  index_t sinks = 4;
  rope rotation{};      ///< the model's: nobody notices another one
  bool rotated = true;  ///< queries come with their rotation
  index_t ahead = 512;
  bool covariance = true;
  bool value_norms = true;
  double epsilon = 0;
};

inline expected_attention make_expected_attention(expected_attention_options const& o) {
  expected_attention_score s;
  s.rotation = o.rotation;
  s.rotated = o.rotated;
  s.ahead = o.ahead;
  s.sinks = o.sinks;
  s.covariance = o.covariance;
  s.value_norms = o.value_norms;
  s.epsilon = static_cast<float>(o.epsilon);
  return {"expected_attention", s, {o.capacity}, {}, {o.sinks, 0}};
}

}  // namespace kvkeep
