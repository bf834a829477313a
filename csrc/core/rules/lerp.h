#pragma once

#include "core/host_device.h"

namespace steadygrad {

// torch.lerp: the form that is exact at the nearer end, so that weight 1 returns `end`.
template <class T>
STEADYGRAD_INLINE T lerp(T start, T end, T weight) {
  const T difference = end - start;
  return weight < T(0.5) ? start + weight * difference : end - difference * (T(1) - weight);
}

}  // namespace steadygrad
