# SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
# What tests, benchmarks and examples need; the library itself needs none of it. Looked for in this order:
# an install prefix in KVKEEP_CARRIED, the system, sources in KVKEEP_CARRIED/<name>, and, only with
# KVKEEP_FETCH_DEPENDENCIES=ON, the network.
include(FetchContent)

set(KVKEEP_CARRIED "${PROJECT_SOURCE_DIR}/carried" CACHE PATH
    "Dependencies brought along to a machine that reaches no registry")
list(APPEND CMAKE_PREFIX_PATH "${KVKEEP_CARRIED}" "${KVKEEP_CARRIED}/usr")

# kvkeep_find(NAME TARGET REPOSITORY TAG): an installed package, or sources, with their headers as system
# headers.
macro(kvkeep_find name target repository tag)
  find_package(${name} QUIET CONFIG)
  if(NOT TARGET ${target})
    if(EXISTS "${KVKEEP_CARRIED}/${name}/CMakeLists.txt")
      string(TOUPPER ${name} kvkeep_name)
      set(FETCHCONTENT_SOURCE_DIR_${kvkeep_name} "${KVKEEP_CARRIED}/${name}")
    endif()
    if(KVKEEP_FETCH_DEPENDENCIES OR EXISTS "${KVKEEP_CARRIED}/${name}/CMakeLists.txt")
      FetchContent_Declare(${name}
        GIT_REPOSITORY ${repository} GIT_TAG ${tag} GIT_SHALLOW ON SYSTEM)
      FetchContent_MakeAvailable(${name})
    endif()
  endif()
endmacro()

if(KVKEEP_TESTS)
  kvkeep_find(Catch2 Catch2::Catch2 https://github.com/catchorg/Catch2.git v3.7.1)
  if(NOT TARGET Catch2::Catch2)
    message(FATAL_ERROR "KVKEEP_TESTS needs Catch2 (2 or 3): install it, carry it (CONTRIBUTING.md), set "
                        "KVKEEP_FETCH_DEPENDENCIES=ON, or set KVKEEP_TESTS=OFF.")
  endif()
endif()

if(KVKEEP_BENCH)
  set(BENCHMARK_ENABLE_TESTING OFF)
  set(BENCHMARK_ENABLE_INSTALL OFF)
  kvkeep_find(benchmark benchmark::benchmark https://github.com/google/benchmark.git v1.9.0)
  if(NOT TARGET benchmark::benchmark)
    message(FATAL_ERROR "KVKEEP_BENCH needs Google Benchmark: install it, carry it (CONTRIBUTING.md), set "
                        "KVKEEP_FETCH_DEPENDENCIES=ON, or set KVKEEP_BENCH=OFF.")
  endif()
endif()

# JSON and command lines: the tools in examples, and tests that read the recorded cases.
if(KVKEEP_EXAMPLES OR KVKEEP_TESTS)
  kvkeep_find(nlohmann_json nlohmann_json::nlohmann_json https://github.com/nlohmann/json.git v3.11.3)
endif()
if(KVKEEP_EXAMPLES)
  kvkeep_find(CLI11 CLI11::CLI11 https://github.com/CLIUtils/CLI11.git v2.4.2)
endif()
