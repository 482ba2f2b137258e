// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// What compile_cost.cpp is compared with: the standard headers that kvkeep includes, and nothing else.
#include <algorithm>
#include <atomic>
#include <bit>
#include <cfloat>
#include <cmath>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>
#include <thread>
#include <type_traits>
#include <utility>
#include <variant>
#include <vector>

std::vector<std::string> names(std::span<int const> values) {
  std::vector<std::string> r;
  for (int const v : values) r.push_back(std::to_string(v));
  std::sort(r.begin(), r.end());
  return r;
}
