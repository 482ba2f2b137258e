// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// The unit whose compile time and memory are bounded by ctest: everything that a host engine includes.
#include <kvkeep/kvkeep.hpp>

int version() { return KVKEEP_VERSION; }
