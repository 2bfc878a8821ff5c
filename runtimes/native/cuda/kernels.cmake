# The target reft_cuda, which every library with a CUDA kernel links, or the reason why there is none. The kernels are compiled once; cudart
# is linked statically: the libraries load where there is no CUDA.

set(REFT_NO_CUDA "")
if(REFT_CUDA STREQUAL "OFF")
  set(REFT_NO_CUDA "REFT_CUDA=OFF")
  message(STATUS "reft: no CUDA kernels: ${REFT_NO_CUDA}")
  return()
endif()

find_program(REFT_NVCC nvcc HINTS ENV CUDA_HOME PATHS /usr/local/cuda/bin)
if(NOT REFT_NVCC)
  set(REFT_NO_CUDA "nvcc is not on the path, nor in CUDA_HOME/bin or /usr/local/cuda/bin")
  if(REFT_CUDA STREQUAL "ON")
    message(FATAL_ERROR "reft: REFT_CUDA=ON, but ${REFT_NO_CUDA}")
  endif()
  message(STATUS "reft: no CUDA kernels: ${REFT_NO_CUDA}")
  return()
endif()

execute_process(COMMAND ${REFT_NVCC} --list-gpu-code OUTPUT_VARIABLE known ERROR_QUIET)
set(targets)
foreach(architecture ${REFT_CUDA_ARCHITECTURES})
  if(known MATCHES "sm_${architecture}[\r\n]")
    list(APPEND targets ${architecture})
  else()
    message(STATUS "reft: no kernel for sm_${architecture}: this nvcc does not know it")
  endif()
endforeach()
if(NOT targets)
  set(REFT_NO_CUDA "${REFT_NVCC} knows none of ${REFT_CUDA_ARCHITECTURES}")
  message(STATUS "reft: no CUDA kernels: ${REFT_NO_CUDA}")
  return()
endif()

# The nvcc on the path may be a script that calls the toolkit's; only nvcc itself knows where it lives.
execute_process(COMMAND ${REFT_NVCC} --dryrun -x cu none OUTPUT_VARIABLE dryrun ERROR_VARIABLE dryrun)
string(REGEX MATCH "TOP=([^\r\n]+)" top "${dryrun}")
set(toolkit "${CMAKE_MATCH_1}")
find_library(REFT_CUDART cudart_static HINTS ${toolkit}/lib64 ${toolkit}/lib ${toolkit}/targets/x86_64-linux/lib
             ${toolkit}/targets/sbsa-linux/lib ${toolkit}/targets/aarch64-linux/lib ${toolkit}/lib/x64)
find_path(REFT_CUDA_INCLUDE cuda_runtime_api.h HINTS ${toolkit}/include ${toolkit}/targets/x86_64-linux/include
          ${toolkit}/targets/sbsa-linux/include ${toolkit}/targets/aarch64-linux/include)
if(NOT REFT_CUDART OR NOT REFT_CUDA_INCLUDE)
  set(REFT_NO_CUDA "${toolkit} has no static cudart or no cuda_runtime_api.h")
  message(STATUS "reft: no CUDA kernels: ${REFT_NO_CUDA}")
  return()
endif()

# nvcc is called directly: CMake's own CUDA language probes the compiler for longer than the kernel takes to compile.
set(codes)
foreach(architecture ${targets})
  list(APPEND codes -gencode arch=compute_${architecture},code=sm_${architecture})
endforeach()
list(GET targets -1 newest)
# GPUs newer than the toolkit compile this one when they first load it.
list(APPEND codes -gencode arch=compute_${newest},code=compute_${newest})
set(host_flags)
if(NOT WIN32)
  set(host_flags -Xcompiler -fPIC,-fvisibility=hidden)
endif()
# Small kernels are stored as they are unless told otherwise: 0.7 MB instead of 3.1 MB for eight architectures.
set(objects)
foreach(kernel edit_cuda red_cuda)
  set(object ${CMAKE_CURRENT_BINARY_DIR}/${kernel}${CMAKE_CXX_OUTPUT_EXTENSION})
  list(APPEND objects ${object})
  add_custom_command(
    OUTPUT ${object}
    COMMAND ${REFT_NVCC} -c -O3 -std=c++17 -cudart static --threads 0 -Xfatbin=-compress-all ${codes} ${host_flags}
            -I${CMAKE_CURRENT_SOURCE_DIR} -I${CMAKE_CURRENT_SOURCE_DIR}/include -o ${object} ${CMAKE_CURRENT_SOURCE_DIR}/cuda/${kernel}.cu
    DEPENDS cuda/${kernel}.cu cuda/edit_cuda.h cuda/lanes.h include/reft/edit.h
    COMMENT "nvcc for ${targets}: ${kernel}.cu"
    VERBATIM
  )
endforeach()
find_package(Threads REQUIRED)
add_library(reft_cuda STATIC ${objects})
set_source_files_properties(${objects} PROPERTIES EXTERNAL_OBJECT TRUE GENERATED TRUE)
set_target_properties(reft_cuda PROPERTIES LINKER_LANGUAGE CXX)
target_link_libraries(reft_cuda PUBLIC ${REFT_CUDART} Threads::Threads ${CMAKE_DL_LIBS})
if(CMAKE_SYSTEM_NAME STREQUAL "Linux")
  target_link_libraries(reft_cuda PUBLIC rt)
endif()
list(JOIN targets "," joined)
target_compile_definitions(reft_cuda INTERFACE REFT_CUDA REFT_CUDA_ARCHITECTURES="${joined}")
message(STATUS "reft: CUDA kernels for sm ${joined}")
