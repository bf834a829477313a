// Shuffles, votes and reductions of a warp.
#pragma once

#include <cstring>
#include <type_traits>

#include "emulation/execution.h"

namespace steadygrad::emulation {

template <class T>
uint64_t to_bits(T value) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "warp functions take values of 4 or 8 bytes");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  return bits;
}

template <class T>
T from_bits(uint64_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

template <class T>
T shuffle(unsigned mask, T value, int source, Location at) {
  static_assert(std::is_arithmetic_v<T>, "CUDA shuffles numbers only");
  return from_bits<T>(warp_rendezvous(mask, {WarpOperation::shuffle, to_bits(value), source}, at));
}

template <class T, class Combine>
T reduce(unsigned mask, T value, Combine, Location at) {
  static_assert(sizeof(T) == 4 && std::is_integral_v<T>, "CUDA reduces int and unsigned only");
  const auto combine = [](uint64_t a, uint64_t b) {
    return to_bits(Combine()(from_bits<T>(a), from_bits<T>(b)));
  };
  return from_bits<T>(warp_rendezvous(mask, {WarpOperation::reduce, to_bits(value), 0, combine}, at));
}

struct Add {
  // The lane wraps around, as on the GPU.
  int operator()(int a, int b) const {
    return static_cast<int>(static_cast<unsigned>(a) + static_cast<unsigned>(b));
  }
  unsigned operator()(unsigned a, unsigned b) const { return a + b; }
};
struct Minimum {
  template <class T>
  T operator()(T a, T b) const {
    return b < a ? b : a;
  }
};
struct Maximum {
  template <class T>
  T operator()(T a, T b) const {
    return a < b ? b : a;
  }
};
struct BitAnd {
  unsigned operator()(unsigned a, unsigned b) const { return a & b; }
};
struct BitOr {
  unsigned operator()(unsigned a, unsigned b) const { return a | b; }
};
struct BitXor {
  unsigned operator()(unsigned a, unsigned b) const { return a ^ b; }
};

}  // namespace steadygrad::emulation

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32,
              steadygrad::emulation::Location at = steadygrad::emulation::Location::here()) {
  const int segment = steadygrad::emulation::lane() & ~(width - 1);
  return steadygrad::emulation::shuffle(mask, value, segment | (source & (width - 1)), at);
}

template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32,
                 steadygrad::emulation::Location at = steadygrad::emulation::Location::here()) {
  const int lane = steadygrad::emulation::lane();
  const bool inside = static_cast<unsigned>(lane & (width - 1)) >= delta;
  return steadygrad::emulation::shuffle(mask, value, inside ? lane - static_cast<int>(delta) : lane, at);
}

template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32,
                   steadygrad::emulation::Location at = steadygrad::emulation::Location::here()) {
  const int lane = steadygrad::emulation::lane();
  const bool inside = static_cast<unsigned>(width - (lane & (width - 1))) > delta;
  return steadygrad::emulation::shuffle(mask, value, inside ? lane + static_cast<int>(delta) : lane, at);
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32,
                  steadygrad::emulation::Location at = steadygrad::emulation::Location::here()) {
  const int lane = steadygrad::emulation::lane();
  const int source = lane ^ lanes;
  return steadygrad::emulation::shuffle(mask, value, source > (lane | (width - 1)) ? lane : source, at);
}

inline unsigned __ballot_sync(unsigned mask, int predicate,
                              steadygrad::emulation::Location at = steadygrad::emulation::Location::here()) {
  using namespace steadygrad::emulation;
  return static_cast<unsigned>(warp_rendezvous(mask, {WarpOperation::ballot, predicate != 0}, at));
}

inline int __any_sync(unsigned mask, int predicate,
                      steadygrad::emulation::Location at = steadygrad::emulation::Location::here()) {
  return __ballot_sync(mask, predicate, at) != 0;
}

inline int __all_sync(unsigned mask, int predicate,
                      steadygrad::emulation::Location at = steadygrad::emulation::Location::here()) {
  return __ballot_sync(mask, predicate, at) == mask;
}

template <class T>
unsigned __match_any_sync(unsigned mask, T value,
                          steadygrad::emulation::Location at = steadygrad::emulation::Location::here()) {
  using namespace steadygrad::emulation;
  return static_cast<unsigned>(warp_rendezvous(mask, {WarpOperation::match, to_bits(value)}, at));
}

template <class T>
T __reduce_add_sync(unsigned mask, T value,
                    steadygrad::emulation::Location at = steadygrad::emulation::Location::here()) {
  return steadygrad::emulation::reduce(mask, value, steadygrad::emulation::Add(), at);
}

template <class T>
T __reduce_min_sync(unsigned mask, T value,
                    steadygrad::emulation::Location at = steadygrad::emulation::Location::here()) {
  return steadygrad::emulation::reduce(mask, value, steadygrad::emulation::Minimum(), at);
}

template <class T>
T __reduce_max_sync(unsigned mask, T value,
                    steadygrad::emulation::Location at = steadygrad::emulation::Location::here()) {
  return steadygrad::emulation::reduce(mask, value, steadygrad::emulation::Maximum(), at);
}

inline unsigned __reduce_and_sync(
    unsigned mask, unsigned value,
    steadygrad::emulation::Location at = steadygrad::emulation::Location::here()) {
  return steadygrad::emulation::reduce(mask, value, steadygrad::emulation::BitAnd(), at);
}

inline unsigned __reduce_or_sync(
    unsigned mask, unsigned value,
    steadygrad::emulation::Location at = steadygrad::emulation::Location::here()) {
  return steadygrad::emulation::reduce(mask, value, steadygrad::emulation::BitOr(), at);
}

inline unsigned __reduce_xor_sync(
    unsigned mask, unsigned value,
    steadygrad::emulation::Location at = steadygrad::emulation::Location::here()) {
  return steadygrad::emulation::reduce(mask, value, steadygrad::emulation::BitXor(), at);
}
