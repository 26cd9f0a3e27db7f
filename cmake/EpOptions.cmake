# Settings that users give in the environment, under the names that this kind of library has always had. They are read
# at every configure and never cached, so that a changed variable is never silently ignored.

# Sets `out` to 1 or 0.
function(ep_env_flag out name)
    set(value "$ENV{${name}}")
    if(value STREQUAL "" OR value STREQUAL "0")
        set(${out} 0 PARENT_SCOPE)
    elseif(value STREQUAL "1")
        set(${out} 1 PARENT_SCOPE)
    else()
        message(FATAL_ERROR "${name} must be 0 or 1, got '${value}'")
    endif()
endfunction()

ep_env_flag(EP_DISABLE_SM90_FEATURES DISABLE_SM90_FEATURES)
ep_env_flag(EP_DISABLE_AGGRESSIVE_PTX DISABLE_AGGRESSIVE_PTX_INSTRS)

set(EP_TOPK_IDX_BITS "$ENV{TOPK_IDX_BITS}")
if(EP_TOPK_IDX_BITS STREQUAL "")
    set(EP_TOPK_IDX_BITS 64)
endif()
if(NOT EP_TOPK_IDX_BITS MATCHES "^(32|64)$")
    message(FATAL_ERROR "TOPK_IDX_BITS must be 32 or 64, got '${EP_TOPK_IDX_BITS}'")
endif()

set(EP_NVSHMEM_DIR "$ENV{NVSHMEM_DIR}")
if(NOT EP_NVSHMEM_DIR STREQUAL "" AND NOT EXISTS "${EP_NVSHMEM_DIR}/include/nvshmem.h")
    message(FATAL_ERROR "NVSHMEM_DIR is '${EP_NVSHMEM_DIR}', and there is no include/nvshmem.h in it")
endif()
