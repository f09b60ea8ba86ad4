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
set(CUDA_WARNINGS $<$<COMPILE_LANGUAGE:CUDA>:-Xcompiler=-Wall,-Wextra,-Werror>)
file(GLOB CUDA_SOURCES CONFIGURE_DEPENDS kernels/cuda/*.cu)
# Hopper's own instructions are for that chip alone; on others this file's kernels are not found, and
# calls go another way.
set(SM90A_SOURCES ${CMAKE_SOURCE_DIR}/kernels/cuda/linear_mma.cu)
list(REMOVE_ITEM CUDA_SOURCES ${SM90A_SOURCES})
add_library(gn_kernels_sm90a OBJECT ${SM90A_SOURCES})
set_target_properties(gn_kernels_sm90a PROPERTIES CUDA_ARCHITECTURES 90a-real)
target_compile_options(gn_kernels_sm90a PRIVATE ${CUDA_WARNINGS})
target_sources(gn_kernels PRIVATE ${CUDA_SOURCES} $<TARGET_OBJECTS:gn_kernels_sm90a>)
set_target_properties(gn_kernels PROPERTIES CUDA_ARCHITECTURES "${CMAKE_CUDA_ARCHITECTURES}")
set_source_files_properties(kernels/no_cuda.c PROPERTIES HEADER_FILE_ONLY ON)
target_compile_options(gn_kernels PRIVATE ${CUDA_WARNINGS}
                       $<$<COMPILE_LANGUAGE:CUDA>:--threads=2>)
target_link_libraries(gn_kernels PUBLIC CUDA::cudart_static CUDA::cublas)
