// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// Catch2 2 or 3 behind one include. Tests write `Approx` without a namespace in both.
#pragma once

#if __has_include(<catch2/catch_all.hpp>)
#include <catch2/catch_all.hpp>
using Catch::Approx;
#else
#include <catch2/catch.hpp>
#endif
