# Adds the CUDA kernels to reft_ort, or says why not. cudart is linked statically: the library loads where there is no CUDA.

# Turing to Blackwell: T4, A100, RTX 30 (86), Orin (87), RTX 40 (89), H100, Thor (110), RTX 50 (120).
set(wanted 75 80 86 87 89 90 110 120)

if(REFT_CUDA STREQUAL "OFF")
  message(STATUS "reft: no CUDA kernels: REFT_CUDA=OFF")
  return()
endif()

find_program(REFT_NVCC nvcc HINTS ENV CUDA_HOME PATHS /usr/local/cuda/bin)
if(NOT REFT_NVCC)
  if(REFT_CUDA STREQUAL "ON")
    message(FATAL_ERROR "reft: REFT_CUDA=ON, but nvcc is not on the path nor in CUDA_HOME/bin")
  endif()
  message(STATUS "reft: no CUDA kernels: nvcc is not on the path")
  return()
endif()

execute_process(COMMAND ${REFT_NVCC} --list-gpu-code OUTPUT_VARIABLE known ERROR_QUIET)
set(targets)
foreach(architecture ${wanted})
  if(known MATCHES "sm_${architecture}[\r\n]")
    list(APPEND targets ${architecture})
  else()
    message(STATUS "reft: no kernel for sm_${architecture}: this nvcc does not know it")
  endif()
endforeach()
if(NOT targets)
  message(STATUS "reft: no CUDA kernels: ${REFT_NVCC} knows none of ${wanted}")
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
set(object ${CMAKE_CURRENT_BINARY_DIR}/edit_cuda${CMAKE_CXX_OUTPUT_EXTENSION})
set(host_flags)
if(NOT WIN32)
  set(host_flags -Xcompiler -fPIC,-fvisibility=hidden)
endif()
add_custom_command(
  OUTPUT ${object}
  COMMAND ${REFT_NVCC} -c -O3 -std=c++17 -cudart static --threads 0 ${codes} ${host_flags} -I${CMAKE_CURRENT_SOURCE_DIR}
          -I${CMAKE_CURRENT_SOURCE_DIR}/include -o ${object} ${CMAKE_CURRENT_SOURCE_DIR}/cuda/edit_cuda.cu
  DEPENDS cuda/edit_cuda.cu cuda/edit_cuda.h include/reft/edit.h
  COMMENT "nvcc for ${targets}"
  VERBATIM
)
# The nvcc on the path may be a script that calls the toolkit's; only nvcc itself knows where it lives.
execute_process(COMMAND ${REFT_NVCC} --dryrun -x cu none OUTPUT_VARIABLE dryrun ERROR_VARIABLE dryrun)
string(REGEX MATCH "TOP=([^\r\n]+)" top "${dryrun}")
set(toolkit "${CMAKE_MATCH_1}")
find_library(REFT_CUDART cudart_static HINTS ${toolkit}/lib64 ${toolkit}/lib ${toolkit}/targets/x86_64-linux/lib
             ${toolkit}/targets/sbsa-linux/lib ${toolkit}/lib/x64)
if(NOT REFT_CUDART)
  message(STATUS "reft: no CUDA kernels: ${toolkit} has no static cudart")
  return()
endif()
find_package(Threads REQUIRED)
target_sources(reft_ort PRIVATE ${object})
set_source_files_properties(${object} PROPERTIES EXTERNAL_OBJECT TRUE GENERATED TRUE)
target_link_libraries(reft_ort PRIVATE ${REFT_CUDART} Threads::Threads ${CMAKE_DL_LIBS})
if(CMAKE_SYSTEM_NAME STREQUAL "Linux")
  target_link_libraries(reft_ort PRIVATE rt)
endif()
list(JOIN targets "," joined)
target_compile_definitions(reft_ort PRIVATE REFT_CUDA REFT_CUDA_ARCHITECTURES="${joined}")
message(STATUS "reft: CUDA kernels for sm ${joined}")
