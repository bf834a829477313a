# Enables CUDA if nvcc is found; without nvcc the package has only its CPU backend.
#
# The architectures are those that CMAKE_CUDA_ARCHITECTURES names, where "release" stands for the release list; else those of the
# environment variable CUDAARCHS; else those of this machine's GPUs; without a GPU, as in a container or on a login node, the release
# list.
include(CheckLanguage)
find_program(STEADYGRAD_NVCC nvcc HINTS ENV CUDA_HOME ENV CUDA_PATH PATHS /usr/local/cuda PATH_SUFFIXES bin)
if(DEFINED ENV{CUDACXX})
  set(STEADYGRAD_NVCC "$ENV{CUDACXX}")
elseif(STEADYGRAD_NVCC)
  # If CMAKE_CUDA_COMPILER were set instead, check_language would not test whether nvcc works with the C++ compiler, and enable_language
  # would fail if it does not.
  set(ENV{CUDACXX} "${STEADYGRAD_NVCC}")
endif()

# A release has machine code for each of these, and PTX of the last one for later architectures.
set(release_architectures 75-real 80-real 86-real 89-real 90-real 100-real 120)

# Sets `result` to the architectures of this machine's GPUs; to nothing without a GPU, or if nvcc cannot compile for one of them.
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
unset(ENV{CUDAARCHS})  # CMake would prefer it to the choice made here.
if(NOT CMAKE_CUDA_ARCHITECTURES)
  find_gpu_architectures(CMAKE_CUDA_ARCHITECTURES)
endif()
if(NOT CMAKE_CUDA_ARCHITECTURES OR CMAKE_CUDA_ARCHITECTURES STREQUAL "release")
  set(CMAKE_CUDA_ARCHITECTURES ${release_architectures})
endif()

# The severity of the message that there will be no CUDA backend.
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

# Machine code of neighbouring architectures is similar and compresses well. Drivers older than that of CUDA 12.4 (550.54) cannot read
# compressed code.
target_compile_options(steadygrad_options INTERFACE $<$<COMPILE_LANGUAGE:CUDA>:--compress-mode=size>)

# These lists say what is compiled in, for messages and for telling which devices can be used.
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

# Contraction to fused multiply-add is off, so that CUDA gives the bits of the CPU backend.
target_compile_options(steadygrad_options INTERFACE $<$<COMPILE_LANGUAGE:CUDA>:-fmad=false>)
if(STEADYGRAD_STRICT)
  target_compile_options(steadygrad_options INTERFACE
    $<$<COMPILE_LANGUAGE:CUDA>:-Werror=all-warnings -Xcompiler=-Wall,-Wextra,-Werror
    -Xptxas=--warn-on-spills,--warn-on-local-memory-usage,--warning-as-error>)
endif()
