// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// CAKE: tokens that the last W queries attend to, much or changeably; layers budgeted by how their attention spreads.
#pragma once

#include "../budget/cake_layers.hpp"
#include "../score/spread.hpp"
#include "policy.hpp"

namespace kvkeep {

/// Spec 5.5; arXiv 2503.12491, antgroup/cakekv. At the end of the prompt only. C includes the window.
/// Deviations: see score/spread.hpp and budget/cake_layers.hpp; decoding evicts by whatever policy is bound beside it.
using cake = policy<spread_score, cake_layers>;

/// The paper tunes tau1 and tau2 for model and capacity: for Llama-3.1-8B and C = 1024 1.6 and 0.4.
struct cake_options {
  index_t capacity = 1024;
  index_t window = 32;
  index_t kernel = 5;
  double gamma = 200;
  double tau1 = 1;
  double tau2 = 1;
  index_t every = 1;
  index_t sinks = 0;
};

inline cake make_cake(cake_options const& o) {
  spread_score s;
  s.window = o.window;
  s.kernel = o.kernel;
  s.gamma = static_cast<float>(o.gamma);
  return {"cake", s, {o.capacity, o.tau1, o.tau2, o.every}, {}, {o.sinks, o.window}};
}

}  // namespace kvkeep
