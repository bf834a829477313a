// Batch normalization: the description of a call, and the arithmetic of one element and of one channel.
#pragma once

#include <cmath>
#include <cstdint>

#include "core/dtype.h"
#include "core/host_device.h"

namespace steadygrad {

// The shape of a dense tensor, (outer, channels, inner) with the last dimension fastest. With inner == 1
// channels are neighbours in memory (channels_last, or 2-D input); otherwise a channel consists of runs of
// `inner` elements.
struct BatchNormShape {
  int64_t outer = 0;
  int64_t channels = 0;
  int64_t inner = 1;

  STEADYGRAD_INLINE int64_t count() const { return outer * inner; }  // elements of a channel

  // A mask has one bit per element, set where ReLU lets the gradient through. Each backend orders the bits in
  // its own way. The size allows for rows that start on a byte: the runs of a channel, or with inner == 1 the
  // channels of one position.
  STEADYGRAD_INLINE int64_t mask_rows() const { return inner == 1 ? outer : outer * channels; }
  STEADYGRAD_INLINE int64_t mask_row_bytes() const { return ((inner == 1 ? channels : inner) + 7) / 8; }
};

// A number for each channel; null if absent.
struct ChannelVector {
  void* data = nullptr;
  DType dtype = DType::float32;
};

STEADYGRAD_INLINE double channel_value(ChannelVector vector, int64_t channel, double absent) {
  if (vector.data == nullptr) return absent;
  switch (vector.dtype) {
    case DType::float32:
      return static_cast<const float*>(vector.data)[channel];
    case DType::float64:
      return static_cast<const double*>(vector.data)[channel];
    case DType::bfloat16:
      return to_float(static_cast<const BFloat16*>(vector.data)[channel]);
    case DType::float16:
      return to_float(static_cast<const Float16*>(vector.data)[channel]);
  }
  return absent;
}

STEADYGRAD_INLINE void set_channel_value(ChannelVector vector, int64_t channel, double value) {
  if (vector.data == nullptr) return;
  switch (vector.dtype) {
    case DType::float32:
      static_cast<float*>(vector.data)[channel] = static_cast<float>(value);
      return;
    case DType::float64:
      static_cast<double*>(vector.data)[channel] = value;
      return;
    case DType::bfloat16:
      static_cast<BFloat16*>(vector.data)[channel] = to_bfloat16(static_cast<float>(value));
      return;
    case DType::float16:
      static_cast<Float16*>(vector.data)[channel] = to_float16(static_cast<float>(value));
      return;
  }
}

// Describes the normalization for all passes. `mean` and `var` (biased) are those of the batch or the running
// ones; a call that computes the batch's statistics itself leaves them empty.
struct BatchNorm {
  BatchNormShape shape;
  DType dtype = DType::float32;  // the dtype of input, residual, output and their gradients
  const void* input = nullptr;
  ChannelVector mean;
  ChannelVector var;
  ChannelVector weight;
  ChannelVector bias;
  double eps = 0;
  // The output is min(max(y, 0), ceiling): ReLU if the ceiling is infinite, ReLU6 if it is 6, and y itself if
  // it is NaN. Comments say ReLU of both.
  double ceiling = NAN;

  STEADYGRAD_INLINE bool has_relu() const { return ceiling > 0; }
};

struct BatchNormOutput {
  const void* residual = nullptr;  // added before ReLU
  void* output = nullptr;
  uint8_t* mask = nullptr;  // receives ReLU's mask, unless null
};

// The gradients of a backward pass; null destinations are not written. After ReLU, `mask` is null only
// without a residual: then the mask is computed again from the input.
struct BatchNormGradient {
  const void* grad_output = nullptr;
  const uint8_t* mask = nullptr;
  void* grad_input = nullptr;
  void* grad_residual = nullptr;
  ChannelVector grad_weight;
  ChannelVector grad_bias;
};

struct RunningStatistics {
  ChannelVector mean;
  ChannelVector var;
  int64_t* num_batches_tracked = nullptr;  // goes up by one
  double momentum = 0;
  bool cumulative = false;  // replaces momentum by 1 / num_batches_tracked, after that went up
};

// The size of a vector of statistics, as kernels write it and ranks exchange it, in fp64: `channels` means,
// `channels` biased variances, and the number of elements of a channel.
STEADYGRAD_INLINE int64_t statistics_size(int64_t channels) { return 2 * channels + 1; }

// Mean, sum of squared deviations and number of some elements.
struct Moments {
  double mean = 0;
  double squares = 0;
  double count = 0;
};

// Merges many sets of moments in order; of(i) returns the i-th. The two passes save a division for each of
// them (Chan, Golub and LeVeque 1979).
template <class Of>
STEADYGRAD_INLINE Moments combined_moments(int64_t parts, Of of) {
  Moments all;
  for (int64_t i = 0; i < parts; ++i) {
    const Moments part = of(i);
    all.count += part.count;
    all.mean += part.count > 0 ? part.mean * part.count : 0;
  }
  if (all.count == 0) return {};
  all.mean /= all.count;
  for (int64_t i = 0; i < parts; ++i) {
    const Moments part = of(i);
    const double delta = part.mean - all.mean;
    all.squares += part.count > 0 ? part.squares + delta * delta * part.count : 0;
  }
  return all;
}

// Mean and biased variance of one channel.
struct ChannelStatistics {
  double mean;
  double var;
  double count;
};

STEADYGRAD_INLINE ChannelStatistics channel_statistics(const Moments& moments) {
  return {moments.mean, moments.count > 0 ? moments.squares / moments.count : 0, moments.count};
}

// Combines all parts, from one vector of statistics of each part. A single part is kept to the bit.
STEADYGRAD_INLINE ChannelStatistics combined_statistics(const double* parts, int64_t count, int64_t channels,
                                                        int64_t channel) {
  const int64_t size = statistics_size(channels);
  if (count == 1) return {parts[channel], parts[channels + channel], parts[2 * channels]};
  return channel_statistics(combined_moments(count, [&](int64_t i) {
    const double* const part = parts + i * size;
    return Moments{part[channel], part[channels + channel] * part[2 * channels], part[2 * channels]};
  }));
}

// Computes moments from sum(x - shift) and sum((x - shift)^2). If the shift is one of the elements,
// cancellation loses at most a factor of `count`.
STEADYGRAD_INLINE Moments moments_from_sums(double shift, double sum, double squares, double count) {
  if (count == 0) return {};
  const double mean = sum / count;
  const double left = squares - sum * mean;
  return {shift + mean, left < 0 ? 0 : left, count};
}

// Sums of a channel's elements around a shift, to which parts are added without a division. The shift is
// the mean of one of the parts; moments_from_sums() ends it.
struct ShiftedSums {
  double sum = 0;
  double squares = 0;
  double count = 0;
};

STEADYGRAD_INLINE void add(ShiftedSums& sums, const Moments& part, double shift) {
  const double delta = part.mean - shift;
  const double weighted = delta * part.count;
  sums.sum += weighted;
  sums.squares += part.squares + delta * weighted;
  sums.count += part.count;
}

STEADYGRAD_INLINE double inverse_deviation(double var, double eps) { return 1 / std::sqrt(var + eps); }

// y = (x - center) * scale + offset. The center is the mean rounded to T, so that nothing cancels; the offset
// contains what the rounding took from the mean.
template <class T>
struct Normalization {
  T center;
  T scale;
  T offset;

  template <class V>
  STEADYGRAD_INLINE V operator()(V x) const {
    return (x - center) * scale + offset;
  }
};

template <class T>
STEADYGRAD_INLINE Normalization<T> normalization(double mean, double var, double eps, double weight,
                                                 double bias) {
  const T center = static_cast<T>(mean);
  const double scale = weight * inverse_deviation(var, eps);
  return {center, static_cast<T>(scale), static_cast<T>(bias - (mean - static_cast<double>(center)) * scale)};
}

// grad_input = grad * gradient + (x - center) * deviation + constant, where ReLU's mask was applied to
// `grad`.
template <class T>
struct InputGradient {
  T center;
  T gradient;
  T deviation;
  T constant;

  template <class V>
  STEADYGRAD_INLINE V operator()(V grad, V x) const {
    return grad * gradient + ((x - center) * deviation + constant);
  }
  // With constant statistics x has no effect, even if it is not finite.
  template <class V>
  STEADYGRAD_INLINE V of_constants(V grad) const {
    return grad * gradient;
  }
};

// `grad_mean` = mean(grad) and `product_mean` = mean(grad * (x - mean)) over all elements of the statistics;
// both are 0 if the statistics are constants.
template <class T>
STEADYGRAD_INLINE InputGradient<T> input_gradient(double mean, double var, double eps, double weight,
                                                  double grad_mean, double product_mean) {
  const T center = static_cast<T>(mean);
  const double inverse = inverse_deviation(var, eps);
  const double scale = weight * inverse;
  const double deviation = -scale * inverse * inverse * product_mean;
  const double constant = -scale * grad_mean - (mean - static_cast<double>(center)) * deviation;
  return {center, static_cast<T>(scale), static_cast<T>(deviation), static_cast<T>(constant)};
}

// Returns whether the value is finite in the vector's dtype.
STEADYGRAD_INLINE bool holds(ChannelVector vector, double value) {
  const double largest = vector.dtype == DType::float64    ? 0x1.fffffffffffffp1023
                         : vector.dtype == DType::float32  ? 0x1.fffffep127
                         : vector.dtype == DType::bfloat16 ? 0x1.fep127
                                                           : 65504;
  return std::fabs(value) <= largest;
}

// Moves the running statistics: running = (1 - factor) * running + factor * new, with the unbiased variance.
// A channel whose new mean or variance would not be finite keeps the old ones; in torch it would stay
// infinite or NaN for ever.
STEADYGRAD_INLINE void update_running(const RunningStatistics& running, int64_t channel, double factor,
                                      double mean, double var, double count) {
  const double unbiased = count > 1 ? var * (count / (count - 1)) : var;
  const double old_mean = channel_value(running.mean, channel, 0);
  const double old_var = channel_value(running.var, channel, 0);
  const double new_mean = (1 - factor) * old_mean + factor * mean;
  const double new_var = (1 - factor) * old_var + factor * unbiased;
  if (!holds(running.mean, new_mean) || !holds(running.var, new_var)) return;
  set_channel_value(running.mean, channel, new_mean);
  set_channel_value(running.var, channel, new_var);
}

// `batches` is num_batches_tracked after it went up.
STEADYGRAD_INLINE double running_factor(const RunningStatistics& running, int64_t batches) {
  return running.cumulative ? 1 / static_cast<double>(batches) : running.momentum;
}

// ReLU cuts off what is at most `lowest` or at least `highest`. A bound that does not exist is NaN, since no
// comparison with NaN is true. NaN is kept and lets its gradient through, as in torch, and so is infinity
// without a ceiling.
template <class T>
struct ReluBounds {
  T lowest;
  T highest;

  STEADYGRAD_INLINE bool stop(T x) const { return x <= lowest || x >= highest; }
  STEADYGRAD_INLINE T operator()(T x) const { return x <= lowest ? lowest : x >= highest ? highest : x; }
};

template <class T>
STEADYGRAD_INLINE ReluBounds<T> relu_bounds(double ceiling) {
  const T absent = static_cast<T>(NAN);
  return {ceiling > 0 ? T(0) : absent, ceiling < INFINITY ? static_cast<T>(ceiling) : absent};
}

}  // namespace steadygrad
