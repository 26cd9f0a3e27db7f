# Is there a CUDA toolkit, and which GPUs is it to compile for? Sets EP_WITH_CUDA and CMAKE_CUDA_ARCHITECTURES.
include(EpArchitectures)

set(EP_WITH_CUDA 0)
set(ep_cuda_reason "EP_CUDA=OFF")
if(NOT EP_SANITIZE STREQUAL "")
    set(ep_cuda_reason "EP_SANITIZE=${EP_SANITIZE}")
endif()

if(NOT EP_CUDA MATCHES "^(AUTO|ON|OFF|NATIVE)$")
    message(FATAL_ERROR "EP_CUDA must be AUTO, ON, OFF or NATIVE, got '${EP_CUDA}'")
endif()
if(EP_CUDA STREQUAL "ON" AND NOT EP_SANITIZE STREQUAL "")
    message(FATAL_ERROR "EP_SANITIZE instruments the CPU device; use it with EP_CUDA=OFF")
endif()

# What a build for this machine alone is for.
set(ep_is_wanted 1)
set(ep_capabilities "")
if(EP_CUDA STREQUAL "NATIVE")
    find_program(EP_NVIDIA_SMI nvidia-smi PATHS /usr/lib/wsl/lib)
    if(EP_NVIDIA_SMI)
        execute_process(COMMAND ${EP_NVIDIA_SMI} --query-gpu=compute_cap --format=csv,noheader
                        OUTPUT_VARIABLE ep_capabilities ERROR_QUIET)
    endif()
    file(GLOB ep_gpu_nodes /dev/nvidia[0-9]* /dev/dxg)
    # A GPU that nvidia-smi does not describe gets what any GPU gets.
    if(NOT ep_capabilities MATCHES "[0-9]\\.[0-9]" AND NOT ep_gpu_nodes)
        set(ep_is_wanted 0)
        set(ep_cuda_reason "EP_CUDA=NATIVE, and this machine has no GPU")
    endif()
endif()

if(ep_is_wanted AND NOT EP_CUDA STREQUAL "OFF" AND EP_SANITIZE STREQUAL "")
    # CMake itself looks on the PATH alone; CUDA_HOME is what torch and its users set.
    if(NOT CMAKE_CUDA_COMPILER AND "$ENV{CUDACXX}" STREQUAL "")
        find_program(EP_NVCC nvcc HINTS "$ENV{CUDA_HOME}/bin" "$ENV{CUDA_PATH}/bin" PATHS /usr/local/cuda/bin)
        if(EP_NVCC)
            set(CMAKE_CUDA_COMPILER ${EP_NVCC})
        endif()
    endif()
    include(CheckLanguage)
    check_language(CUDA)
    if(CMAKE_CUDA_COMPILER)
        set(EP_WITH_CUDA 1)
    elseif(EP_CUDA STREQUAL "ON")
        message(FATAL_ERROR "EP_CUDA=ON, and no nvcc was found: put it on the PATH or set CUDA_HOME")
    else()
        set(ep_cuda_reason "no CUDA toolkit found")
    endif()
endif()

if(EP_WITH_CUDA)
    # Precedence: -DCMAKE_CUDA_ARCHITECTURES, then the environment, then this machine's (if asked for), then the default.
    if(DEFINED CACHE{CMAKE_CUDA_ARCHITECTURES})
        set(CMAKE_CUDA_ARCHITECTURES $CACHE{CMAKE_CUDA_ARCHITECTURES})
    elseif(NOT "$ENV{TORCH_CUDA_ARCH_LIST}" STREQUAL "")
        ep_parse_torch_arch_list(CMAKE_CUDA_ARCHITECTURES "$ENV{TORCH_CUDA_ARCH_LIST}")
    else()
        execute_process(COMMAND ${CMAKE_CUDA_COMPILER} --list-gpu-arch OUTPUT_VARIABLE known_to_nvcc)
        ep_native_arch_list(CMAKE_CUDA_ARCHITECTURES "${ep_capabilities}" "${known_to_nvcc}")
    endif()
    ep_check_arch_list("${CMAKE_CUDA_ARCHITECTURES}")

    # Set before enable_language, whose own default would end up in the cache and outrank the environment next time.
    enable_language(CUDA)
    if(CMAKE_CUDA_COMPILER_VERSION VERSION_LESS 11.8)
        message(FATAL_ERROR "DeepEP needs CUDA 11.8 or newer, got ${CMAKE_CUDA_COMPILER_VERSION}; "
                            "build the CPU device alone with -DEP_CUDA=OFF")
    endif()
    if(CMAKE_CUDA_COMPILER_VERSION VERSION_LESS 12.0)
        if(NOT EP_DISABLE_SM90_FEATURES)
            message(FATAL_ERROR "CUDA ${CMAKE_CUDA_COMPILER_VERSION} does not know the features of SM90: "
                                "set DISABLE_SM90_FEATURES=1, or take CUDA 12")
        endif()
        set(CMAKE_CUDA_STANDARD 17)  # The CUDA half keeps to it; nvcc 11 knows no newer one.
    endif()
    # CUDA takes its standard from CMAKE_CXX_STANDARD; CMake up to 3.25 does not know that nvcc has C++20.
    if(NOT CMAKE_CUDA20_STANDARD_COMPILE_OPTION)
        set(CMAKE_CUDA20_STANDARD_COMPILE_OPTION "-std=c++20")
    endif()
    set(CMAKE_CUDA_RUNTIME_LIBRARY Static)
    find_package(CUDAToolkit REQUIRED)
endif()

target_compile_definitions(ep_flags INTERFACE
    EP_WITH_CUDA=${EP_WITH_CUDA}
    EP_TOPK_IDX_BITS=${EP_TOPK_IDX_BITS}
    EP_DISABLE_SM90_FEATURES=${EP_DISABLE_SM90_FEATURES}
    EP_DISABLE_AGGRESSIVE_PTX=${EP_DISABLE_AGGRESSIVE_PTX})
