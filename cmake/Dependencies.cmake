# SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
# What tests, benchmarks and examples need; the library itself needs none of it. Installed packages
# come first. Downloads happen only with KVKEEP_FETCH_DEPENDENCIES=ON.
include(FetchContent)

# kvkeep_fetch(NAME REPOSITORY TAG [arguments of FetchContent_Declare]): downloads NAME, with its
# headers as system headers.
macro(kvkeep_fetch name repository tag)
  FetchContent_Declare(${name}
    GIT_REPOSITORY ${repository} GIT_TAG ${tag} GIT_SHALLOW ON SYSTEM ${ARGN})
  FetchContent_MakeAvailable(${name})
endmacro()

if(KVKEEP_TESTS)
  find_package(Catch2 QUIET CONFIG)
  if(NOT TARGET Catch2::Catch2 AND KVKEEP_FETCH_DEPENDENCIES)
    kvkeep_fetch(Catch2 https://github.com/catchorg/Catch2.git v3.7.1)
  endif()
  if(NOT TARGET Catch2::Catch2)
    message(FATAL_ERROR "KVKEEP_TESTS needs Catch2 (2 or 3): install it, set "
                        "KVKEEP_FETCH_DEPENDENCIES=ON, or set KVKEEP_TESTS=OFF.")
  endif()
endif()

if(KVKEEP_BENCH)
  find_package(benchmark QUIET CONFIG)
  if(NOT TARGET benchmark::benchmark AND KVKEEP_FETCH_DEPENDENCIES)
    set(BENCHMARK_ENABLE_TESTING OFF)
    set(BENCHMARK_ENABLE_INSTALL OFF)
    kvkeep_fetch(benchmark https://github.com/google/benchmark.git v1.9.0)
  endif()
  if(NOT TARGET benchmark::benchmark)
    message(FATAL_ERROR "KVKEEP_BENCH needs Google Benchmark: install it, set "
                        "KVKEEP_FETCH_DEPENDENCIES=ON, or set KVKEEP_BENCH=OFF.")
  endif()
endif()

# JSON and command lines: the tools in examples, and tests that read the recorded cases.
if(KVKEEP_EXAMPLES OR KVKEEP_TESTS)
  find_package(nlohmann_json QUIET CONFIG)
  if(NOT TARGET nlohmann_json::nlohmann_json AND KVKEEP_FETCH_DEPENDENCIES)
    kvkeep_fetch(nlohmann_json https://github.com/nlohmann/json.git v3.11.3)
  endif()
endif()
if(KVKEEP_EXAMPLES)
  find_package(CLI11 QUIET CONFIG)
  if(NOT TARGET CLI11::CLI11 AND KVKEEP_FETCH_DEPENDENCIES)
    kvkeep_fetch(CLI11 https://github.com/CLIUtils/CLI11.git v2.4.2)
  endif()
endif()
