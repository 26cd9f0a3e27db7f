# device_conformance_cuda: the conformance tests on a GPU, and the tests of what the CUDA half alone promises. Needs no
# doctest: support/testing.h makes do without (docs/testing_on_gpus.md). Skipped by ctest where there is no GPU.
if(EP_WITH_CUDA)
    file(GLOB conformance_sources CONFIGURE_DEPENDS
        ${CMAKE_CURRENT_SOURCE_DIR}/device/conformance_*.cu
        ${CMAKE_CURRENT_SOURCE_DIR}/device/cuda/*.cu ${CMAKE_CURRENT_SOURCE_DIR}/device/cuda/*.cc)
    add_executable(device_conformance_cuda ${conformance_sources})
    set_source_files_properties(${conformance_sources} PROPERTIES LANGUAGE CUDA)
    target_include_directories(device_conformance_cuda PRIVATE
        ${CMAKE_CURRENT_SOURCE_DIR} ${PROJECT_SOURCE_DIR}/csrc/device/cuda)
    target_link_libraries(device_conformance_cuda PRIVATE deep_ep_cuda)
    add_test(NAME device_conformance_cuda COMMAND device_conformance_cuda)
    set_tests_properties(device_conformance_cuda PROPERTIES LABELS gpu SKIP_RETURN_CODE 77 TIMEOUT 120)
endif()
