// Compiled once per instruction set into a namespace of that name, as vector_kernels.cpp is. Everything here
// has internal linkage or is always inlined.
#include "cpu/batch_norm_kernels.h"

#include <cstring>
#include <type_traits>

namespace steadygrad::cpu::STEADYGRAD_INSTRUCTION_SET {
namespace {

// Eight elements at a time: a byte of the mask.
constexpr int kWidth = kSumLanes;

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
  typedef IntVector Mask;
};
template <>
struct VectorOf<double> {
  typedef DoubleVector type;
  typedef LongVector Mask;
};
template <class T>
using Vector = typename VectorOf<T>::type;

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

template <class V, class E>
STEADYGRAD_INLINE V load_bits(const E* from) {
  V vector;
  memcpy(&vector, from, sizeof(V));
  return vector;
}

STEADYGRAD_INLINE FloatVector load(const float* from) { return load_bits<FloatVector>(from); }
STEADYGRAD_INLINE DoubleVector load(const double* from) { return load_bits<DoubleVector>(from); }
STEADYGRAD_INLINE FloatVector load(const BFloat16* from) {
  const auto wide = __builtin_convertvector(load_bits<ShortVector>(from), UintVector);
  return bit_cast<FloatVector>(wide << 16);
}
STEADYGRAD_INLINE FloatVector load(const Float16* from) {
#if defined(__F16C__)
  typedef int16_t Halves __attribute__((vector_size(16)));
  return bit_cast<FloatVector>(__builtin_ia32_vcvtph2ps256(load_bits<Halves>(from)));
#else
  FloatVector vector;
  for (int k = 0; k < kWidth; ++k) vector[k] = to_float(from[k]);
  return vector;
#endif
}

STEADYGRAD_INLINE void store(float* to, FloatVector vector) { memcpy(to, &vector, sizeof(vector)); }
STEADYGRAD_INLINE void store(double* to, DoubleVector vector) { memcpy(to, &vector, sizeof(vector)); }
STEADYGRAD_INLINE void store(BFloat16* to, FloatVector vector) {
  const UintVector bits = bit_cast<UintVector>(vector);
  const UintVector nan = UintVector{} + 0x7fc0u;
  const UintVector rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const auto narrow = __builtin_convertvector(vector != vector ? nan : rounded, ShortVector);
  memcpy(to, &narrow, sizeof(narrow));
}
STEADYGRAD_INLINE void store(Float16* to, FloatVector vector) {
#if defined(__F16C__)
  const auto halves = __builtin_ia32_vcvtps2ph256(vector, 0);
  memcpy(to, &halves, sizeof(halves));
#else
  for (int k = 0; k < kWidth; ++k) to[k] = to_float16(vector[k]);
#endif
}

// Eight elements, or those that are left of a row: the others are zero, and are not stored.
struct Whole {
  template <class Element>
  STEADYGRAD_INLINE auto operator()(const Element* from) const {
    return load(from);
  }
  template <class Element, class V>
  STEADYGRAD_INLINE void put(Element* to, V vector) const {
    store(to, vector);
  }
  template <class V>
  STEADYGRAD_INLINE V only(V vector) const {
    return vector;
  }
};
struct Part {
  int64_t count;

  template <class Element>
  STEADYGRAD_INLINE auto operator()(const Element* from) const {
    Element padded[kWidth] = {};
    for (int64_t k = 0; k < count; ++k) padded[k] = from[k];
    return load(padded);
  }
  template <class Element, class V>
  STEADYGRAD_INLINE void put(Element* to, V vector) const {
    Element padded[kWidth];
    store(padded, vector);
    for (int64_t k = 0; k < count; ++k) to[k] = padded[k];
  }
  STEADYGRAD_INLINE DoubleVector only(DoubleVector vector) const {
    const LongVector lane = {0, 1, 2, 3, 4, 5, 6, 7};
    return lane < count ? vector : DoubleVector{};
  }
};

template <class Step>
STEADYGRAD_INLINE void over_row(int64_t length, Step step) {
  int64_t i = 0;
  for (; i + kWidth <= length; i += kWidth) step(i, Whole{});
  if (i < length) step(i, Part{length - i});
}

// One channel's coefficient for a whole row, or eight channels'.
template <class T, bool kRowIsChannel>
STEADYGRAD_INLINE Vector<T> coefficient(const T* table, int64_t row, int64_t i) {
  if constexpr (kRowIsChannel) return Vector<T>{} + table[row];
  return load(table + i);
}

template <class T, bool kRowIsChannel>
STEADYGRAD_INLINE Normalization<Vector<T>> normalization_at(const NormalizationTable<T>& table, int64_t row,
                                                            int64_t i) {
  return {coefficient<T, kRowIsChannel>(table.center, row, i),
          coefficient<T, kRowIsChannel>(table.scale, row, i),
          coefficient<T, kRowIsChannel>(table.offset, row, i)};
}

// Bit k of the byte tells of lane k.
template <class Mask>
STEADYGRAD_INLINE uint8_t byte_of(Mask lanes) {
#if defined(__AVX__)
  if constexpr (std::is_same_v<Mask, IntVector>) {
    return static_cast<uint8_t>(__builtin_ia32_movmskps256(bit_cast<FloatVector>(lanes)));
  }
#endif
  unsigned byte = 0;
  for (int k = 0; k < kWidth; ++k) byte |= (lanes[k] & 1) << k;
  return static_cast<uint8_t>(byte);
}

template <class T>
STEADYGRAD_INLINE typename VectorOf<T>::Mask lanes_of(uint8_t byte) {
  using Mask = typename VectorOf<T>::Mask;
  const Mask bits = {1, 2, 4, 8, 16, 32, 64, 128};
  const Mask all = Mask{} + byte;
  return (all & bits) != 0;
}

template <class Function>
STEADYGRAD_INLINE void with_flag(bool flag, Function function) {
  if (flag) return function(std::true_type{});
  function(std::false_type{});
}

template <class Element, bool kRowIsChannel, bool kResidual, bool kMask>
STEADYGRAD_INLINE void normalize(const NormalizeRows<Compute<Element>>& call) {
  using T = Compute<Element>;
  const auto* input = static_cast<const Element*>(call.input);
  const auto* residual = static_cast<const Element*>(call.residual);
  auto* output = static_cast<Element*>(call.output);
  uint8_t* mask = call.mask;
  const NormalizationTable<T> table = call.table;
  const int64_t length = call.rows.length;
  const Vector<T> zero = {};
  // Nothing is below NaN: without ReLU every element passes.
  const Vector<T> lowest = zero + (call.relu ? T(0) : static_cast<T>(NAN));
  for (int64_t row = 0; row < call.rows.rows; ++row) {
    over_row(length, [&](int64_t i, auto part) __attribute__((always_inline)) {
      Vector<T> y = normalization_at<T, kRowIsChannel>(table, row, i)(part(input + i));
      if constexpr (kResidual) y += part(residual + i);
      const auto stopped = y <= lowest;
      if constexpr (kMask) mask[i / kWidth] = static_cast<uint8_t>(~byte_of(stopped));
      part.put(output + i, stopped ? zero : y);
    });
    input += length;
    output += length;
    if constexpr (kResidual) residual += length;
    if constexpr (kMask) mask += (length + 7) / 8;
  }
}

template <class Element>
void normalize_rows(const NormalizeRows<Compute<Element>>& call) {
  with_flag(call.rows.row_is_channel, [&](auto row_is_channel) __attribute__((always_inline)) {
    with_flag(call.residual != nullptr, [&](auto residual) __attribute__((always_inline)) {
      with_flag(call.mask != nullptr, [&](auto mask) __attribute__((always_inline)) {
        normalize<Element, row_is_channel, residual, mask>(call);
      });
    });
  });
}

// grad_output where ReLU lets it through.
template <class T, bool kRowIsChannel, ReluMask kRelu>
STEADYGRAD_INLINE Vector<T> masked(Vector<T> grad, Vector<T> x, const uint8_t* mask,
                                   const NormalizationTable<T>& table, int64_t row, int64_t i) {
  const Vector<T> zero = {};
  if constexpr (kRelu == ReluMask::stored) return lanes_of<T>(mask[i / kWidth]) ? grad : zero;
  if constexpr (kRelu == ReluMask::recomputed) {
    return normalization_at<T, kRowIsChannel>(table, row, i)(x) <= zero ? zero : grad;
  }
  return grad;
}

template <class Element, bool kRowIsChannel, ReluMask kRelu>
STEADYGRAD_INLINE void gradient(const GradientRows<Compute<Element>>& call) {
  using T = Compute<Element>;
  const auto* input = static_cast<const Element*>(call.input);
  const auto* grad_output = static_cast<const Element*>(call.grad_output);
  auto* grad_input = static_cast<Element*>(call.grad_input);
  auto* grad_residual = static_cast<Element*>(call.grad_residual);
  const uint8_t* mask = call.mask;
  const NormalizationTable<T> table = call.normalization;
  const InputGradientTable<T> gradients = call.gradient;
  const int64_t length = call.rows.length;
  for (int64_t row = 0; row < call.rows.rows; ++row) {
    over_row(length, [&](int64_t i, auto part) __attribute__((always_inline)) {
      const Vector<T> x = part(input + i);
      const Vector<T> grad = masked<T, kRowIsChannel, kRelu>(part(grad_output + i), x, mask, table, row, i);
      if constexpr (kRelu == ReluMask::stored) {
        if (grad_residual != nullptr) part.put(grad_residual + i, grad);
      }
      if (grad_input == nullptr) return;
      const InputGradient<Vector<T>> at{coefficient<T, kRowIsChannel>(table.center, row, i),
                                        coefficient<T, kRowIsChannel>(gradients.gradient, row, i),
                                        coefficient<T, kRowIsChannel>(gradients.deviation, row, i),
                                        coefficient<T, kRowIsChannel>(gradients.constant, row, i)};
      part.put(grad_input + i, at(grad, x));
    });
    input += length;
    grad_output += length;
    if (grad_input != nullptr) grad_input += length;
    if (grad_residual != nullptr) grad_residual += length;
    if constexpr (kRelu == ReluMask::stored) mask += (length + 7) / 8;
  }
}

template <class Function>
STEADYGRAD_INLINE void with_relu_mask(ReluMask relu, Function function) {
  switch (relu) {
    case ReluMask::none:
      return function(std::integral_constant<ReluMask, ReluMask::none>{});
    case ReluMask::recomputed:
      return function(std::integral_constant<ReluMask, ReluMask::recomputed>{});
    case ReluMask::stored:
      return function(std::integral_constant<ReluMask, ReluMask::stored>{});
  }
}

template <class Element>
void gradient_rows(const GradientRows<Compute<Element>>& call) {
  with_flag(call.rows.row_is_channel, [&](auto row_is_channel) __attribute__((always_inline)) {
    with_relu_mask(call.relu, [&](auto relu) __attribute__((always_inline)) {
      gradient<Element, row_is_channel, relu>(call);
    });
  });
}

struct PairOfSums {
  DoubleVector first;
  DoubleVector second;

  STEADYGRAD_INLINE void add(DoubleVector a, DoubleVector b) {
    first += a;
    second += b;
  }
};

// Rows that are channels. Four pairs of sums at once, so that one addition need not wait for another.
template <class Terms>
STEADYGRAD_INLINE void sum_channel(int64_t length, double* sums, Terms terms) {
  constexpr int kAtOnce = 4;
  PairOfSums pairs[kAtOnce] = {};
  pairs[0] = {load(sums), load(sums + kWidth)};
  int64_t i = 0;
  for (; i + kAtOnce * kWidth <= length; i += kAtOnce * kWidth) {
#pragma GCC unroll 4
    for (int k = 0; k < kAtOnce; ++k) terms(i + k * kWidth, Whole{}, pairs[k]);
  }
  for (; i + kWidth <= length; i += kWidth) terms(i, Whole{}, pairs[0]);
  if (i < length) terms(i, Part{length - i}, pairs[1]);
  store(sums, (pairs[0].first + pairs[1].first) + (pairs[2].first + pairs[3].first));
  store(sums + kWidth, (pairs[0].second + pairs[1].second) + (pairs[2].second + pairs[3].second));
}

// Rows of many channels: eight channels down a few rows at a time, rows that the first-level cache holds.
template <class Element, class Terms>
STEADYGRAD_INLINE void sum_columns(const Rows& rows, double* sums, Terms terms) {
  constexpr int64_t kCached = 24 * 1024;
  const int64_t bytes = rows.length * static_cast<int64_t>(sizeof(Element));
  const int64_t most = kCached / bytes < 4 ? 4 : kCached / bytes;
  for (int64_t begin = 0; begin < rows.rows; begin += most) {
    const int64_t end = begin + most < rows.rows ? begin + most : rows.rows;
    over_row(rows.length, [&](int64_t i, auto part) __attribute__((always_inline)) {
      PairOfSums pair{part(sums + i), part(sums + rows.length + i)};
      for (int64_t row = begin; row < end; ++row) terms(row, i, part, pair);
      part.put(sums + i, pair.first);
      part.put(sums + rows.length + i, pair.second);
    });
  }
}

template <class T>
STEADYGRAD_INLINE DoubleVector widened(Vector<T> vector) {
  return __builtin_convertvector(vector, DoubleVector);
}

template <class Element>
void sum_rows(const Rows& rows, const void* opaque, const Compute<Element>* shift, double* sums) {
  using T = Compute<Element>;
  const auto* input = static_cast<const Element*>(opaque);
  const int64_t length = rows.length;
  if (rows.row_is_channel) {
    for (int64_t row = 0; row < rows.rows; ++row) {
      const DoubleVector from = DoubleVector{} + static_cast<double>(shift[row]);
      sum_channel(length, sums + 2 * kWidth * row,
                  [&](int64_t i, auto part, PairOfSums& pair) __attribute__((always_inline)) {
                    const DoubleVector x = part.only(widened<T>(part(input + row * length + i)) - from);
                    pair.add(x, x * x);
                  });
    }
    return;
  }
  sum_columns<Element>(
      rows, sums, [&](int64_t row, int64_t i, auto part, PairOfSums& pair) __attribute__((always_inline)) {
        const DoubleVector x = widened<T>(part(input + row * length + i)) - widened<T>(load(shift + i));
        pair.add(x, x * x);
      });
}

template <class Element, bool kRowIsChannel, ReluMask kRelu>
STEADYGRAD_INLINE void sum_gradient(const GradientRows<Compute<Element>>& call, double* sums) {
  using T = Compute<Element>;
  const auto* input = static_cast<const Element*>(call.input);
  const auto* grad_output = static_cast<const Element*>(call.grad_output);
  const NormalizationTable<T> table = call.normalization;
  const int64_t length = call.rows.length;
  const int64_t mask_length = (length + 7) / 8;
  const auto terms = [&](int64_t row, int64_t i, auto part, PairOfSums& pair) __attribute__((always_inline)) {
    const Vector<T> x = part(input + row * length + i);
    const uint8_t* const mask = call.mask + (kRelu == ReluMask::stored ? row * mask_length : 0);
    const Vector<T> grad =
        masked<T, kRowIsChannel, kRelu>(part(grad_output + row * length + i), x, mask, table, row, i);
    const Vector<T> deviation = x - coefficient<T, kRowIsChannel>(table.center, row, i);
    pair.add(part.only(widened<T>(grad)), part.only(widened<T>(grad * deviation)));
  };
  if constexpr (kRowIsChannel) {
    for (int64_t row = 0; row < call.rows.rows; ++row) {
      sum_channel(length, sums + 2 * kWidth * row,
                  [&](int64_t i, auto part, PairOfSums& pair)
                      __attribute__((always_inline)) { terms(row, i, part, pair); });
    }
  } else {
    sum_columns<Element>(call.rows, sums, terms);
  }
}

template <class Element>
void sum_gradient_rows(const GradientRows<Compute<Element>>& call, double* sums) {
  with_flag(call.rows.row_is_channel, [&](auto row_is_channel) __attribute__((always_inline)) {
    with_relu_mask(call.relu, [&](auto relu) __attribute__((always_inline)) {
      sum_gradient<Element, row_is_channel, relu>(call, sums);
    });
  });
}

template <class Element>
constexpr BatchNormKernels<Compute<Element>> kTable = {sum_rows<Element>, normalize_rows<Element>,
                                                       sum_gradient_rows<Element>, gradient_rows<Element>};

}  // namespace

const BatchNormKernels<float>& batch_norm_kernels(DType dtype) {
  return dtype == DType::bfloat16  ? kTable<BFloat16>
         : dtype == DType::float16 ? kTable<Float16>
                                   : kTable<float>;
}
const BatchNormKernels<double>& batch_norm_double_kernels() { return kTable<double>; }

}  // namespace steadygrad::cpu::STEADYGRAD_INSTRUCTION_SET
