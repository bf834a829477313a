# Enables CUDA where nvcc is found; without it, the package has its CPU backend.
#
# Architectures: those that CMAKE_CUDA_ARCHITECTURES names, where "release" stands for the release list; else those of the environment
# variable CUDAARCHS; else those of the GPUs that are there; without a GPU, as in a container or on a login node, the release list.
include(CheckLanguage)
find_program(STEADYGRAD_NVCC nvcc HINTS ENV CUDA_HOME ENV CUDA_PATH PATHS /usr/local/cuda PATH_SUFFIXES bin)
if(DEFINED ENV{CUDACXX})
  set(STEADYGRAD_NVCC "$ENV{CUDACXX}")
elseif(STEADYGRAD_NVCC)
  # Not CMAKE_CUDA_COMPILER: with that, CMake does not ask whether it goes with the C++ compiler, and fails where it does not.
  set(ENV{CUDACXX} "${STEADYGRAD_NVCC}")
endif()

# Machine code for each, and PTX of the last for what comes after it.
set(release_architectures 75-real 80-real 86-real 89-real 90-real 100-real 120)

# Sets `result` to the architectures of the GPUs here; to nothing if there is none, or one that nvcc does not compile for.
function(find_gpu_architectures result)
  set(${result} "" PARENT_SCOPE)
  execute_process(COMMAND nvidia-smi --query-gpu=compute_cap --format=csv,noheader
    OUTPUT_VARIABLE capabilities ERROR_QUIET RESULT_VARIABLE failed)
  execute_process(COMMAND ${STEADYGRAD_NVCC} --list-gpu-arch OUTPUT_VARIABLE known ERROR_QUIET)
  if(failed)
    return()
  endif()
  string(REGEX MATCHALL "[0-9]+\\.[0-9]" capabilities "${capabilities}")
  set(found "")
  foreach(capability IN LISTS capabilities)
    string(REPLACE "." "" number ${capability})
    if(number LESS 75 OR NOT known MATCHES "compute_${number}[\r\n]")
      return()
    endif()
    list(APPEND found ${number}-real)
  endforeach()
  list(REMOVE_DUPLICATES found)
  set(${result} "${found}" PARENT_SCOPE)
endfunction()

if(NOT CMAKE_CUDA_ARCHITECTURES)
  set(CMAKE_CUDA_ARCHITECTURES "$ENV{CUDAARCHS}")
endif()
unset(ENV{CUDAARCHS})  # CMake would put it in the place of what is chosen here
if(NOT CMAKE_CUDA_ARCHITECTURES)
  find_gpu_architectures(CMAKE_CUDA_ARCHITECTURES)
endif()
if(NOT CMAKE_CUDA_ARCHITECTURES OR CMAKE_CUDA_ARCHITECTURES STREQUAL "release")
  set(CMAKE_CUDA_ARCHITECTURES ${release_architectures})
endif()

# How to say that there will be no CUDA backend.
set(severity STATUS)
if(STEADYGRAD_CUDA STREQUAL "REQUIRED")
  set(severity FATAL_ERROR)
endif()
check_language(CUDA)
if(NOT CMAKE_CUDA_COMPILER)
  message(${severity} "steadygrad: no nvcc that works with this C++ compiler, so no CUDA backend")
  return()
endif()
set(CMAKE_CUDA_RUNTIME_LIBRARY Static)
enable_language(CUDA)
if(CMAKE_CUDA_COMPILER_VERSION VERSION_LESS 12.8)
  message(${severity} "steadygrad: CUDA ${CMAKE_CUDA_COMPILER_VERSION} is older than 12.8, so no CUDA backend")
  return()
endif()
set(cuda_found ON)
message(STATUS "steadygrad: CUDA for ${CMAKE_CUDA_ARCHITECTURES}")
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
    message(FATAL_ERROR
      "steadygrad: CMAKE_CUDA_ARCHITECTURES: expected numbers such as 90-real, or release, got ${architecture}")
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

# The bits of the CPU backend: no contraction to fused multiply-add.
target_compile_options(steadygrad_options INTERFACE $<$<COMPILE_LANGUAGE:CUDA>:-fmad=false>)
if(STEADYGRAD_STRICT)
  target_compile_options(steadygrad_options INTERFACE
    $<$<COMPILE_LANGUAGE:CUDA>:-Werror=all-warnings -Xcompiler=-Wall,-Wextra,-Werror
    -Xptxas=--warn-on-spills,--warn-on-local-memory-usage,--warning-as-error>)
endif()
