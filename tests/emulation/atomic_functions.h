// Atomics for the types that CUDA has. They are relaxed, as on the GPU.
#pragma once

#include <type_traits>

#include "emulation/memory_functions.h"

namespace steadygrad::emulation {

template <class T, class... Types>
constexpr bool is_one_of = (std::is_same_v<T, Types> || ...);

template <class T>
constexpr bool is_atomic_integer = is_one_of<T, int, unsigned, unsigned long long>;

// Replaces *address by change(*address) in one step and returns the old value.
template <class T, class Change>
T atomic_update(T* address, Change change) {
  T old;
  T next;
  __atomic_load(address, &old, __ATOMIC_RELAXED);
  do {
    next = change(old);
  } while (!__atomic_compare_exchange(address, &old, &next, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
  return old;
}

}  // namespace steadygrad::emulation

template <class T>
T atomicAdd(T* address, steadygrad::emulation::Exactly<T> value) {
  static_assert(steadygrad::emulation::is_atomic_integer<T> ||
                steadygrad::emulation::is_one_of<T, float, double>);
  return steadygrad::emulation::atomic_update(address,
                                              [value](T old) { return static_cast<T>(old + value); });
}

template <class T>
T atomicSub(T* address, steadygrad::emulation::Exactly<T> value) {
  static_assert(steadygrad::emulation::is_one_of<T, int, unsigned>);
  return steadygrad::emulation::atomic_update(address,
                                              [value](T old) { return static_cast<T>(old - value); });
}

template <class T>
T atomicMin(T* address, steadygrad::emulation::Exactly<T> value) {
  static_assert(steadygrad::emulation::is_atomic_integer<T> ||
                steadygrad::emulation::is_one_of<T, long long>);
  return steadygrad::emulation::atomic_update(address, [value](T old) { return value < old ? value : old; });
}

template <class T>
T atomicMax(T* address, steadygrad::emulation::Exactly<T> value) {
  static_assert(steadygrad::emulation::is_atomic_integer<T> ||
                steadygrad::emulation::is_one_of<T, long long>);
  return steadygrad::emulation::atomic_update(address, [value](T old) { return old < value ? value : old; });
}

template <class T>
T atomicAnd(T* address, steadygrad::emulation::Exactly<T> value) {
  static_assert(steadygrad::emulation::is_atomic_integer<T>);
  return steadygrad::emulation::atomic_update(address, [value](T old) { return old & value; });
}

template <class T>
T atomicOr(T* address, steadygrad::emulation::Exactly<T> value) {
  static_assert(steadygrad::emulation::is_atomic_integer<T>);
  return steadygrad::emulation::atomic_update(address, [value](T old) { return old | value; });
}

template <class T>
T atomicXor(T* address, steadygrad::emulation::Exactly<T> value) {
  static_assert(steadygrad::emulation::is_atomic_integer<T>);
  return steadygrad::emulation::atomic_update(address, [value](T old) { return old ^ value; });
}

template <class T>
T atomicExch(T* address, steadygrad::emulation::Exactly<T> value) {
  static_assert(steadygrad::emulation::is_atomic_integer<T> || steadygrad::emulation::is_one_of<T, float>);
  return steadygrad::emulation::atomic_update(address, [value](T) { return value; });
}

template <class T>
T atomicCAS(T* address, steadygrad::emulation::Exactly<T> compare, steadygrad::emulation::Exactly<T> value) {
  static_assert(steadygrad::emulation::is_atomic_integer<T> ||
                steadygrad::emulation::is_one_of<T, unsigned short>);
  return steadygrad::emulation::atomic_update(
      address, [compare, value](T old) { return old == compare ? value : old; });
}

// Counts to `limit` and starts again at 0.
inline unsigned atomicInc(unsigned* address, unsigned limit) {
  return steadygrad::emulation::atomic_update(address,
                                              [limit](unsigned old) { return old >= limit ? 0 : old + 1; });
}

inline unsigned atomicDec(unsigned* address, unsigned limit) {
  return steadygrad::emulation::atomic_update(
      address, [limit](unsigned old) { return old == 0 || old > limit ? limit : old - 1; });
}
