#include <cstdlib>
#include <stdexcept>
#include <string>

#include "cpu/batch_norm_kernels.h"
#include "cpu/vector_kernels.h"

namespace steadygrad::cpu {

namespace baseline {
const VectorKernels<float>& float_kernels();
const VectorKernels<double>& double_kernels();
const BatchNormKernels<float>& batch_norm_kernels(DType dtype);
const BatchNormKernels<double>& batch_norm_double_kernels();
}  // namespace baseline
#if defined(__x86_64__)
namespace avx2 {
const VectorKernels<float>& float_kernels();
const VectorKernels<double>& double_kernels();
const BatchNormKernels<float>& batch_norm_kernels(DType dtype);
const BatchNormKernels<double>& batch_norm_double_kernels();
}  // namespace avx2
namespace avx512 {
const VectorKernels<float>& float_kernels();
const VectorKernels<double>& double_kernels();
const BatchNormKernels<float>& batch_norm_kernels(DType dtype);
const BatchNormKernels<double>& batch_norm_double_kernels();
}  // namespace avx512
#endif

namespace {

struct InstructionSet {
  const char* name;
  bool supported;
  const VectorKernels<float>& float_kernels;
  const VectorKernels<double>& double_kernels;
  const BatchNormKernels<float>& (*batch_norm_kernels)(DType dtype);
  const BatchNormKernels<double>& (*batch_norm_double_kernels)();
};

#if defined(__x86_64__)
// The kernels are compiled for these levels of the x86-64 psABI. They are recognised by features, since older
// compilers do not know the levels' names. Processors with these four features have the rest of x86-64-v3.
bool supports_v3() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
         __builtin_cpu_supports("bmi2");
}
bool supports_v4() {
  return supports_v3() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vl");
}
#endif

const InstructionSet& chosen() {
  static const InstructionSet sets[] = {
#if defined(__x86_64__)
      {"avx512", supports_v4(), avx512::float_kernels(), avx512::double_kernels(), avx512::batch_norm_kernels,
       avx512::batch_norm_double_kernels},
      {"avx2", supports_v3(), avx2::float_kernels(), avx2::double_kernels(), avx2::batch_norm_kernels,
       avx2::batch_norm_double_kernels},
#endif
      {"baseline", true, baseline::float_kernels(), baseline::double_kernels(), baseline::batch_norm_kernels,
       baseline::batch_norm_double_kernels},
  };
  static const InstructionSet& set = []() -> const InstructionSet& {
    const char* wanted = std::getenv("STEADYGRAD_INSTRUCTION_SET");
    for (const InstructionSet& candidate : sets) {
      if (candidate.supported && (wanted == nullptr || std::string(wanted) == candidate.name))
        return candidate;
    }
    throw std::runtime_error(std::string("STEADYGRAD_INSTRUCTION_SET: expected a set this processor has ("
                                         "baseline, avx2 or avx512), got ") +
                             wanted);
  }();
  return set;
}

}  // namespace

const char* instruction_set() { return chosen().name; }

template <>
const VectorKernels<float>& vector_kernels<float>() {
  return chosen().float_kernels;
}

template <>
const VectorKernels<double>& vector_kernels<double>() {
  return chosen().double_kernels;
}

template <>
const BatchNormKernels<float>& batch_norm_kernels<float>(DType dtype) {
  return chosen().batch_norm_kernels(dtype);
}

template <>
const BatchNormKernels<double>& batch_norm_kernels<double>(DType) {
  return chosen().batch_norm_double_kernels();
}

}  // namespace steadygrad::cpu
