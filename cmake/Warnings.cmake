# SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
# kvkeep_dev_warnings: linked privately to our own programs, never exported.
# nvcc's line markers break -Wpedantic, so CUDA files have a shorter list.
add_library(kvkeep_dev_warnings INTERFACE)
target_compile_options(kvkeep_dev_warnings INTERFACE
  $<$<COMPILE_LANG_AND_ID:CXX,GNU,Clang,AppleClang>:-Wall;-Wextra;-Wpedantic;-Wshadow;-Wconversion>
  $<$<COMPILE_LANG_AND_ID:CUDA,NVIDIA>:-Xcompiler=-Wall,-Wextra>)
if(KVKEEP_WERROR)
  target_compile_options(kvkeep_dev_warnings INTERFACE
    $<$<COMPILE_LANG_AND_ID:CXX,GNU,Clang,AppleClang>:-Werror>
    $<$<COMPILE_LANG_AND_ID:CUDA,NVIDIA>:--Werror=all-warnings;-Xcompiler=-Werror>)
endif()
