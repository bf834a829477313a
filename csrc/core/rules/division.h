// The square root and the quotient of the rules. A GPU computes both in a few instructions where operands are
// ordinary, and calls a function otherwise: also for zero, which is all that the state of a parameter holds
// that no gradient has reached, such as the rows of an embedding that no batch has used. So zero has its
// answer here, beside the operation on another number. The bits are those of the plain operations.
#pragma once

#include <cmath>

#include "core/host_device.h"

namespace steadygrad {

template <class T>
STEADYGRAD_INLINE T square_root(T value) {
  const bool is_zero = value == T(0);
  const T root = std::sqrt(is_zero ? T(1) : value);
  return is_zero ? value : root;
}

#if defined(__CUDA_ARCH__)
// By their names, since the compiler would see through the choice of a dividend and divide zero all the same.
STEADYGRAD_INLINE float divided(float dividend, float divisor) { return __fdiv_rn(dividend, divisor); }
STEADYGRAD_INLINE double divided(double dividend, double divisor) { return __ddiv_rn(dividend, divisor); }
#else
template <class T>
STEADYGRAD_INLINE T divided(T dividend, T divisor) {
  return dividend / divisor;
}
#endif

template <class T>
STEADYGRAD_INLINE T quotient(T dividend, T divisor) {
  const bool is_zero = dividend == T(0) && divisor > T(0);
  const T result = divided(is_zero ? divisor : dividend, divisor);
  return is_zero ? dividend : result;
}

}  // namespace steadygrad
