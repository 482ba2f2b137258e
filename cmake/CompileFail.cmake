# SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
# cmake -D COMPILER=... -D SOURCE=... -D ARGUMENTS=a;b -P CompileFail.cmake
# Succeeds when SOURCE does not compile and the first error line matches the regex (CMake's dialect)
# in its line "// EXPECT: regex". Later errors are not looked at: a user reads the first one.
file(STRINGS "${SOURCE}" expect REGEX "^// EXPECT: " LIMIT_COUNT 1)
if(NOT expect)
  message(FATAL_ERROR "${SOURCE}: no line '// EXPECT: regex'")
endif()
string(REGEX REPLACE "^// EXPECT: " "" expect "${expect}")

execute_process(
  COMMAND "${CMAKE_COMMAND}" -E env LC_ALL=C "${COMPILER}" ${ARGUMENTS} -fsyntax-only "${SOURCE}"
  RESULT_VARIABLE result OUTPUT_VARIABLE output ERROR_VARIABLE output)
if(result EQUAL 0)
  message(FATAL_ERROR "${SOURCE} compiles, and should not")
endif()
# Brackets and semicolons have a meaning in lists, so the line is cut out of the text instead.
if(NOT "\n${output}" MATCHES "\n([^\n]*error: [^\n]*)")
  message(FATAL_ERROR "${SOURCE}: the compiler failed without an error line:\n${output}")
endif()
set(first "${CMAKE_MATCH_1}")
if(NOT "${first}" MATCHES "${expect}")
  message(FATAL_ERROR "${SOURCE}: the first error is\n  ${first}\nand should match\n  ${expect}")
endif()
message(STATUS "${first}")
