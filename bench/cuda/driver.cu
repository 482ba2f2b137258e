// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
// The CUDA backend's benchmarks: calibration, checks against the CPU backend, rows. Exits 77 without a device.
#include "driver.hpp"

int main(int argc, char** argv) { return bench::run_on_device(argc, argv); }
