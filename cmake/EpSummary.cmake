# What was decided, in words: the first thing to read when a build is not what was expected.
message(STATUS "deep_ep: ${CMAKE_BUILD_TYPE}, ${CMAKE_CXX_COMPILER_ID} ${CMAKE_CXX_COMPILER_VERSION}"
               ", ccache ${EP_CCACHE}")
if(EP_WITH_CUDA)
    message(STATUS "deep_ep: CUDA device ON, toolkit ${CUDAToolkit_VERSION}, architectures ${CMAKE_CUDA_ARCHITECTURES}")
else()
    message(STATUS "deep_ep: CUDA device OFF (${ep_cuda_reason}); the CPU device alone is built")
endif()
if(EP_SIMT_UCONTEXT)
    message(STATUS "deep_ep: CPU device switches fibers with ucontext (slow): Boost.Context was not found "
                   "(Debian: libboost-context-dev)")
else()
    message(STATUS "deep_ep: CPU device switches fibers with Boost.Context (${EP_BOOST_CONTEXT})")
endif()
message(STATUS "deep_ep: top-k indices ${EP_TOPK_IDX_BITS} bits, SM90 features off ${EP_DISABLE_SM90_FEATURES}, "
               "aggressive PTX off ${EP_DISABLE_AGGRESSIVE_PTX}, sanitizer '${EP_SANITIZE}', tests ${EP_TESTS}")
if(NOT EP_NVSHMEM_DIR STREQUAL "")
    message(STATUS "deep_ep: NVSHMEM_DIR ${EP_NVSHMEM_DIR} (for the engine nvshmem: python -m deep_ep build-nvshmem)")
endif()
