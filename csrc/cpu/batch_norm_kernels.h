// The inner loops of batch normalization. batch_norm_kernels.cpp is compiled once per instruction set; this
// table is all that leaves it.
#pragma once

#include <cstdint>

#include "core/batch_norm.h"

namespace steadygrad::cpu {

// Sums of a channel's run are kept in this many lanes.
constexpr int kSumLanes = 16;

// Channel coefficients, computed in T. Loops read whole vectors of them: each array has room for kSumLanes
// more than it needs.
template <class T>
struct NormalizationTable {
  const T* center;
  const T* scale;
  const T* offset;
};
template <class T>
struct InputGradientTable {
  const T* gradient;
  const T* deviation;
  const T* constant;
};

// `rows` rows of `length` neighbours in memory. Where `row_is_channel`, row r belongs to entry r of the
// tables, else element i of every row to entry i.
struct Rows {
  int64_t rows;
  int64_t length;
  int64_t pitch;       // elements from a row to the next one
  int64_t mask_pitch;  // the same in bytes of the mask
  bool row_is_channel;
  int64_t ahead;       // bytes from an element to one that is wanted soon
  int64_t sum_stride;  // from an entry's first sum to its second, where an element has an entry
};

// What can become of ReLU's mask in backward.
enum class ReluMask : uint8_t { none, recomputed, stored };

template <class T>
struct NormalizeRows {
  Rows rows;
  const void* input;
  const void* residual;
  void* output;
  uint8_t* mask;
  NormalizationTable<T> table;
  bool relu;
  bool streams;  // what is written passes the caches by
};

template <class T>
struct GradientRows {
  Rows rows;
  const void* input;
  const void* grad_output;
  const uint8_t* mask;
  void* grad_input;
  void* grad_residual;
  NormalizationTable<T> normalization;
  InputGradientTable<T> gradient;
  ReluMask relu;
  bool constant_statistics;
  bool streams;
};

// Two sums an entry: where a row is a channel, [channel][2][lane] with kSumLanes of each, else one of each.
template <class T>
struct BatchNormKernels {
  // Adds x - shift and (x - shift)^2.
  void (*sum_rows)(const Rows& rows, const void* input, const T* shift, double* sums);
  void (*normalize_rows)(const NormalizeRows<T>& call);
  // Adds grad and grad * (x - center).
  void (*sum_gradient_rows)(const GradientRows<T>& call, double* sums);
  void (*gradient_rows)(const GradientRows<T>& call);
};

// The table of the instruction set in use, for elements of `dtype`; T is what they are computed in.
template <class T>
const BatchNormKernels<T>& batch_norm_kernels(DType dtype);

}  // namespace steadygrad::cpu
