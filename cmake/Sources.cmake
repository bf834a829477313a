# Lists the sources of the backends, for every build of them. The including file must define steadygrad_options: include folders and
# compile options.
get_filename_component(csrc ${CMAKE_CURRENT_LIST_DIR}/../csrc ABSOLUTE)

# csrc/core has the arithmetic, in headers that every backend shares. csrc/cpu has the operations as threaded C++; *_kernels.cpp are
# compiled once per instruction set, of which one is chosen at run time.
set(cpu_sources
  ${csrc}/cpu/backend.cpp
  ${csrc}/cpu/batch_norm.cpp
  ${csrc}/cpu/functions.cpp
  ${csrc}/cpu/step.cpp
  ${csrc}/cpu/grad_norm.cpp
  ${csrc}/cpu/gradient.cpp
  ${csrc}/cpu/instruction_set.cpp
  ${csrc}/cpu/parallel.cpp
  ${csrc}/cpu/penalty.cpp
  ${csrc}/cpu/policies.cpp
  ${csrc}/cpu/scope_norms.cpp
  ${csrc}/cpu/telemetry.cpp
  ${csrc}/cpu/unit_clip.cpp)

set(instruction_sets baseline)
if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64")
  list(APPEND instruction_sets avx2 avx512)
  set(flags_avx2 -march=x86-64-v3)
  set(flags_avx512 -march=x86-64-v4 -mprefer-vector-width=512)
endif()

set(vector_objects)
foreach(set IN LISTS instruction_sets)
  add_library(vector_kernels_${set} OBJECT ${csrc}/cpu/batch_norm_kernels.cpp ${csrc}/cpu/vector_kernels.cpp)
  target_link_libraries(vector_kernels_${set} PRIVATE steadygrad_options)
  # Vectors wider than the registers are passed only to inlined functions, so their calling convention does not matter.
  target_compile_options(vector_kernels_${set} PRIVATE ${flags_${set}} -Wno-psabi)
  target_compile_definitions(vector_kernels_${set} PRIVATE STEADYGRAD_INSTRUCTION_SET=${set})
  list(APPEND vector_objects $<TARGET_OBJECTS:vector_kernels_${set}>)
endforeach()

# csrc/cuda has the operations as CUDA kernels and their launchers. The same sources are compiled by nvcc, or by the C++ compiler
# with tests/emulation in place of the CUDA runtime.
set(cuda_sources
  ${csrc}/cuda/backend.cpp
  ${csrc}/cuda/device.cu
  ${csrc}/cuda/functions.cu
  ${csrc}/cuda/grad_norm.cu
  ${csrc}/cuda/gradient.cu
  ${csrc}/cuda/penalty.cu
  ${csrc}/cuda/tensor_table.cu
  ${csrc}/cuda/unit_clip.cu
  ${csrc}/cuda/batch_norm/backward.cu
  ${csrc}/cuda/batch_norm/finish.cu
  ${csrc}/cuda/batch_norm/forward.cu
  ${csrc}/cuda/batch_norm/one_read_backward.cu
  ${csrc}/cuda/batch_norm/one_read_forward.cu
  ${csrc}/cuda/batch_norm/team.cu
  ${csrc}/cuda/batch_norm/tiles.cu
  ${csrc}/cuda/step/ask_policy.cu
  ${csrc}/cuda/step/decide.cu
  ${csrc}/cuda/step/step.cu
  ${csrc}/cuda/step/update_adadelta.cu
  ${csrc}/cuda/step/update_adagrad.cu
  ${csrc}/cuda/step/update_adam.cu
  ${csrc}/cuda/step/update_adamax.cu
  ${csrc}/cuda/step/update_asgd.cu
  ${csrc}/cuda/step/update_lion.cu
  ${csrc}/cuda/step/update_nadam.cu
  ${csrc}/cuda/step/update_radam.cu
  ${csrc}/cuda/step/update_rmsprop.cu
  ${csrc}/cuda/step/update_rprop.cu
  ${csrc}/cuda/step/update_sgd.cu)
file(GLOB emulation_sources CONFIGURE_DEPENDS ${csrc}/../tests/emulation/*.cpp)

# Makes the C++ compiler compile cuda_sources. GCC warns wrongly about variables that are set and used under the same condition.
function(compile_cuda_as_cpp)
  set(options -xc++ -Wno-unknown-pragmas)
  if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
    list(APPEND options -Wno-maybe-uninitialized)
  endif()
  set_source_files_properties(${cuda_sources} PROPERTIES LANGUAGE CXX COMPILE_OPTIONS "${options}")
endfunction()
