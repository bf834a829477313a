// The inner loops of batch normalization. batch_norm_kernels.cpp is compiled once per instruction set, and
// only this table is visible outside of it.
#pragma once

#include <cstdint>

#include "core/batch_norm.h"

namespace steadygrad::cpu {

// The sums of a channel's run are kept in this many lanes.
constexpr int kSumLanes = 16;

// Coefficients of channels, computed in T. Loops read whole vectors of them, so each array has room for
// kSumLanes more numbers than it needs.
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

// `rows` rows of `length` neighbours in memory. If `row_is_channel`, row r uses entry r of the tables;
// otherwise element i of every row uses entry i.
struct Rows {
  int64_t rows;
  int64_t length;
  int64_t pitch;       // number of elements from one row to the next
  int64_t mask_pitch;  // number of bytes of the mask from one row to the next
  bool row_is_channel;
  int64_t ahead;       // distance, in bytes, to prefetch ahead
  int64_t sum_stride;  // distance from an entry's first sum to its second, if every element has an entry
};

// How the backward pass gets ReLU's mask: there is none, it is computed again, or it was stored.
enum class ReluMask : uint8_t { none, recomputed, stored };

template <class T>
struct NormalizeRows {
  Rows rows;
  const void* input;
  const void* residual;
  void* output;
  uint8_t* mask;
  NormalizationTable<T> table;
  ReluBounds<T> bounds;
  bool streams;  // whether the output bypasses the caches
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
  ReluBounds<T> bounds;
  bool constant_statistics;
  bool streams;
};

// The kernels keep two sums per entry: [channel][2][lane] with kSumLanes lanes if a row is a channel, else
// one number each.
template <class T>
struct BatchNormKernels {
  // Adds x - shift and (x - shift)^2.
  void (*sum_rows)(const Rows& rows, const void* input, const T* shift, double* sums);
  void (*normalize_rows)(const NormalizeRows<T>& call);
  // Adds grad and grad * (x - center).
  void (*sum_gradient_rows)(const GradientRows<T>& call, double* sums);
  void (*gradient_rows)(const GradientRows<T>& call);
};

// Returns the kernels of the instruction set in use for elements of `dtype`, which are computed in T.
template <class T>
const BatchNormKernels<T>& batch_norm_kernels(DType dtype);

}  // namespace steadygrad::cpu
