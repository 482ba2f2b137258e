// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// What the memory accesses of emulated kernels would cost a device, counted: no time, but whether a kernel reads its
/// arrays once, in whole sectors, and its shared memory without bank conflicts.
#pragma once

#include <cstddef>
#include <map>
#include <string>

namespace emulation {

/// A device moves memory by so many bytes.
inline constexpr std::size_t sector_bytes = 32;

/// Accesses of one array. A request is an instruction of a warp.
struct array_traffic {
  double requests = 0;
  double bytes = 0;     ///< that its lanes asked for; what several lanes ask for counts once
  double sectors = 0;   ///< that they lie in, of each request anew
  double distinct = 0;  ///< the same, of each launch once

  /// Bytes moved to the multiprocessors for each that was asked for.
  double waste() const { return sectors * sector_bytes / bytes; }
  /// How often a launch moves what it touches.
  double passes() const { return sectors / distinct; }
};

/// Accesses of shared memory. It serves 32 banks of 4 bytes at a time.
struct shared_traffic {
  double requests = 0;
  double rounds = 0;  ///< that it takes
  double least = 0;   ///< that requests of this width take in any case

  double conflicts() const { return rounds / least; }
};

struct traffic {
  std::map<std::string, array_traffic> read, written;  ///< by array
  shared_traffic shared;
};

/// From now on accesses of an array are counted under this name, others are not. Arrays do not overlap.
void watch_array(std::string name, void const* begin, std::size_t bytes);
/// Forgets all arrays and counts.
void forget_traffic();
/// Of what has run since.
traffic const& traffic_so_far();

}  // namespace emulation
