# SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
# kvkeep_dev_arch: the instruction set of our own tests, benchmarks and examples. Consumers choose
# theirs.
set(kvkeep_default_arch "")
if(NOT DEFINED CACHE{KVKEEP_ARCH} AND NOT DEFINED KVKEEP_ARCH AND PROJECT_IS_TOP_LEVEL
   AND NOT CMAKE_CROSSCOMPILING AND CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64|amd64)$")
  include(CheckCXXCompilerFlag)
  include(CheckCXXSourceRuns)
  check_cxx_compiler_flag(-march=x86-64-v3 KVKEEP_COMPILER_HAS_X86_64_V3)
  if(KVKEEP_COMPILER_HAS_X86_64_V3)
    set(CMAKE_REQUIRED_FLAGS -march=x86-64-v3)
    # volatile: the instructions must run on this host, not in the compiler.
    check_cxx_source_runs("
      #include <immintrin.h>
      int main() {
        volatile int seed = 1;
        __m256 const a = _mm256_set1_ps(static_cast<float>(seed));
        __m256 const b = _mm256_cvtph_ps(_mm_set1_epi16(static_cast<short>(seed)));
        __m256i const c = _mm256_add_epi32(_mm256_cvtps_epi32(_mm256_fmadd_ps(a, b, a)),
                                           _mm256_set1_epi32(seed));
        return _mm256_extract_epi32(c, 0) == 2 ? 0 : 1;
      }" KVKEEP_HOST_RUNS_X86_64_V3)
    unset(CMAKE_REQUIRED_FLAGS)
    if(KVKEEP_HOST_RUNS_X86_64_V3)
      set(kvkeep_default_arch x86-64-v3)
    endif()
  endif()
endif()
set(KVKEEP_ARCH "${kvkeep_default_arch}" CACHE STRING
    "-march of our own programs; empty for the compiler's default")

# The AVX-512 path has tests of its own, where they can run.
if(PROJECT_IS_TOP_LEVEL AND NOT CMAKE_CROSSCOMPILING AND KVKEEP_ARCH STREQUAL "x86-64-v3")
  include(CheckCXXSourceRuns)
  set(CMAKE_REQUIRED_FLAGS -march=x86-64-v4)
  check_cxx_source_runs("
    #include <immintrin.h>
    int main() {
      volatile int seed = 1;
      __m512i const a = _mm512_maskz_add_epi32(0xffff, _mm512_set1_epi32(seed), _mm512_set1_epi32(1));
      __m256i const b = _mm256_maskz_add_epi32(0xff, _mm512_castsi512_si256(a), _mm256_set1_epi32(1));
      return _mm256_extract_epi32(b, 0) == 3 ? 0 : 1;
    }" KVKEEP_HOST_RUNS_X86_64_V4)
  unset(CMAKE_REQUIRED_FLAGS)
endif()

add_library(kvkeep_dev_arch INTERFACE)
if(KVKEEP_ARCH)
  target_compile_options(kvkeep_dev_arch INTERFACE $<$<COMPILE_LANGUAGE:CXX>:-march=${KVKEEP_ARCH}>)
endif()
