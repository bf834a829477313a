// This file is compiled once per instruction set into a namespace of that name, as vector_kernels.cpp is.
// Everything here has internal linkage or is always inlined.
#include "cpu/batch_norm_kernels.h"

#include "cpu/element_vectors.h"

namespace steadygrad::cpu::STEADYGRAD_INSTRUCTION_SET {
namespace {

static_assert(kWidth <= kSumLanes, "a lane of the sums for each element");

// Loads coefficients of neighbouring elements: one channel's for a whole row, or one per element.
template <class T, bool kRowIsChannel>
class Row {
 public:
  STEADYGRAD_INLINE explicit Row(int64_t row) : row_(row) {}

  STEADYGRAD_INLINE Vector<T> operator()(const T* table, int64_t i) const {
    if constexpr (kRowIsChannel) return Vector<T>{} + table[row_];
    return load(table + i);
  }
  STEADYGRAD_INLINE Normalization<Vector<T>> operator()(const NormalizationTable<T>& table, int64_t i) const {
    return {(*this)(table.center, i), (*this)(table.scale, i), (*this)(table.offset, i)};
  }
  STEADYGRAD_INLINE InputGradient<Vector<T>> operator()(const T* center, const InputGradientTable<T>& table,
                                                        int64_t i) const {
    return {(*this)(center, i), (*this)(table.gradient, i), (*this)(table.deviation, i),
            (*this)(table.constant, i)};
  }

 private:
  int64_t row_;
};

// The bounds of ReLU for a vector of elements. Where a bound is NaN the comparison is made, too, and every
// element passes.
template <class T>
struct VectorBounds {
  Vector<T> lowest;
  Vector<T> highest;

  STEADYGRAD_INLINE explicit VectorBounds(const ReluBounds<T>& bounds)
      : lowest(Vector<T>{} + bounds.lowest), highest(Vector<T>{} + bounds.highest) {}

  STEADYGRAD_INLINE Lanes<Vector<T>> too_low(Vector<T> y) const { return compared(y, lowest, AtMost()); }
  STEADYGRAD_INLINE Lanes<Vector<T>> too_high(Vector<T> y) const { return compared(highest, y, AtMost()); }
};

template <class Function>
STEADYGRAD_INLINE void with_flag(bool flag, Function function) {
  if (flag) return function(std::true_type{});
  function(std::false_type{});
}

// Whether an operand exists is tested for each vector. A copy of the loop for each case would take long to
// compile and would gain nothing, since the loop waits for memory.
template <class Element, bool kRowIsChannel>
STEADYGRAD_INLINE void normalize(const NormalizeRows<Compute<Element>>& call) {
  using T = Compute<Element>;
  const auto* input = static_cast<const Element*>(call.input);
  const auto* residual = static_cast<const Element*>(call.residual);
  auto* output = static_cast<Element*>(call.output);
  uint8_t* mask = call.mask;
  const NormalizationTable<T> table = call.table;
  const int64_t length = call.rows.length;
  const int64_t ahead = call.rows.ahead;
  const bool streams = call.streams;
  const VectorBounds<T> bounds(call.bounds);
  for (int64_t row = 0; row < call.rows.rows; ++row) {
    const Row<T, kRowIsChannel> channels(row);
    // These are loaded before the row, since the compiler cannot know that its stores do not change the
    // tables.
    const Normalization<Vector<T>> of_row = channels(table, 0);
    over_row<Element>(length, ahead, streams, [&](int64_t i, auto part) __attribute__((always_inline)) {
      Vector<T> y = (kRowIsChannel ? of_row : channels(table, i))(part(input + i));
      if (residual != nullptr) y += part(residual + i);
      const Lanes<Vector<T>> low = bounds.too_low(y);
      const Lanes<Vector<T>> high = bounds.too_high(y);
      if (mask != nullptr) part.put_bits(mask, i, ~bits_of(low | high));
      part.put(output + i, where(~low, where(high, bounds.highest, y)));
    });
    input += call.rows.pitch;
    output += call.rows.pitch;
    if (residual != nullptr) residual += call.rows.pitch;
    if (mask != nullptr) mask += call.rows.mask_pitch;
  }
}

template <class Element>
void normalize_rows(const NormalizeRows<Compute<Element>>& call) {
  with_flag(call.rows.row_is_channel, [&](auto row_is_channel) __attribute__((always_inline)) {
    normalize<Element, row_is_channel>(call);
  });
  if (call.streams) finish_streams();
}

// Returns grad_output where ReLU lets it through, and zero elsewhere.
template <class T, class Part>
STEADYGRAD_INLINE Vector<T> masked(ReluMask relu, Vector<T> grad, Vector<T> x, const uint8_t* mask,
                                   const Normalization<Vector<T>>& normalization,
                                   const VectorBounds<T>& bounds, Part part, int64_t i) {
  if (relu == ReluMask::stored) return where(lanes_of<Vector<T>>(part.bits(mask, i)), grad);
  if (relu == ReluMask::recomputed) {
    const Vector<T> y = normalization(x);
    return where(~(bounds.too_low(y) | bounds.too_high(y)), grad);
  }
  return grad;
}

template <class Element, bool kRowIsChannel>
STEADYGRAD_INLINE void gradient(const GradientRows<Compute<Element>>& call) {
  using T = Compute<Element>;
  const auto* input = static_cast<const Element*>(call.input);
  const auto* grad_output = static_cast<const Element*>(call.grad_output);
  auto* grad_input = static_cast<Element*>(call.grad_input);
  auto* grad_residual = static_cast<Element*>(call.relu == ReluMask::stored ? call.grad_residual : nullptr);
  const uint8_t* mask = call.mask;
  const NormalizationTable<T> table = call.normalization;
  const InputGradientTable<T> gradients = call.gradient;
  const int64_t length = call.rows.length;
  const int64_t ahead = call.rows.ahead;
  const bool streams = call.streams;
  const bool constant_statistics = call.constant_statistics;
  const ReluMask relu = call.relu;
  const VectorBounds<T> bounds(call.bounds);
  for (int64_t row = 0; row < call.rows.rows; ++row) {
    const Row<T, kRowIsChannel> channels(row);
    const Normalization<Vector<T>> of_row = channels(table, 0);
    const InputGradient<Vector<T>> gradient_of_row = channels(table.center, gradients, 0);
    over_row<Element>(length, ahead, streams, [&](int64_t i, auto part) __attribute__((always_inline)) {
      const Vector<T> x = part(input + i);
      const Vector<T> grad = masked(relu, part(grad_output + i), x, mask,
                                    kRowIsChannel ? of_row : channels(table, i), bounds, part, i);
      if (grad_residual != nullptr) part.put(grad_residual + i, grad);
      if (grad_input == nullptr) return;
      if (constant_statistics) {
        part.put(grad_input + i,
                 (kRowIsChannel ? gradient_of_row : channels(table.center, gradients, i)).of_constants(grad));
      } else {
        part.put(grad_input + i,
                 (kRowIsChannel ? gradient_of_row : channels(table.center, gradients, i))(grad, x));
      }
    });
    input += call.rows.pitch;
    grad_output += call.rows.pitch;
    if (grad_input != nullptr) grad_input += call.rows.pitch;
    if (grad_residual != nullptr) grad_residual += call.rows.pitch;
    if (relu == ReluMask::stored) mask += call.rows.mask_pitch;
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
    gradient<Element, row_is_channel>(call);
  });
  if (call.streams) finish_streams();
}

// What a vector of elements adds to the two sums.
template <class V>
struct Terms {
  V first;
  V second;

  STEADYGRAD_INLINE Terms operator+(const Terms& other) const {
    return {first + other.first, second + other.second};
  }
};

struct Sums {
  DoubleVector first;
  DoubleVector second;

  template <class V>
  STEADYGRAD_INLINE void add(const Terms<V>& terms) {
    first += __builtin_convertvector(terms.first, DoubleVector);
    second += __builtin_convertvector(terms.second, DoubleVector);
  }
};

// Adds four terms before adding them to a sum, so that sums do not wait for each other and fp32 terms are
// widened once.
template <class At>
STEADYGRAD_INLINE auto four(At at) {
  return (at(0) + at(1)) + (at(2) + at(3));
}

// Sums rows that are channels; `sums` has kSumLanes lanes of each sum, and terms(row, i, part) returns the
// terms.
template <class Element, class At>
STEADYGRAD_INLINE void sum_channels(const Rows& rows, double* sums, At terms) {
  constexpr int64_t kFour = 4 * kWidth;
  constexpr int kVectors = kVectorsPerLine<Element>;
  const First first(rows.ahead, false);
  for (int64_t row = 0; row < rows.rows; ++row, sums += 2 * kSumLanes) {
    Sums channel{load(sums), load(sums + kSumLanes)};
    int64_t i = 0;
    for (; i + kFour <= rows.length; i += kFour) {
      channel.add(four([&](int v) __attribute__((always_inline)) {
        return v % kVectors == 0 ? terms(row, i + v * kWidth, first) : terms(row, i + v * kWidth, Whole());
      }));
    }
    if (i + 2 * kWidth <= rows.length) {
      channel.add(terms(row, i, Whole()) + terms(row, i + kWidth, Whole()));
      i += 2 * kWidth;
    }
    over_end(i, rows.length, [&](int64_t at, auto part) __attribute__((always_inline)) {
      channel.add(terms(row, at, part));
    });
    store(sums, channel.first);
    store(sums + kSumLanes, channel.second);
  }
}

// Sums rows of many channels, a cache line of channels down a few rows at a time. So the sums stay in
// registers, and rows that are prefetched meanwhile stay in the first-level cache.
template <class Element, class At>
STEADYGRAD_INLINE void sum_columns(const Rows& rows, double* sums, At terms) {
  constexpr int64_t kFetched = 1 << 14;
  constexpr int kVectors = kVectorsPerLine<Element>;
  const int64_t length = rows.length;
  const int64_t bytes = length * static_cast<int64_t>(sizeof(Element));
  const int64_t at_once = bytes > kFetched / 8 ? 8 : kFetched / bytes / 4 * 4;
  double* const seconds = sums + rows.sum_stride;
  const First first(at_once * rows.pitch * static_cast<int64_t>(sizeof(Element)), false);
  for (int64_t begin = 0; begin < rows.rows; begin += at_once) {
    const int64_t end = rows.rows - begin < at_once ? rows.rows : begin + at_once;
    const int64_t fours = begin + (end - begin) / 4 * 4;
    int64_t i = 0;
    for (; i + kVectors * kWidth <= length; i += kVectors * kWidth) {
      Sums columns[kVectors];
      for (int v = 0; v < kVectors; ++v) {
        columns[v] = {load(sums + i + v * kWidth), load(seconds + i + v * kWidth)};
      }
      for (int64_t row = begin; row < fours; row += 4) {
        columns[0].add(four([&](int k) __attribute__((always_inline)) { return terms(row + k, i, first); }));
#pragma GCC unroll 4
        for (int v = 1; v < kVectors; ++v) {
          columns[v].add(four(
              [&](int k) __attribute__((always_inline)) { return terms(row + k, i + v * kWidth, Whole()); }));
        }
      }
      for (int v = 0; v < kVectors; ++v) {
        store(sums + i + v * kWidth, columns[v].first);
        store(seconds + i + v * kWidth, columns[v].second);
      }
    }
    // What is left are rows beyond the last four, and all rows of columns that do not fill a cache line.
    over_end(fours < end ? 0 : i, length, [&](int64_t at, auto part) __attribute__((always_inline)) {
      Sums column{part(sums + at), part(seconds + at)};
      for (int64_t row = at + kWidth <= i ? fours : begin; row < end; ++row) column.add(terms(row, at, part));
      part.put(sums + at, column.first);
      part.put(seconds + at, column.second);
    });
  }
}

template <class Element, bool kRowIsChannel, class At>
STEADYGRAD_INLINE void add_to_sums(const Rows& rows, double* sums, At terms) {
  if constexpr (kRowIsChannel) {
    sum_channels<Element>(rows, sums, terms);
  } else {
    sum_columns<Element>(rows, sums, terms);
  }
}

// The terms are fp64 from the start: if the shift is far from the mean, fp32 squares would lose the
// deviations.
template <class Element>
void sum_rows(const Rows& rows, const void* opaque, const Compute<Element>* shift, double* sums) {
  const auto* input = static_cast<const Element*>(opaque);
  const int64_t pitch = rows.pitch;
  with_flag(rows.row_is_channel, [&](auto row_is_channel) __attribute__((always_inline)) {
    const auto terms = [&](int64_t row, int64_t i, auto part) __attribute__((always_inline)) {
      const Row<Compute<Element>, row_is_channel> channels(row);
      const DoubleVector x = __builtin_convertvector(part(input + row * pitch + i), DoubleVector);
      const DoubleVector deviation = part.only(x - __builtin_convertvector(channels(shift, i), DoubleVector));
      return Terms<DoubleVector>{deviation, deviation * deviation};
    };
    add_to_sums<Element, row_is_channel>(rows, sums, terms);
  });
}

template <class Element, bool kRowIsChannel, ReluMask kRelu>
STEADYGRAD_INLINE void sum_gradient(const GradientRows<Compute<Element>>& call, double* sums) {
  using T = Compute<Element>;
  const auto* input = static_cast<const Element*>(call.input);
  const auto* grad_output = static_cast<const Element*>(call.grad_output);
  const uint8_t* mask = call.mask;
  const NormalizationTable<T> table = call.normalization;
  const int64_t pitch = call.rows.pitch;
  const int64_t mask_pitch = kRelu == ReluMask::stored ? call.rows.mask_pitch : 0;
  const VectorBounds<T> bounds(call.bounds);
  add_to_sums<Element, kRowIsChannel>(
      call.rows, sums, [&](int64_t row, int64_t i, auto part) __attribute__((always_inline)) {
        const Normalization<Vector<T>> at = Row<T, kRowIsChannel>(row)(table, i);
        const Vector<T> x = part(input + row * pitch + i);
        const Vector<T> grad = part.only(masked(kRelu, part(grad_output + row * pitch + i), x,
                                                mask + row * mask_pitch, at, bounds, part, i));
        return Terms<Vector<T>>{grad, part.only(grad * (x - at.center))};
      });
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
