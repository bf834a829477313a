// Loads and stores neighbouring elements of any dtype as vectors of the type they are computed in. Files that
// are compiled once per instruction set each have their own copy, in the namespace of that name, and all of
// it is always inlined.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "core/dtype.h"
#include "core/host_device.h"

namespace steadygrad::cpu::STEADYGRAD_INSTRUCTION_SET {

// The width is one or two registers of fp32, and one or two bytes of a mask. Vectors of fp64 have as many
// elements.
#if defined(__AVX512F__)
constexpr int kWidth = 16;
#else
constexpr int kWidth = 8;
#endif

typedef float FloatVector __attribute__((vector_size(kWidth * sizeof(float))));
typedef double DoubleVector __attribute__((vector_size(kWidth * sizeof(double))));
typedef int32_t IntVector __attribute__((vector_size(kWidth * sizeof(int32_t))));
typedef int64_t LongVector __attribute__((vector_size(kWidth * sizeof(int64_t))));
typedef uint32_t UintVector __attribute__((vector_size(kWidth * sizeof(uint32_t))));
typedef uint16_t ShortVector __attribute__((vector_size(kWidth * sizeof(uint16_t))));

template <class T>
struct VectorOf;
template <>
struct VectorOf<float> {
  typedef FloatVector type;
};
template <>
struct VectorOf<double> {
  typedef DoubleVector type;
};
template <class T>
using Vector = typename VectorOf<T>::type;

// The result of a comparison.
template <class V>
using Lanes = std::conditional_t<sizeof(V) == sizeof(LongVector), LongVector, IntVector>;

template <class Element>
struct ComputedIn {
  using type = float;
};
template <>
struct ComputedIn<double> {
  using type = double;
};
template <class Element>
using Compute = typename ComputedIn<Element>::type;

// The size of the widest register. For wider vectors the compiler splits arithmetic into registers, but it
// compares and selects one element at a time. So comparisons are made by register, and selections by bits.
#if defined(__AVX512F__)
constexpr size_t kRegister = 64;
#elif defined(__AVX2__)
constexpr size_t kRegister = 32;
#else
constexpr size_t kRegister = 16;
#endif

template <class V>
using Scalar = std::remove_reference_t<decltype(std::declval<V&>()[0])>;

template <class V, class Compare>
STEADYGRAD_INLINE Lanes<V> compared(V a, V b, Compare compare) {
  if constexpr (sizeof(V) <= kRegister) {
    return compare(a, b);
  } else {
    typedef Scalar<V> Register __attribute__((vector_size(kRegister)));
    typedef Scalar<Lanes<V>> Outcome __attribute__((vector_size(kRegister)));
    constexpr size_t kParts = sizeof(V) / kRegister;
    Register parts_of_a[kParts];
    Register parts_of_b[kParts];
    Outcome outcomes[kParts];
    memcpy(parts_of_a, &a, sizeof(V));
    memcpy(parts_of_b, &b, sizeof(V));
    for (size_t k = 0; k < kParts; ++k) outcomes[k] = compare(parts_of_a[k], parts_of_b[k]);
    Lanes<V> lanes;
    memcpy(&lanes, outcomes, sizeof(V));
    return lanes;
  }
}

struct AtMost {
  template <class V>
  STEADYGRAD_INLINE auto operator()(V a, V b) const {
    return a <= b;
  }
};
struct Equal {
  template <class V>
  STEADYGRAD_INLINE auto operator()(V a, V b) const {
    return a == b;
  }
};

// Returns the vector where the lanes are set, and zero elsewhere.
template <class V>
STEADYGRAD_INLINE V where(Lanes<V> lanes, V vector) {
  return bit_cast<V>(bit_cast<Lanes<V>>(vector) & lanes);
}

// Returns the one vector where the lanes are set, and the other one elsewhere.
template <class V>
STEADYGRAD_INLINE V where(Lanes<V> lanes, V vector, V otherwise) {
  return bit_cast<V>((bit_cast<Lanes<V>>(vector) & lanes) | (bit_cast<Lanes<V>>(otherwise) & ~lanes));
}

template <class V, class E>
STEADYGRAD_INLINE V load_bits(const E* from) {
  V vector;
  memcpy(&vector, from, sizeof(V));
  return vector;
}

STEADYGRAD_INLINE FloatVector load(const float* from) { return load_bits<FloatVector>(from); }
STEADYGRAD_INLINE DoubleVector load(const double* from) { return load_bits<DoubleVector>(from); }
// GCC would compile a conversion to four instructions where one does it.
STEADYGRAD_INLINE FloatVector load(const BFloat16* from) {
#if defined(__AVX512F__)
  const auto wide = bit_cast<UintVector>(_mm512_maskz_cvtepu16_epi32(0xffff, load_bits<__m256i>(from)));
#elif defined(__AVX2__)
  const auto wide = bit_cast<UintVector>(_mm256_cvtepu16_epi32(load_bits<__m128i>(from)));
#else
  const auto wide = __builtin_convertvector(load_bits<ShortVector>(from), UintVector);
#endif
  return bit_cast<FloatVector>(wide << 16);
}
#if !defined(__F16C__)
// Without instructions for it a conversion is long, so one copy of it serves all kernels.
__attribute__((noinline)) static void widen(const Float16* from, float* to) {
  for (int k = 0; k < kWidth; ++k) to[k] = to_float(from[k]);
}
__attribute__((noinline)) static void narrow(const float* from, Float16* to) {
  for (int k = 0; k < kWidth; ++k) to[k] = to_float16(from[k]);
}
#endif
STEADYGRAD_INLINE FloatVector load(const Float16* from) {
#if defined(__AVX512F__)
  return _mm512_maskz_cvtph_ps(0xffff, load_bits<__m256i>(from));
#elif defined(__F16C__)
  return _mm256_cvtph_ps(load_bits<__m128i>(from));
#else
  float values[kWidth];
  widen(from, values);
  return load(values);
#endif
}

// Converts a vector to elements as they are stored in memory.
template <class Element, class V>
STEADYGRAD_INLINE auto stored(V vector) {
  if constexpr (std::is_same_v<Element, BFloat16>) {
    const UintVector bits = bit_cast<UintVector>(vector);
    const UintVector rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const auto number = bit_cast<UintVector>(compared(vector, vector, Equal()));
    const UintVector nan = UintVector{} + 0x7fc0u;
    const UintVector chosen = (rounded & number) | (nan & ~number);
#if defined(__AVX512F__)
    return bit_cast<ShortVector>(_mm512_maskz_cvtepi32_epi16(0xffff, bit_cast<__m512i>(chosen)));
#else
    return __builtin_convertvector(chosen, ShortVector);
#endif
  } else if constexpr (std::is_same_v<Element, Float16>) {
#if defined(__AVX512F__)
    return bit_cast<ShortVector>(_mm512_maskz_cvtps_ph(0xffff, vector, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
    return bit_cast<ShortVector>(_mm256_cvtps_ph(vector, _MM_FROUND_TO_NEAREST_INT));
#else
    float values[kWidth];
    Float16 halves[kWidth];
    memcpy(values, &vector, sizeof(values));
    narrow(values, halves);
    return load_bits<ShortVector>(halves);
#endif
  } else {
    return vector;
  }
}

template <class Element, class V>
STEADYGRAD_INLINE void store(Element* to, V vector) {
  const auto bits = stored<Element>(vector);
  memcpy(to, &bits, sizeof(bits));
}

// Stores past the caches what they could not keep; `to` is aligned to a half or a quarter of a cache line.
// Other threads see the result after finish_streams().
template <class Element, class V>
STEADYGRAD_INLINE void stream(Element* to, V vector) {
#if defined(__SSE2__)
  const auto bits = stored<Element>(vector);
  struct Parts {
    __m128i parts[sizeof(bits) / sizeof(__m128i)];
  };
  const Parts whole = bit_cast<Parts>(bits);
  for (size_t k = 0; k < sizeof(bits) / sizeof(__m128i); ++k) {
    _mm_stream_si128(reinterpret_cast<__m128i*>(to) + k, whole.parts[k]);
  }
#else
  store(to, vector);
#endif
}

STEADYGRAD_INLINE void finish_streams() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

// Returns lanes of which the first, or the last, `count` are set.
template <class V>
STEADYGRAD_INLINE Lanes<V> lanes_up_to(int count, bool first) {
  struct Table {
    Scalar<Lanes<V>> lanes[3 * kWidth] = {};
    constexpr Table() {
      for (int k = kWidth; k < 2 * kWidth; ++k) lanes[k] = -1;
    }
  };
  static constexpr Table kTable;
  return load_bits<Lanes<V>>(kTable.lanes + (first ? 2 * kWidth - count : count));
}

// Handles a whole vector of elements.
struct Whole {
  bool streams = false;

  template <class Element>
  STEADYGRAD_INLINE auto operator()(const Element* from) const {
    return load(from);
  }
  template <class Element, class V>
  STEADYGRAD_INLINE void put(Element* to, V vector) const {
    if (streams) return stream(to, vector);
    store(to, vector);
  }
  // Returns the part of a vector that counts: all of it here, and in End only the elements that are new.
  template <class V>
  STEADYGRAD_INLINE V only(V vector) const {
    return vector;
  }
  // Returns the bits of a mask's row for the elements from i on.
  STEADYGRAD_INLINE unsigned bits(const uint8_t* mask, int64_t i) const {
    unsigned bits = mask[i / 8];
    if constexpr (kWidth > 8) bits |= static_cast<unsigned>(mask[i / 8 + 1]) << 8;
    return bits;
  }
  STEADYGRAD_INLINE void put_bits(uint8_t* mask, int64_t i, unsigned bits) const {
    mask[i / 8] = static_cast<uint8_t>(bits);
    if constexpr (kWidth > 8) mask[i / 8 + 1] = static_cast<uint8_t>(bits >> 8);
  }
};

// Handles the first vector of a cache line, and prefetches what is `ahead` bytes later: the hardware's
// prefetcher does not follow several streams at once, or runs that are short.
struct First : Whole {
  int64_t ahead;

  STEADYGRAD_INLINE First(int64_t bytes, bool streams) : Whole{streams}, ahead(bytes) {}
  template <class Element>
  STEADYGRAD_INLINE auto operator()(const Element* from) const {
    __builtin_prefetch(reinterpret_cast<const char*>(from) + ahead);
    return load(from);
  }
};

// Copy the elements of a row that is shorter than a vector, with zeros behind them, and back. They are rare
// and long, so all kernels share one copy.
template <class Element>
__attribute__((noinline)) static void pad(const Element* from, int64_t count, Element* padded) {
  for (int64_t k = 0; k < kWidth; ++k) padded[k] = k < count ? from[k] : Element{};
}
template <class Element>
__attribute__((noinline)) static void unpad(const Element* padded, int64_t count, Element* to) {
  for (int64_t k = 0; k < count; ++k) to[k] = padded[k];
}

// Handles the end of a row: `count` new elements, which are the last ones of their vector or, in a row that
// is shorter than a vector, its first ones.
struct End : Whole {
  int count;
  bool is_short;

  STEADYGRAD_INLINE End(int64_t new_ones, bool short_row)
      : count(static_cast<int>(new_ones)), is_short(short_row) {}
  template <class Element>
  STEADYGRAD_INLINE auto operator()(const Element* from) const {
    Element padded[kWidth];
    if (is_short) {
      pad(from, count, padded);
      from = padded;
    }
    return load(from);
  }
  template <class Element, class V>
  STEADYGRAD_INLINE void put(Element* to, V vector) const {
    if (!is_short) return store(to, vector);
    Element padded[kWidth];
    store(padded, vector);
    unpad(padded, count, to);
  }
  template <class V>
  STEADYGRAD_INLINE V only(V vector) const {
    return where(lanes_up_to<V>(count, is_short), vector);
  }
  STEADYGRAD_INLINE unsigned bits(const uint8_t* mask, int64_t i) const {
    // The new bits may begin inside a byte.
    const int bytes = is_short ? (count + 7) / 8 : kWidth / 8 + (i % 8 != 0);
    const uint8_t* const byte = mask + i / 8;
    unsigned bits = byte[0];
    for (int k = 1; k < bytes; ++k) bits |= static_cast<unsigned>(byte[k]) << 8 * k;
    return bits >> i % 8;
  }
  STEADYGRAD_INLINE void put_bits(uint8_t* mask, int64_t i, unsigned bits) const {
    const int old = is_short ? 0 : kWidth - count;
    uint8_t* const byte = mask + (i + old) / 8;
    const unsigned new_bits = (bits & ((1u << kWidth) - 1)) >> old;
    byte[0] = static_cast<uint8_t>(new_bits);
    if (count > 8) byte[1] = static_cast<uint8_t>(new_bits >> 8);
  }
};

// Calls step(i, End) for the elements from `done` on; what is left is less than the vectors of a cache line.
template <class Step>
STEADYGRAD_INLINE void over_end(int64_t done, int64_t length, Step step) {
  while (done < length) {
    const bool is_short = length < kWidth;
    const int64_t begin = is_short || done + kWidth <= length ? done : length - kWidth;
    const int64_t end = is_short ? length : begin + kWidth;
    step(begin, End(end - done, is_short));
    done = end;
  }
}

template <class Element>
constexpr int kVectorsPerLine =
    kWidth * sizeof(Element) >= 64 ? 1 : 64 / (kWidth * static_cast<int>(sizeof(Element)));

template <class Element, class Step>
STEADYGRAD_INLINE void over_row(int64_t length, int64_t ahead, bool streams, Step step) {
  constexpr int kVectors = kVectorsPerLine<Element>;
  int64_t i = 0;
  for (; i + kVectors * kWidth <= length; i += kVectors * kWidth) {
    step(i, First(ahead, streams));
#pragma GCC unroll 4
    for (int v = 1; v < kVectors; ++v) step(i + v * kWidth, Whole{streams});
  }
  over_end(i, length, step);
}

// Returns the lanes as bits: bit k is lane k.
STEADYGRAD_INLINE unsigned bits_of(IntVector lanes) {
  unsigned bits = 0;
#if defined(__AVX512DQ__)
  bits = _mm512_movepi32_mask(bit_cast<__m512i>(lanes));
#elif defined(__AVX__)
  bits = static_cast<unsigned>(_mm256_movemask_ps(bit_cast<__m256>(lanes)));
#elif defined(__SSE2__)
  __m128 halves[2];
  memcpy(halves, &lanes, sizeof(lanes));
  bits = static_cast<unsigned>(_mm_movemask_ps(halves[0]) | _mm_movemask_ps(halves[1]) << 4);
#else
  for (int k = 0; k < kWidth; ++k) bits |= static_cast<unsigned>(lanes[k] & 1) << k;
#endif
  return bits;
}
STEADYGRAD_INLINE unsigned bits_of(LongVector lanes) {
  return bits_of(__builtin_convertvector(lanes, IntVector));
}

template <class V>
STEADYGRAD_INLINE Lanes<V> lanes_of(unsigned bits) {
#if defined(__AVX512F__)
  const Lanes<V> places = {1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768};
#else
  const Lanes<V> places = {1, 2, 4, 8, 16, 32, 64, 128};
#endif
  return compared((Lanes<V>{} + static_cast<int>(bits)) & places, places, Equal());
}

}  // namespace steadygrad::cpu::STEADYGRAD_INSTRUCTION_SET
