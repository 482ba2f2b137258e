# SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
# Headers, CMake package (installed, and usable from the build tree as kvkeep_DIR), pkg-config file.
include(GNUInstallDirs)
include(CMakePackageConfigHelpers)
set(kvkeep_package_dir "${CMAKE_INSTALL_DATADIR}/cmake/kvkeep")

install(DIRECTORY include/kvkeep DESTINATION "${CMAKE_INSTALL_INCLUDEDIR}"
        FILES_MATCHING PATTERN "*.hpp" PATTERN "*.cuh")
# What the components cpu, cuda_ops and cuda_engine are compiled from; the build tree refers to ours.
install(DIRECTORY src DESTINATION "${kvkeep_package_dir}")
foreach(library IN ITEMS CpuLibrary CudaLibrary)
  install(FILES cmake/${library}.cmake DESTINATION "${kvkeep_package_dir}/cmake")
  file(WRITE "${PROJECT_BINARY_DIR}/cmake/${library}.cmake"
       "include(\"${PROJECT_SOURCE_DIR}/cmake/${library}.cmake\")\n")
endforeach()
install(FILES LICENSE DESTINATION "${CMAKE_INSTALL_DOCDIR}")

install(TARGETS kvkeep EXPORT kvkeepTargets INCLUDES DESTINATION "${CMAKE_INSTALL_INCLUDEDIR}")
install(EXPORT kvkeepTargets NAMESPACE kvkeep:: DESTINATION "${kvkeep_package_dir}")
export(EXPORT kvkeepTargets NAMESPACE kvkeep:: FILE "${PROJECT_BINARY_DIR}/kvkeepTargets.cmake")
if(TARGET kvkeep_cuda)
  install(TARGETS kvkeep_cuda EXPORT kvkeepCudaTargets)
  install(EXPORT kvkeepCudaTargets NAMESPACE kvkeep:: DESTINATION "${kvkeep_package_dir}")
  export(EXPORT kvkeepCudaTargets NAMESPACE kvkeep::
         FILE "${PROJECT_BINARY_DIR}/kvkeepCudaTargets.cmake")
endif()

configure_package_config_file(cmake/kvkeepConfig.cmake.in "${PROJECT_BINARY_DIR}/kvkeepConfig.cmake"
                              INSTALL_DESTINATION "${kvkeep_package_dir}")
write_basic_package_version_file("${PROJECT_BINARY_DIR}/kvkeepConfigVersion.cmake"
                                 COMPATIBILITY SameMinorVersion ARCH_INDEPENDENT)
install(FILES "${PROJECT_BINARY_DIR}/kvkeepConfig.cmake"
              "${PROJECT_BINARY_DIR}/kvkeepConfigVersion.cmake"
        DESTINATION "${kvkeep_package_dir}")

# The prefix is written relative to the file, so that an installed tree can be moved.
file(RELATIVE_PATH kvkeep_pc_to_prefix
     "${CMAKE_INSTALL_FULL_DATADIR}/pkgconfig" "${CMAKE_INSTALL_PREFIX}")
string(REGEX REPLACE "/$" "" kvkeep_pc_to_prefix "${kvkeep_pc_to_prefix}")
configure_file(cmake/kvkeep.pc.in "${PROJECT_BINARY_DIR}/kvkeep.pc" @ONLY)
install(FILES "${PROJECT_BINARY_DIR}/kvkeep.pc" DESTINATION "${CMAKE_INSTALL_DATADIR}/pkgconfig")
