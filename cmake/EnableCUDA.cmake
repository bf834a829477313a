# Enables CUDA where nvcc is found; without it, the package has its CPU backend.
# Architectures: CMAKE_CUDA_ARCHITECTURES or the environment's CUDAARCHS, else all that a release has.
include(CheckLanguage)
find_program(STEADYGRAD_NVCC nvcc HINTS ENV CUDACXX ENV CUDA_HOME ENV CUDA_PATH PATHS /usr/local/cuda PATH_SUFFIXES bin)
if(STEADYGRAD_NVCC AND NOT CMAKE_CUDA_COMPILER AND NOT DEFINED ENV{CUDACXX})
  set(CMAKE_CUDA_COMPILER ${STEADYGRAD_NVCC})
endif()
if(NOT CMAKE_CUDA_ARCHITECTURES)
  if(DEFINED ENV{CUDAARCHS})
    set(CMAKE_CUDA_ARCHITECTURES $ENV{CUDAARCHS})
  else()
    # Machine code for each, and PTX of the last for what comes after it.
    set(CMAKE_CUDA_ARCHITECTURES 75-real 80-real 86-real 89-real 90-real 100-real 120)
  endif()
endif()
check_language(CUDA)
if(NOT CMAKE_CUDA_COMPILER)
  message(STATUS "steadygrad: no nvcc, so no CUDA backend")
  return()
endif()
set(CMAKE_CUDA_RUNTIME_LIBRARY Static)
enable_language(CUDA)
if(CMAKE_CUDA_COMPILER_VERSION VERSION_LESS 12.8)
  message(FATAL_ERROR
    "steadygrad needs CUDA 12.8 or later, found ${CMAKE_CUDA_COMPILER_VERSION}. Install a newer toolkit, or leave CUDA out with "
    "-DSTEADYGRAD_CUDA=OFF (pip install -C cmake.define.STEADYGRAD_CUDA=OFF ...)")
endif()
set(CMAKE_CUDA_STANDARD 17)
set(CMAKE_CUDA_STANDARD_REQUIRED ON)

# Machine code is similar from one architecture to the next and compresses well. Drivers before CUDA 12.4's (550.54) cannot read it.
target_compile_options(steadygrad_options INTERFACE $<$<COMPILE_LANGUAGE:CUDA>:--compress-mode=size>)

# What is compiled in, for messages and for telling which devices can be used.
set(cuda_architectures "")
set(cuda_machine_code "")
set(cuda_ptx "")
foreach(architecture IN LISTS CMAKE_CUDA_ARCHITECTURES)
  string(REGEX MATCH "^[0-9]+" number "${architecture}")
  if(NOT number)
    message(FATAL_ERROR "steadygrad: CMAKE_CUDA_ARCHITECTURES: expected numbers such as 90-real, got ${architecture}")
  endif()
  if(NOT architecture MATCHES "virtual")
    list(APPEND cuda_machine_code ${number})
    list(APPEND cuda_architectures sm_${number})
  endif()
  if(NOT architecture MATCHES "real")
    list(APPEND cuda_ptx ${number})
    list(APPEND cuda_architectures "compute_${number} (PTX)")
  endif()
endforeach()
string(REPLACE ";" ", " cuda_architectures "${cuda_architectures}")
string(REPLACE ";" " " cuda_machine_code "${cuda_machine_code}")
string(REPLACE ";" " " cuda_ptx "${cuda_ptx}")

# The bits of the CPU backend: no contraction to fused multiply-add. A spilled register or a stack is an error.
target_compile_options(steadygrad_options INTERFACE
  $<$<COMPILE_LANGUAGE:CUDA>:-O3 -fmad=false -Werror=all-warnings -Xcompiler=-Wall,-Wextra,-Werror
  -Xptxas=--warn-on-spills,--warn-on-local-memory-usage,--warning-as-error>)
