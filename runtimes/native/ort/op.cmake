# The ops of ONNX Runtime: kernels for the CPU always, for NVIDIA GPUs where kernels.cmake made them.

if(NOT REFT_ORT)
  message(STATUS "reft: no op library for ONNX Runtime: REFT_ORT=OFF")
  return()
endif()

add_library(reft_ort SHARED cpu/edit_cpu.cc cpu/rows_portable.cc ort/op.cc ort/lo_reft_op.cc ort/red_op.cc ort/register.cc c_api/reft.cc)
target_include_directories(reft_ort PRIVATE ${CMAKE_CURRENT_SOURCE_DIR} ${CMAKE_CURRENT_SOURCE_DIR}/include)

if(CMAKE_CXX_COMPILER_ID MATCHES "GNU|Clang")
  # Never -ffast-math: linked with it, a library sets flush-to-zero for the whole process.
  target_compile_options(reft_ort PRIVATE $<$<COMPILE_LANGUAGE:CXX>:-Wall;-Wextra;-fno-math-errno>)
  if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64|amd64)$")
    target_sources(reft_ort PRIVATE cpu/rows_avx2.cc cpu/rows_avx512.cc)
    set_source_files_properties(cpu/rows_avx2.cc PROPERTIES COMPILE_OPTIONS "-mavx2;-mfma;-mf16c")
    # GCC 12 warns about its own AVX-512 header.
    set_source_files_properties(cpu/rows_avx512.cc PROPERTIES COMPILE_OPTIONS "-mavx512f;-mavx512bw;-mavx512dq;-mavx512vl;-mfma;-Wno-uninitialized;-Wno-maybe-uninitialized")
    target_compile_definitions(reft_ort PRIVATE REFT_AVX2_ROWS REFT_AVX512_ROWS)
    message(STATUS "reft: CPU kernels avx512, avx2 and portable, chosen when the library runs")
  elseif(CMAKE_SYSTEM_PROCESSOR MATCHES "^(aarch64|arm64)$")
    target_sources(reft_ort PRIVATE cpu/rows_neon.cc)
    target_compile_definitions(reft_ort PRIVATE REFT_NEON_ROWS)
    message(STATUS "reft: CPU kernels neon and portable")
  else()
    message(STATUS "reft: CPU kernel portable only, since ${CMAKE_SYSTEM_PROCESSOR} has no vector kernel here")
  endif()
else()
  message(STATUS "reft: CPU kernel portable only, since the vector kernels are written for GCC and Clang, not ${CMAKE_CXX_COMPILER_ID}")
endif()

if(REFT_SANITIZE)
  target_compile_options(reft_ort PRIVATE -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer -g)
  target_link_options(reft_ort PRIVATE -fsanitize=address,undefined)
endif()

if(TARGET reft_cuda)
  target_sources(reft_ort PRIVATE ort/queue_on_cuda.cc)
  target_link_libraries(reft_ort PRIVATE reft_cuda)
endif()

install(TARGETS reft_ort LIBRARY DESTINATION runtimes/native/lib RUNTIME DESTINATION runtimes/native/lib)
