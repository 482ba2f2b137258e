// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
// The main function of the CUDA benchmarks' programs. Exits 77 without a device.
#include "driver.hpp"

int main(int argc, char** argv) { return bench::run_on_device(argc, argv); }
