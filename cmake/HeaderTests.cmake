# SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
# kvkeep_add_header_tests(TARGET): an object library with one unit per public host header, so that
# each header is known to compile alone and twice. Without optimisation and debug data this costs
# little more than -fsyntax-only, and leaves an object that tells the build what is up to date.
function(kvkeep_add_header_tests target)
  set(root "${PROJECT_SOURCE_DIR}/include")
  file(GLOB_RECURSE headers CONFIGURE_DEPENDS RELATIVE "${root}" "${root}/kvkeep/*.hpp")
  set(units "")
  foreach(header IN LISTS headers)
    string(REGEX REPLACE "\\.hpp$" ".cpp" unit "${CMAKE_CURRENT_BINARY_DIR}/header_tests/${header}")
    file(CONFIGURE OUTPUT "${unit}"
         CONTENT "#include <${header}>\n#include <${header}>  // twice: guarded\n")
    list(APPEND units "${unit}")
  endforeach()
  if(units)
    add_library(${target} OBJECT ${units})
    target_link_libraries(${target} PRIVATE kvkeep_dev kvkeep_dev_arch)
    target_compile_options(${target} PRIVATE -O0 -g0)
  endif()
endfunction()
