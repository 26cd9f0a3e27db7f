# Compiles for Arm hosts (Grace: GH200, GB200) on another machine, with Debian's cross compiler. Nothing of it is run.
# What is linked comes from `tools/get_toolkit.sh aarch64`, whose folder is EP_AARCH64_ROOT; the headers are this machine's.
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
set(CMAKE_CXX_COMPILER aarch64-linux-gnu-g++)
set(CMAKE_CUDA_HOST_COMPILER aarch64-linux-gnu-g++)
# The only way that reaches CMake's first look at nvcc, which links.
set(ENV{CUDAFLAGS} "-target-dir ${CMAKE_HOST_SYSTEM_PROCESSOR}-linux -L${EP_AARCH64_ROOT}/lib")
list(APPEND CMAKE_TRY_COMPILE_PLATFORM_VARIABLES EP_AARCH64_ROOT)

set(CUDA_CUDART ${EP_AARCH64_ROOT}/lib/libcudart.so.13 CACHE FILEPATH "")
set(CUDA_cudart_static_LIBRARY ${EP_AARCH64_ROOT}/lib/libcudart_static.a CACHE FILEPATH "")
set(EP_BOOST_CONTEXT ${EP_AARCH64_ROOT}/lib/libboost_context.a CACHE FILEPATH "")
