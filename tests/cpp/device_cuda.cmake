# Conformance tests on a GPU. They need no doctest: support/testing.h makes do without (docs/testing_on_gpus.md). Skipped by
# ctest where there is no GPU.
#   device_conformance_cuda  the primitives, and what the CUDA half alone promises
#   rail_conformance_cuda    the engine `host`, between GPUs or on one
# rail_process_cuda is no test: benchmarks/rail_rate.py runs it.
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
    add_executable(rail_process_cuda ${process_kernels} ${CMAKE_CURRENT_SOURCE_DIR}/rail/cuda/device.cc)
    set_source_files_properties(${process_kernels} PROPERTIES LANGUAGE CUDA)
    target_include_directories(rail_process_cuda PRIVATE ${CMAKE_CURRENT_SOURCE_DIR}
        ${PROJECT_SOURCE_DIR}/csrc/rail/host ${PROJECT_SOURCE_DIR}/csrc/device/cuda)
    target_link_libraries(rail_process_cuda PRIVATE deep_ep_cuda deep_ep_rail)

    foreach(name device_conformance_cuda rail_conformance_cuda)
        add_test(NAME ${name} COMMAND ${name})
        set_tests_properties(${name} PROPERTIES LABELS gpu SKIP_RETURN_CODE 77 TIMEOUT 120)
    endforeach()
endif()
