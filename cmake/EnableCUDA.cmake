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

string(REGEX REPLACE "(-real|-virtual)" "" cuda_architectures "${CMAKE_CUDA_ARCHITECTURES}")
string(REGEX REPLACE "([0-9]+)" "sm_\\1" cuda_architectures "${cuda_architectures}")
string(REPLACE ";" ", " cuda_architectures "${cuda_architectures}")

# The bits of the CPU backend: no contraction to fused multiply-add. A spilled register is an error.
target_compile_options(steadygrad_options INTERFACE
  $<$<COMPILE_LANGUAGE:CUDA>:-O3 -fmad=false -Werror=all-warnings -Xcompiler=-Wall,-Wextra,-Werror
  -Xptxas=--warn-on-spills,--warning-as-error>)
