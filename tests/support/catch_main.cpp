// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// The main function of all host tests with Catch2 2, compiled once. Catch2 3 brings its own.
#define CATCH_CONFIG_MAIN
#include "catch.hpp"
