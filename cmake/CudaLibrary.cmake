# SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
# kvkeep::cuda_ops: the CUDA backend's ops, compiled once, for programs with several units or of few ops. The headers
# alone do as well, but a unit that includes them compiles every kernel.
# kvkeep::cuda_engine: besides, the device session of run-time-chosen policies (engine/cuda_engine.cuh).
# Installed with its sources: see kvkeepConfig.cmake.in.
if(NOT TARGET kvkeep::cuda OR TARGET kvkeep_cuda_ops)
  return()
endif()

# kvkeep_add_cuda_ops(NAME [ARCHITECTURES]): for CMAKE_CUDA_ARCHITECTURES or those. Whoever links it compiles for the
# same.
function(kvkeep_add_cuda_ops name)
  set(units attend attend_f32 attend_f16 attend_bf16 attend_e4m3 window slots)
  list(TRANSFORM units REPLACE "(.+)" "${CMAKE_CURRENT_FUNCTION_LIST_DIR}/../src/cuda_\\1.cu")
  add_library(${name} STATIC EXCLUDE_FROM_ALL ${units})
  target_compile_definitions(${name} PUBLIC KVKEEP_CUDA_COMPILED)
  target_link_libraries(${name} PUBLIC kvkeep::cuda)
  if(ARGN)
    set_target_properties(${name} PROPERTIES CUDA_ARCHITECTURES "${ARGN}")
  endif()
  if(TARGET kvkeep_dev)
    target_link_libraries(${name} PRIVATE kvkeep_dev)
    kvkeep_strict_kernels(${name})
  endif()
endfunction()

# kvkeep_strict_kernels(TARGET): a kernel that spills registers, or keeps an array in memory, is an error. Each names the
# threads of a block and the blocks of a multiprocessor that its registers must leave room for (launch.cuh), so that one
# which needs more of them spills.
function(kvkeep_strict_kernels target)
  set(strict "--Werror=all-warnings;-Xptxas=--warn-on-spills,--warn-on-local-memory-usage,--warning-as-error")
  target_compile_options(${target} PRIVATE
    "$<$<AND:$<COMPILE_LANGUAGE:CUDA>,$<BOOL:${KVKEEP_WERROR}>>:${strict}>")
endfunction()

kvkeep_add_cuda_ops(kvkeep_cuda_ops)
add_library(kvkeep::cuda_ops ALIAS kvkeep_cuda_ops)
add_library(kvkeep_cuda_engine STATIC EXCLUDE_FROM_ALL "${CMAKE_CURRENT_LIST_DIR}/../src/cuda_engine.cu")
add_library(kvkeep::cuda_engine ALIAS kvkeep_cuda_engine)
target_compile_definitions(kvkeep_cuda_engine PUBLIC KVKEEP_CUDA_ENGINE_COMPILED)
target_link_libraries(kvkeep_cuda_engine PUBLIC kvkeep_cuda_ops)
if(TARGET kvkeep_dev)
  target_link_libraries(kvkeep_cuda_engine PRIVATE kvkeep_dev)
  kvkeep_strict_kernels(kvkeep_cuda_engine)
endif()
# Once more with Hopper's own instructions, for our benchmarks and checks: these are another target of the compiler.
if(TARGET kvkeep_dev)
  set(KVKEEP_CUDA_90A "${CMAKE_CUDA_ARCHITECTURES}")
  list(TRANSFORM KVKEEP_CUDA_90A REPLACE "^90$" "90a-real")
  kvkeep_add_cuda_ops(kvkeep_cuda_ops_90a ${KVKEEP_CUDA_90A})
endif()
