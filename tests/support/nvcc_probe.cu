// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// Compiled by nvcc in every CUDA build: the host umbrella must be readable in a CUDA file.
#include <kvkeep/kvkeep.hpp>

__global__ void read_version(int* out) { *out = KVKEEP_VERSION; }
