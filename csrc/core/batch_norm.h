// Batch normalization: what is known about a call, and the arithmetic of one element and of one channel.
#pragma once

#include <cmath>
#include <cstdint>

#include "core/dtype.h"
#include "core/host_device.h"

namespace steadygrad {

// A dense tensor as (outer, channels, inner), the last fastest. With inner == 1 channels are neighbours in
// memory (channels_last, or 2-D input); else a channel has runs of `inner` elements.
struct BatchNormShape {
  int64_t outer = 0;
  int64_t channels = 0;
  int64_t inner = 1;

  STEADYGRAD_INLINE int64_t count() const { return outer * inner; }  // elements of a channel

  // A mask has one bit an element, set where ReLU lets the gradient through, in an order of the backend's
  // own. Its size is that of rows which each start on a byte: the runs of one channel, or with inner == 1 the
  // channels of one position.
  STEADYGRAD_INLINE int64_t mask_rows() const { return inner == 1 ? outer : outer * channels; }
  STEADYGRAD_INLINE int64_t mask_row_bytes() const { return ((inner == 1 ? channels : inner) + 7) / 8; }
};

// One number for each channel; null: absent.
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

// What normalises, in every direction. `mean` and `var` (biased) are the batch's or the running ones; a call
// that finds the batch's statistics itself leaves them empty.
struct BatchNorm {
  BatchNormShape shape;
  DType dtype = DType::float32;  // of input, residual, output and their gradients
  const void* input = nullptr;
  ChannelVector mean;
  ChannelVector var;
  ChannelVector weight;
  ChannelVector bias;
  double eps = 0;
  bool relu = false;
};

struct BatchNormOutput {
  const void* residual = nullptr;  // added before ReLU
  void* output = nullptr;
  uint8_t* mask = nullptr;  // where it is not null, ReLU's mask is kept there
};

// A null destination is not written. Where ReLU followed, `mask` is null only without residual: then the mask
// is found again from the input.
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
  bool cumulative = false;  // the factor is 1 / num_batches_tracked after it went up, in momentum's place
};

// A vector of statistics, as the kernels leave it and as ranks exchange it, in fp64: `channels` means, as
// many biased variances, and the number of elements of a channel.
STEADYGRAD_INLINE int64_t statistics_size(int64_t channels) { return 2 * channels + 1; }

// Mean and sum of squared deviations of some elements.
struct Moments {
  double mean = 0;
  double squares = 0;
  double count = 0;
};

// Puts parts together in their order; of(i) gives the i-th. Two passes need no division for each part (Chan,
// Golub and LeVeque 1979).
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

// Those of all parts together, from one vector of statistics of each part. A single part is kept to the bit.
STEADYGRAD_INLINE ChannelStatistics combined_statistics(const double* parts, int64_t count, int64_t channels,
                                                        int64_t channel) {
  const int64_t size = statistics_size(channels);
  if (count == 1) return {parts[channel], parts[channels + channel], parts[2 * channels]};
  return channel_statistics(combined_moments(count, [&](int64_t i) {
    const double* const part = parts + i * size;
    return Moments{part[channel], part[channels + channel] * part[2 * channels], part[2 * channels]};
  }));
}

// From sum(x - shift) and sum((x - shift)^2). With one of the elements as the shift the cancellation is at
// most by a factor of `count`.
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

// y = (x - center) * scale + offset. The center is the mean in T, so that nothing cancels; what rounding took
// from the mean is in the offset.
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

// grad_input = grad * gradient + (x - center) * deviation + constant, where `grad` has passed ReLU's mask.
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
  // Of constant statistics: x takes no part, also where it is not finite.
  template <class V>
  STEADYGRAD_INLINE V of_constants(V grad) const {
    return grad * gradient;
  }
};

// `grad_mean` = mean(grad) and `product_mean` = mean(grad * (x - mean)) over all that the statistics were
// taken from; both are 0 where the statistics are constants.
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

// Whether a finite number stays finite as one of the vector's.
STEADYGRAD_INLINE bool holds(ChannelVector vector, double value) {
  const double largest = vector.dtype == DType::float64    ? 0x1.fffffffffffffp1023
                         : vector.dtype == DType::float32  ? 0x1.fffffep127
                         : vector.dtype == DType::bfloat16 ? 0x1.fep127
                                                           : 65504;
  return std::fabs(value) <= largest;
}

// running = running + factor * (new - running), as torch's (1 - factor) * running + factor * new; the
// variance is the unbiased one. A channel where either would not be finite keeps what it has, unlike torch's:
// from infinity or NaN there is no way back.
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

// `batches`: num_batches_tracked after it went up.
STEADYGRAD_INLINE double running_factor(const RunningStatistics& running, int64_t batches) {
  return running.cumulative ? 1 / static_cast<double>(batches) : running.momentum;
}

// NaN stays NaN, and lets its gradient through, as in torch.
template <class V>
STEADYGRAD_INLINE V relu(V x) {
  const V zero = {};
  return x <= 0 ? zero : x;
}

}  // namespace steadygrad
