# What every native target is compiled with: target ep_flags.
set(CMAKE_CXX_STANDARD 20)
set(CMAKE_CXX_STANDARD_REQUIRED ON)
set(CMAKE_CXX_EXTENSIONS OFF)
set(CMAKE_CXX_VISIBILITY_PRESET hidden)
set(CMAKE_CUDA_VISIBILITY_PRESET hidden)
set(CMAKE_VISIBILITY_INLINES_HIDDEN ON)
set(CMAKE_POSITION_INDEPENDENT_CODE ON)
set(CMAKE_EXPORT_COMPILE_COMMANDS ON)

find_program(EP_CCACHE ccache)
if(EP_CCACHE)
    foreach(language CXX CUDA)
        if(NOT DEFINED CMAKE_${language}_COMPILER_LAUNCHER)
            set(CMAKE_${language}_COMPILER_LAUNCHER ${EP_CCACHE})
        endif()
    endforeach()
endif()

add_library(ep_flags INTERFACE)
target_compile_options(ep_flags INTERFACE
    $<$<COMPILE_LANGUAGE:CXX>:-Wall -Wextra $<$<BOOL:${EP_WERROR}>:-Werror>>
    $<$<COMPILE_LANGUAGE:CUDA>:--expt-relaxed-constexpr -Xcompiler=-Wall,-Wextra>
    $<$<AND:$<COMPILE_LANGUAGE:CUDA>,$<BOOL:${EP_WERROR}>>:-Werror=all-warnings>)

if(NOT EP_SANITIZE STREQUAL "")
    if(NOT EP_SANITIZE MATCHES "^(address|thread)$")
        message(FATAL_ERROR "EP_SANITIZE must be empty, address or thread, got '${EP_SANITIZE}'")
    endif()
    # GCC's ThreadSanitizer dies at 8128 fibers, and its runtimes do not know the fiber switches of the executor.
    if(NOT CMAKE_CXX_COMPILER_ID MATCHES "Clang")
        message(FATAL_ERROR "EP_SANITIZE=${EP_SANITIZE} needs clang (-DCMAKE_CXX_COMPILER=clang++-14), got "
                            "${CMAKE_CXX_COMPILER_ID}")
    endif()
    target_compile_options(ep_flags INTERFACE
        $<$<COMPILE_LANGUAGE:CXX>:-fsanitize=${EP_SANITIZE} -fno-omit-frame-pointer -g1 -O1>)  # -O3 compiles longer and runs no faster
    target_link_options(ep_flags INTERFACE -fsanitize=${EP_SANITIZE})
endif()
