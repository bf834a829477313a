// CUDA's math intrinsics. The approximate ones are computed exactly here.
#pragma once

#include <chrono>
#include <cstdint>
#include <cstring>
#include <math.h>
#include <type_traits>

namespace steadygrad::emulation {

template <class To, class From>
To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

}  // namespace steadygrad::emulation

inline int __float_as_int(float a) { return steadygrad::emulation::bit_cast<int>(a); }
inline unsigned __float_as_uint(float a) { return steadygrad::emulation::bit_cast<unsigned>(a); }
inline float __int_as_float(int a) { return steadygrad::emulation::bit_cast<float>(a); }
inline float __uint_as_float(unsigned a) { return steadygrad::emulation::bit_cast<float>(a); }
inline long long __double_as_longlong(double a) { return steadygrad::emulation::bit_cast<long long>(a); }
inline double __longlong_as_double(long long a) { return steadygrad::emulation::bit_cast<double>(a); }
inline int __double2hiint(double a) { return static_cast<int>(__double_as_longlong(a) >> 32); }
inline int __double2loint(double a) { return static_cast<int>(__double_as_longlong(a)); }
inline double __hiloint2double(int high, int low) {
  const auto bits =
      static_cast<unsigned long long>(static_cast<unsigned>(high)) << 32 | static_cast<unsigned>(low);
  return steadygrad::emulation::bit_cast<double>(bits);
}

inline int __popc(unsigned a) { return __builtin_popcount(a); }
inline int __popcll(unsigned long long a) { return __builtin_popcountll(a); }
inline int __clz(int a) { return a == 0 ? 32 : __builtin_clz(static_cast<unsigned>(a)); }
inline int __clzll(long long a) { return a == 0 ? 64 : __builtin_clzll(static_cast<unsigned long long>(a)); }
inline int __ffs(int a) { return __builtin_ffs(a); }
inline int __ffsll(long long a) { return __builtin_ffsll(a); }
inline unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>(static_cast<unsigned long long>(a) * b >> 32);
}

inline float rsqrtf(float a) { return 1.0f / sqrtf(a); }
inline double rsqrt(double a) { return 1.0 / sqrt(a); }

inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __fsqrt_rn(float a) { return sqrtf(a); }
inline float __frcp_rn(float a) { return 1.0f / a; }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dsub_rn(double a, double b) { return a - b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __ddiv_rn(double a, double b) { return a / b; }
inline double __fma_rn(double a, double b, double c) { return fma(a, b, c); }
inline double __dsqrt_rn(double a) { return sqrt(a); }

inline float __fdividef(float a, float b) { return a / b; }
inline float __expf(float a) { return expf(a); }
inline float __logf(float a) { return logf(a); }
inline float __log2f(float a) { return log2f(a); }
inline float __powf(float a, float b) { return powf(a, b); }
inline float __saturatef(float a) { return a > 0.0f ? (a < 1.0f ? a : 1.0f) : 0.0f; }

inline long long clock64() { return std::chrono::steady_clock::now().time_since_epoch().count(); }

namespace steadygrad::emulation {

// CUDA has min and max for two floating-point types and for integers of one size; the rest is ambiguous
// there.
template <class A, class B>
constexpr bool are_comparable() {
  if constexpr (std::is_floating_point_v<A> || std::is_floating_point_v<B>) {
    return std::is_floating_point_v<A> && std::is_floating_point_v<B>;
  } else if constexpr (std::is_integral_v<A> && std::is_integral_v<B>) {
    return std::is_same_v<std::make_unsigned_t<A>, std::make_unsigned_t<B>>;
  } else {
    return false;
  }
}

}  // namespace steadygrad::emulation

template <class A, class B, class = std::enable_if_t<steadygrad::emulation::are_comparable<A, B>()>>
std::common_type_t<A, B> min(A a, B b) {
  using T = std::common_type_t<A, B>;
  const T first = static_cast<T>(a);
  const T second = static_cast<T>(b);
  if constexpr (std::is_floating_point_v<T>) {
    return fmin(first, second);  // a NaN loses
  } else {
    return second < first ? second : first;
  }
}

template <class A, class B, class = std::enable_if_t<steadygrad::emulation::are_comparable<A, B>()>>
std::common_type_t<A, B> max(A a, B b) {
  using T = std::common_type_t<A, B>;
  const T first = static_cast<T>(a);
  const T second = static_cast<T>(b);
  if constexpr (std::is_floating_point_v<T>) {
    return fmax(first, second);
  } else {
    return first < second ? second : first;
  }
}
