# SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
# kvkeep::cpu: the CPU backend's ops and the session of run-time-chosen policies, compiled once, for
# programs with many units. The headers alone do as well. Whoever links it compiles for the same
# instruction set (another one does not link: its name is part of the symbols).
# Installed with its sources: see kvkeepConfig.cmake.in.
if(TARGET kvkeep_cpu)
  return()
endif()
set(kvkeep_sources "${CMAKE_CURRENT_LIST_DIR}/../src")
add_library(kvkeep_cpu STATIC EXCLUDE_FROM_ALL
  "${kvkeep_sources}/cpu_ops.cpp" "${kvkeep_sources}/cpu_engine.cpp")
add_library(kvkeep::cpu ALIAS kvkeep_cpu)
target_compile_definitions(kvkeep_cpu PUBLIC KVKEEP_CPU_COMPILED)
target_link_libraries(kvkeep_cpu PUBLIC kvkeep::kvkeep)
if(TARGET kvkeep_dev)
  target_link_libraries(kvkeep_cpu PRIVATE kvkeep_dev kvkeep_dev_arch)
endif()
