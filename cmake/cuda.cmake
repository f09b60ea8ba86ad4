# The CUDA backend: kernels/cuda in place of kernels/no_cuda.c. The runtime is linked in, so that
# the programs start on machines without CUDA; cuBLAS is a shared library.
set(CMAKE_CUDA_COMPILER ${GN_NVCC})
if(NOT CMAKE_CUDA_ARCHITECTURES)
    set(CMAKE_CUDA_ARCHITECTURES 80-real 86-real 89-real 90)
endif()
enable_language(CUDA)
find_package(CUDAToolkit REQUIRED)
set(CMAKE_CUDA_STANDARD 17)
set(CMAKE_CUDA_FLAGS_RELEASE "-O3 -lineinfo")
file(GLOB CUDA_SOURCES CONFIGURE_DEPENDS kernels/cuda/*.cu)
target_sources(gn_kernels PRIVATE ${CUDA_SOURCES})
set_target_properties(gn_kernels PROPERTIES CUDA_ARCHITECTURES "${CMAKE_CUDA_ARCHITECTURES}")
set_source_files_properties(kernels/no_cuda.c PROPERTIES HEADER_FILE_ONLY ON)
target_compile_options(gn_kernels PRIVATE
    $<$<COMPILE_LANGUAGE:CUDA>:-Xcompiler=-Wall,-Wextra,-Werror --threads=2>)
target_link_libraries(gn_kernels PUBLIC CUDA::cudart_static CUDA::cublas)
