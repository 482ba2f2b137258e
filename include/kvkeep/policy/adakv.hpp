// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// AdaKV: SnapKV's scores, heads of a layer budgeted by their share of the layer's best scores.
#pragma once

#include "../budget/ada_heads.hpp"
#include "snapkv.hpp"

namespace kvkeep {

/// Spec 5.3; arXiv 2407.11550, KVCache-Factory AdaKVCluster, FFY0/AdaKV, kvpress AdaKVPress.
/// Lengths differ among heads: use a ragged view or block tables per KV head (a strided view works too,
/// with room for the longest head). Deviations: see budget/ada_heads.hpp.
using adakv = window_policy<ada_heads>;

struct adakv_options {
  double alpha = 0.2;
  bool normalize = false;
  ada_form form = ada_form::exact;
};

/// The published code takes the mean over window rows: `o.rows = mean` gives its scores.
inline adakv make_adakv(window_options const& o, adakv_options const& a = {}) {
  return {"adakv",
          make_window_score(o),
          {o.capacity, a.alpha, a.normalize, a.form},
          {},
          {o.sinks, o.window}};
}

}  // namespace kvkeep
