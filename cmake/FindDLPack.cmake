# Finds dlpack.h 1.3 in the build requirement apache-tvm-ffi or, if that is missing, in an installed torch.
execute_process(
  COMMAND ${Python_EXECUTABLE} -c "
import importlib.util, pathlib
for package, header in (('tvm_ffi', 'include/dlpack/dlpack.h'), ('torch', 'include/ATen/dlpack.h')):
    spec = importlib.util.find_spec(package)
    path = spec and pathlib.Path(spec.origin).parent / header
    if path and path.exists():
        print(path.as_posix(), end='')
        break
"
  OUTPUT_VARIABLE DLPACK_HEADER
  COMMAND_ERROR_IS_FATAL ANY)
if(NOT DLPACK_HEADER)
  message(FATAL_ERROR "dlpack.h not found: install apache-tvm-ffi (or torch >= 2.10) into ${Python_EXECUTABLE}'s environment")
endif()

# torch names the header ATen/dlpack.h; a forwarding header gives it the same name in both cases.
set(DLPACK_INCLUDE_DIR ${CMAKE_CURRENT_BINARY_DIR}/include)
file(WRITE ${DLPACK_INCLUDE_DIR}/dlpack/dlpack.h "#include \"${DLPACK_HEADER}\"\n")
