# SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
# KVKEEP_CUDA_FOUND, and the target kvkeep::cuda where the component's header is there.
# AUTO looks for a compiler at top level only: below another project it follows that project's
# languages.
set(KVKEEP_CUDA_FOUND OFF)
get_property(kvkeep_languages GLOBAL PROPERTY ENABLED_LANGUAGES)

if(KVKEEP_CUDA STREQUAL "AUTO")
  if("CUDA" IN_LIST kvkeep_languages)
    set(KVKEEP_CUDA_FOUND ON)
  elseif(PROJECT_IS_TOP_LEVEL)
    include(CheckLanguage)
    check_language(CUDA)
    if(CMAKE_CUDA_COMPILER)
      set(KVKEEP_CUDA_FOUND ON)
    endif()
  endif()
elseif(KVKEEP_CUDA)
  set(KVKEEP_CUDA_FOUND ON)
endif()

# kvkeep_cuda_std_20(TARGET SCOPE): C++20 for the CUDA files of TARGET. Old versions of CMake (3.25
# is one) do not know that nvcc has it.
function(kvkeep_cuda_std_20 target scope)
  if("cuda_std_20" IN_LIST CMAKE_CUDA_COMPILE_FEATURES)
    target_compile_features(${target} ${scope} cuda_std_20)
  else()
    target_compile_options(${target} ${scope} $<$<COMPILE_LANGUAGE:CUDA>:-std=c++20>)
  endif()
endfunction()

if(KVKEEP_CUDA_FOUND)
  if(PROJECT_IS_TOP_LEVEL AND NOT DEFINED CMAKE_CUDA_ARCHITECTURES)
    set(CMAKE_CUDA_ARCHITECTURES 80 90)
  endif()
  enable_language(CUDA)
  find_package(CUDAToolkit REQUIRED)
  # One name for each extent of the CUDA build: its tests, or these and the benchmarks.
  add_custom_target(kvkeep_cuda_tests)
  add_custom_target(kvkeep_gpu_tests)  # what ./run gpu test runs on a device
  add_custom_target(kvkeep_cuda_all DEPENDS kvkeep_cuda_tests kvkeep_gpu_tests)
  if(EXISTS "${PROJECT_SOURCE_DIR}/include/kvkeep/cuda.cuh")
    add_library(kvkeep_cuda INTERFACE)
    add_library(kvkeep::cuda ALIAS kvkeep_cuda)
    set_target_properties(kvkeep_cuda PROPERTIES EXPORT_NAME cuda)
    kvkeep_cuda_std_20(kvkeep_cuda INTERFACE)
    target_link_libraries(kvkeep_cuda INTERFACE kvkeep CUDA::cudart)
    # Whether the architectures of whoever links it have Hopper's own instructions: 90a in place of 90
    # (backend/cuda/window_plan.hpp).
    set(with_90a "$<BOOL:$<FILTER:$<TARGET_PROPERTY:CUDA_ARCHITECTURES>,INCLUDE,^90a>>")
    set(with_90 "$<BOOL:$<FILTER:$<TARGET_PROPERTY:CUDA_ARCHITECTURES>,INCLUDE,^90(-|$)>>")
    target_compile_definitions(kvkeep_cuda INTERFACE
      "$<$<AND:${with_90a},$<NOT:${with_90}>>:KVKEEP_CUDA_SM90A=1>")
  endif()
endif()
