// Launches a kernel and waits for it.
#pragma once

#include <tuple>
#include <type_traits>
#include <utility>

#include "emulation/runtime.h"

namespace steadygrad::emulation {

// `invoke(arguments)` calls the kernel once, as one thread of it; `kernel` identifies it.
cudaError_t launch(const cudaLaunchConfig_t& config, const void* kernel, void (*invoke)(const void*),
                   const void* arguments);

// One copy of the arguments for the whole grid.
template <class... Parameters>
struct Call {
  void (*kernel)(Parameters...);
  std::tuple<std::decay_t<Parameters>...> arguments;

  static void invoke(const void* call) {
    std::apply(static_cast<const Call*>(call)->kernel, static_cast<const Call*>(call)->arguments);
  }
};

}  // namespace steadygrad::emulation

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  using Call = steadygrad::emulation::Call<Parameters...>;
  const Call call{kernel, {std::forward<Arguments>(arguments)...}};
  return steadygrad::emulation::launch(*config, reinterpret_cast<const void*>(kernel), &Call::invoke, &call);
}
