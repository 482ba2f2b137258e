// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// What a call cannot avoid, by rates that the device has shown. Plain host code.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <vector>

namespace bench {

/// Rates of the device, measured (calibration.cu). Per second; `node` in seconds.
struct peaks {
  double node = 0;   ///< an empty kernel in a graph
  double copy = 0;   ///< bytes, those read and those written
  double read = 0;   ///< bytes
  double mma = 0;    ///< bf16 operations of mma.sync
  double wgmma = 0;  ///< bf16 operations of wgmma; 0: this program or device has none
  double fma = 0;    ///< fp32 operations of fused multiply-adds
  double exp2 = 0;   ///< exponentials
};

/// Work of one call. Sums over the batch.
struct work {
  double read = 0;   ///< bytes that are only read
  double moved = 0;  ///< bytes that are copied, those read and those written
  double mma = 0;    ///< operations on 16-bit operands, by warps
  double wgmma = 0;  ///< the same, by warpgroups
  double fma = 0;    ///< operations on fp32 operands
  double exps = 0;   ///< exponentials

  double bytes() const { return read + moved; }
  double flops() const { return mma + wgmma + fma; }
};

/// One kernel's start, and the longest of what can go on at once.
inline double floor_of(work const& w, peaks const& p) {
  auto const at = [](double amount, double rate) { return amount > 0 ? amount / rate : 0; };
  double const memory = at(w.read, p.read) + at(w.moved, p.copy);
  double const compute = at(w.mma, p.mma) + at(w.wgmma, p.wgmma) + at(w.fma, p.fma);
  return p.node + std::max({memory, compute, at(w.exps, p.exp2)});
}

/// How calls rotate through inputs: `sets` of them, each used `calls / sets` times in a recording.
struct rotation {
  std::size_t sets = 1;
  std::size_t calls = 1;
};

/// So many sets that a call's inputs have left every cache when their turn comes again.
/// @param set_bytes  inputs of a call
/// @param all_bytes  wanted of all sets together
/// @param least_calls  of a recording, so that its start does not count
/// @param least_sets   however large they are
inline rotation rotate(double set_bytes, double all_bytes, std::size_t least_calls,
                       std::size_t least_sets = 1) {
  constexpr double most_sets = 1024;
  auto const sets = static_cast<std::size_t>(
      std::clamp(std::ceil(all_bytes / set_bytes), static_cast<double>(least_sets), most_sets));
  return {sets, (least_calls + sets - 1) / sets * sets};
}

}  // namespace bench
