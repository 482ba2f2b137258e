// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// @file
/// Version, host-device marker and build switches. The only header with configuration macros.
#pragma once

#define KVKEEP_VERSION_MAJOR 0
#define KVKEEP_VERSION_MINOR 1
#define KVKEEP_VERSION_PATCH 0
#define KVKEEP_VERSION \
  (KVKEEP_VERSION_MAJOR * 10000 + KVKEEP_VERSION_MINOR * 100 + KVKEEP_VERSION_PATCH)

#if defined(__CUDACC__) || defined(__HIPCC__)
#define KVKEEP_HD __host__ __device__
#else
#define KVKEEP_HD
#endif

/// Set-up code runs once: compilers shall keep it small and out of the way.
#if defined(__GNUC__) && !defined(__CUDACC__)
#define KVKEEP_COLD __attribute__((cold, noinline))
#else
#define KVKEEP_COLD
#endif

#if defined(__cpp_exceptions) || defined(__EXCEPTIONS)
#define KVKEEP_HAS_EXCEPTIONS 1
#else
#define KVKEEP_HAS_EXCEPTIONS 0
#endif

/// The CPU backend's instruction set is chosen when a file is compiled. Its name is part of the symbol
/// names (inline namespace), so that files compiled with different flags can be linked together.
#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define KVKEEP_CPU_AVX2 1
#else
#define KVKEEP_CPU_AVX2 0
#endif
#if KVKEEP_CPU_AVX2 && defined(__AVX512F__)
#define KVKEEP_CPU_AVX512 1
#define KVKEEP_CPU_ISA isa_avx512
#elif KVKEEP_CPU_AVX2
#define KVKEEP_CPU_AVX512 0
#define KVKEEP_CPU_ISA isa_avx2
#else
#define KVKEEP_CPU_AVX512 0
#define KVKEEP_CPU_ISA isa_generic
#endif

/// Programs that link the library kvkeep::cpu (src/) define KVKEEP_CPU_COMPILED: the CPU backend's ops
/// and the session of run-time-chosen policies are then declared only, and units compile faster.
#if defined(KVKEEP_CPU_COMPILED)
#define KVKEEP_CPU_OP
#else
#define KVKEEP_CPU_OP inline
#endif
