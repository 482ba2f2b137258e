// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// The main function of all device tests: exits 77 (skipped, for ctest) where no device can be used.
#define CATCH_CONFIG_RUNNER
#include "catch.hpp"

#include <cuda_runtime_api.h>

#include <cstdio>

int main(int argc, char** argv) {
  int devices = 0;
  cudaError_t const error = cudaGetDeviceCount(&devices);
  if (error != cudaSuccess || devices == 0) {
    std::fprintf(stderr, "skipped: %s\n", cudaGetErrorString(error));
    return 77;
  }
  int const failed = Catch::Session().run(argc, argv);
  return failed == 0 ? 0 : 1;  // never 77 by chance
}
