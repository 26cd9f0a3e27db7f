# Conformance tests on a GPU. They need no doctest: support/testing.h makes do without (docs/testing_on_gpus.md). Skipped by
# ctest where there is no GPU.
#   device_conformance_cuda  the primitives, and what the CUDA half alone promises
#   rail_conformance_cuda    the engine `host`, between GPUs or on one
# rail_process_cuda is no test: benchmarks/rail_rate.py runs it.
# With NVSHMEM_DIR, not by themselves tests either, since each of them is one rank (tests/test_rail_nvshmem.py starts them):
#   rail_conformance_nvshmem, rail_process_nvshmem   the same over the engine `nvshmem`, which is linked in
if(EP_WITH_CUDA)
    file(GLOB conformance_sources CONFIGURE_DEPENDS
        ${CMAKE_CURRENT_SOURCE_DIR}/device/conformance_*.cu
        ${CMAKE_CURRENT_SOURCE_DIR}/device/cuda/*.cu ${CMAKE_CURRENT_SOURCE_DIR}/device/cuda/*.cc)
    add_executable(device_conformance_cuda ${conformance_sources})
    set_source_files_properties(${conformance_sources} PROPERTIES LANGUAGE CUDA)
    target_include_directories(device_conformance_cuda PRIVATE
        ${CMAKE_CURRENT_SOURCE_DIR} ${PROJECT_SOURCE_DIR}/csrc/device/cuda)
    target_link_libraries(device_conformance_cuda PRIVATE deep_ep_cuda)

    set(rail_kernels ${CMAKE_CURRENT_SOURCE_DIR}/rail/conformance.cu)
    add_executable(rail_conformance_cuda ${rail_kernels}
        ${CMAKE_CURRENT_SOURCE_DIR}/rail/host_world.cc ${CMAKE_CURRENT_SOURCE_DIR}/rail/cuda/device.cc
        ${CMAKE_CURRENT_SOURCE_DIR}/device/cuda/test_device.cc ${CMAKE_CURRENT_SOURCE_DIR}/device/cuda/testing.cc)
    set_source_files_properties(${rail_kernels} PROPERTIES LANGUAGE CUDA)
    target_include_directories(rail_conformance_cuda PRIVATE ${CMAKE_CURRENT_SOURCE_DIR}
        ${PROJECT_SOURCE_DIR}/csrc/rail/host ${PROJECT_SOURCE_DIR}/csrc/device/cuda)
    target_link_libraries(rail_conformance_cuda PRIVATE deep_ep_cuda deep_ep_rail)

    set(process_kernels ${CMAKE_CURRENT_SOURCE_DIR}/rail/process/rail_process.cu)
    add_executable(rail_process_cuda ${process_kernels} ${CMAKE_CURRENT_SOURCE_DIR}/rail/process/host.cu
        ${CMAKE_CURRENT_SOURCE_DIR}/rail/cuda/device.cc)
    set_source_files_properties(${process_kernels} ${CMAKE_CURRENT_SOURCE_DIR}/rail/process/host.cu
                                PROPERTIES LANGUAGE CUDA)
    target_include_directories(rail_process_cuda PRIVATE ${CMAKE_CURRENT_SOURCE_DIR}
        ${PROJECT_SOURCE_DIR}/csrc/rail/host ${PROJECT_SOURCE_DIR}/csrc/device/cuda)
    target_link_libraries(rail_process_cuda PRIVATE deep_ep_cuda deep_ep_rail)

    foreach(name device_conformance_cuda rail_conformance_cuda)
        add_test(NAME ${name} COMMAND ${name})
        set_tests_properties(${name} PROPERTIES LABELS gpu SKIP_RETURN_CODE 77 TIMEOUT 120)
    endforeach()

    if(NOT EP_NVSHMEM_DIR STREQUAL "")
        file(GLOB ep_nvshmem_host ${EP_NVSHMEM_DIR}/lib/libnvshmem_host.so*)
        list(GET ep_nvshmem_host 0 ep_nvshmem_host)
        set(nvshmem_kernels ${PROJECT_SOURCE_DIR}/csrc/rail/nvshmem/library.cu
            ${CMAKE_CURRENT_SOURCE_DIR}/rail/process/nvshmem.cu)
        set_source_files_properties(${nvshmem_kernels} PROPERTIES LANGUAGE CUDA)
        set(rail_conformance_nvshmem_sources ${rail_kernels} ${CMAKE_CURRENT_SOURCE_DIR}/rail/nvshmem/nvshmem_world.cc
            ${CMAKE_CURRENT_SOURCE_DIR}/rail/nvshmem/meeting.cc ${CMAKE_CURRENT_SOURCE_DIR}/device/cuda/testing.cc)
        set(rail_process_nvshmem_sources ${process_kernels} ${CMAKE_CURRENT_SOURCE_DIR}/rail/process/nvshmem.cu
            ${CMAKE_CURRENT_SOURCE_DIR}/rail/cuda/device.cc)
        foreach(name rail_conformance_nvshmem rail_process_nvshmem)
            add_executable(${name} EXCLUDE_FROM_ALL ${${name}_sources}
                ${PROJECT_SOURCE_DIR}/csrc/rail/nvshmem/library.cu)
            target_include_directories(${name} PRIVATE ${CMAKE_CURRENT_SOURCE_DIR}
                ${PROJECT_SOURCE_DIR}/csrc/rail/nvshmem ${PROJECT_SOURCE_DIR}/csrc/device/cuda)
            target_include_directories(${name} SYSTEM PRIVATE ${EP_NVSHMEM_DIR}/include)
            target_link_libraries(${name} PRIVATE deep_ep_cuda deep_ep_rail
                ${EP_NVSHMEM_DIR}/lib/libnvshmem_device.a ${ep_nvshmem_host})
            set_target_properties(${name} PROPERTIES CUDA_SEPARABLE_COMPILATION ON CUDA_RESOLVE_DEVICE_SYMBOLS ON
                                                     BUILD_RPATH ${EP_NVSHMEM_DIR}/lib)
        endforeach()
    endif()
endif()
