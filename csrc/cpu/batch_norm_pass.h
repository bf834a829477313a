// One direction over a tensor: the sums of its units, the coefficients of its channels, and the calls of
// kernels with them.
#pragma once

#include <algorithm>
#include <cstring>
#include <unistd.h>
#include <vector>

#include "core/backend.h"
#include "core/batch_norm.h"
#include "core/gradient.h"
#include "cpu/channel_blocks.h"

namespace steadygrad::cpu {

inline int64_t element_size(DType dtype) {
  return dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2;
}

template <class Byte>
Byte* at(Byte* data, int64_t offset) {
  return data == nullptr ? nullptr : data + offset;
}
inline const void* at(const BatchNorm& norm, const void* data, int64_t element) {
  return at(static_cast<const char*>(data), element * element_size(norm.dtype));
}
inline void* at(const BatchNorm& norm, void* data, int64_t element) {
  return at(static_cast<char*>(data), element * element_size(norm.dtype));
}

constexpr int64_t kLine = 64;

// Returns the size in bytes of the last cache, which threads share.
inline int64_t last_cache() {
  static const int64_t bytes = [] {
    const long told = sysconf(_SC_LEVEL3_CACHE_SIZE);
    return told > 0 ? static_cast<int64_t>(told) : int64_t{1} << 25;
  }();
  return bytes;
}

template <class Function>
void with_elements(DType dtype, const void* data, Function function) {
  switch (dtype) {
    case DType::float32:
      return function(static_cast<const float*>(data));
    case DType::float64:
      return function(static_cast<const double*>(data));
    case DType::bfloat16:
      return function(static_cast<const BFloat16*>(data));
    case DType::float16:
      return function(static_cast<const Float16*>(data));
  }
}
inline float compute_value(float value) { return value; }
inline double compute_value(double value) { return value; }
inline float compute_value(BFloat16 value) { return to_float(value); }
inline float compute_value(Float16 value) { return to_float(value); }

template <class Function>
void with_compute_type(DType dtype, Function function) {
  if (dtype == DType::float64) return function(double{});
  function(float{});
}

// The coefficients of every entry, with the additional room that vector loads need.
template <class T>
class Coefficients {
 public:
  Coefficients(int64_t entries, int kinds) : stride_(entries + kSumLanes), values_(kinds * stride_) {}
  T* from(int kind, int64_t entry) { return values_.data() + kind * stride_ + entry; }
  const T* from(int kind, int64_t entry) const { return values_.data() + kind * stride_ + entry; }

 private:
  int64_t stride_;
  std::vector<T> values_;
};

enum Kind { kCenter, kScale, kOffset, kGradient, kDeviation, kConstant, kKinds };

template <class T>
class BatchNormPass {
 public:
  BatchNormPass(const BatchNorm& norm, int streams)
      : norm_(norm),
        blocks_(norm.shape, element_size(norm.dtype), streams),
        kernels_(batch_norm_kernels<T>(norm.dtype)),
        columns_(std::max<int64_t>(blocks_.columns(), 1)),
        coefficients_(norm.shape.channels * columns_ * blocks_.fold(), kKinds) {}

  void prepare_backward(const BatchNormGradient& grad, bool constant_statistics) {
    constant_statistics_ = constant_statistics;
    const bool finds_mask = norm_.has_relu() && grad.mask == nullptr;
    for (int64_t c = 0; c < channels(); ++c) {
      if (finds_mask) {
        set_normalization(c, mean(c), var(c));
      } else {
        set(kCenter, c, static_cast<T>(mean(c)));
      }
    }
  }

  // Allocates the partial sums of each unit of each channel.
  void keep_partials() { partials_.resize(blocks_.units() * channels()); }

  void sum_input(int64_t block, int64_t unit) {
    const int64_t first = blocks_.first_channel(block);
    const int64_t count = blocks_.channels_in(block);
    std::vector<T> shift(count * columns_ * blocks_.sum_fold() + kSumLanes);
    Sums sums = new_sums(count);
    bool begun = false;
    blocks_.for_each_rows(block, unit, blocks_.sum_fold(),
                          [&](const Rows& rows, int64_t, int64_t element, int64_t) {
                            const void* const input = at(norm_, norm_.input, element);
                            if (!begun) take_shift(rows, input, shift);
                            begun = true;
                            kernels_.sum_rows(rows, input, shift.data(), sums.data());
                          });
    const auto elements = static_cast<double>(blocks_.count(unit));
    for (int64_t c = 0; c < count; ++c) {
      const double from_origin = static_cast<double>(shift[c * columns_]) - origin(first + c);
      partial(unit, first + c) = moments_from_sums(from_origin, sums.first(c), sums.second(c), elements);
    }
  }

  Moments moments(int64_t channel) {
    Moments all = combined_moments(blocks_.units(), [&](int64_t unit) { return partial(unit, channel); });
    all.mean += origin(channel);
    return all;
  }

  void set_normalization(int64_t channel, double mean, double var) {
    const auto at = normalization<T>(mean, var, norm_.eps, channel_value(norm_.weight, channel, 1),
                                     channel_value(norm_.bias, channel, 0));
    set(kCenter, channel, at.center);
    set(kScale, channel, at.scale);
    set(kOffset, channel, at.offset);
  }

  // Returns the function that ChannelBlocks calls for some rows.
  auto normalizer(const BatchNormOutput& out) const {
    return [this, &out](const Rows& rows, int64_t channel, int64_t element, int64_t byte) {
      kernels_.normalize_rows({rows, at(norm_, norm_.input, element), at(norm_, out.residual, element),
                               at(norm_, out.output, element), at(out.mask, byte),
                               normalization_table(channel), relu_bounds<T>(norm_.ceiling),
                               streams(rows, {norm_.input, out.residual, out.output})});
    };
  }

  // Computes partial sums of the gradient and of its products with x - center; they are stored as mean and
  // squares.
  void sum_gradient(const BatchNormGradient& grad, int64_t block, int64_t unit) {
    const int64_t first = blocks_.first_channel(block);
    const int64_t count = blocks_.channels_in(block);
    Sums sums = new_sums(count);
    blocks_.for_each_rows(block, unit, blocks_.sum_fold(),
                          [&](const Rows& rows, int64_t channel, int64_t element, int64_t byte) {
                            kernels_.sum_gradient_rows(gradient_rows(grad, rows, channel, element, byte),
                                                       sums.data());
                          });
    for (int64_t c = 0; c < count; ++c) {
      partial(unit, first + c) = {sums.first(c), sums.second(c), 0};
    }
  }

  // Computes sum(grad) and sum(grad * (x - mean)) of a channel.
  void gradient_sums(int64_t channel, double& grad, double& product) {
    grad = 0;
    product = 0;
    for (int64_t unit = 0; unit < blocks_.units(); ++unit) {
      grad += partial(unit, channel).mean;
      product += partial(unit, channel).squares;
    }
    product -= (mean(channel) - static_cast<double>(*entry(kCenter, channel))) * grad;
  }

  void set_input_gradient(int64_t channel, double grad_mean, double product_mean) {
    const auto at = input_gradient<T>(mean(channel), var(channel), norm_.eps,
                                      channel_value(norm_.weight, channel, 1), grad_mean, product_mean);
    set(kGradient, channel, at.gradient);
    set(kDeviation, channel, at.deviation);
    set(kConstant, channel, at.constant);
  }

  auto input_differentiator(const BatchNormGradient& grad) const {
    return [this, &grad](const Rows& rows, int64_t channel, int64_t element, int64_t byte) {
      kernels_.gradient_rows(gradient_rows(grad, rows, channel, element, byte));
    };
  }

  double mean(int64_t channel) const { return channel_value(norm_.mean, channel, 0); }
  double var(int64_t channel) const { return channel_value(norm_.var, channel, 1); }
  int64_t channels() const { return norm_.shape.channels; }
  const ChannelBlocks& blocks() const { return blocks_; }

 private:
  // The kernels' sums of one unit: lanes for each channel, or one number for every entry of a row.
  class Sums {
   public:
    Sums(const ChannelBlocks& blocks, int64_t channels)
        : columns_(blocks.columns()),
          entries_(channels * columns_),
          fold_(blocks.sum_fold()),
          sums_(2 * (columns_ > 0 ? entries_ * fold_ : channels * kSumLanes)) {}
    double* data() { return sums_.data(); }
    double first(int64_t channel) const { return sum(channel, 0); }
    double second(int64_t channel) const { return sum(channel, 1); }

   private:
    double sum(int64_t channel, int which) const {
      if (columns_ == 0) return sum_of(&sums_[(2 * channel + which) * kSumLanes], kSumLanes);
      double sum = 0;
      const double* entries = &sums_[which * fold_ * entries_ + channel * columns_];
      for (int64_t f = 0; f < fold_; ++f, entries += entries_) {
        sum += columns_ == 1 ? *entries : sum_of(entries, columns_);
      }
      return sum;
    }
    // Adds to four sums in turn, so that additions do not wait for each other.
    static double sum_of(const double* values, int64_t count) {
      double sums[4] = {};
      int64_t k = 0;
      for (; k + 4 <= count; k += 4) {
        for (int lane = 0; lane < 4; ++lane) sums[lane] += values[k + lane];
      }
      for (int lane = 0; k < count; ++k, ++lane) sums[lane] += values[k];
      return (sums[0] + sums[1]) + (sums[2] + sums[3]);
    }
    int64_t columns_;
    int64_t entries_;
    int64_t fold_;
    std::vector<double> sums_;
  };

  Sums new_sums(int64_t channels) const { return Sums(blocks_, channels); }

  // Returns whether the tensors together exceed the last cache, and consist of whole cache lines.
  bool streams(const Rows& rows, std::initializer_list<const void*> tensors) const {
    const int64_t size = element_size(norm_.dtype);
    int64_t bytes = 0;
    bool aligned = rows.length * size % kLine == 0 && rows.pitch * size % kLine == 0;
    for (const void* tensor : tensors) {
      if (tensor != nullptr) bytes += norm_.shape.count() * channels() * size;
      aligned = aligned && reinterpret_cast<uintptr_t>(tensor) % kLine == 0;
    }
    return aligned && bytes > last_cache();
  }

  T* entry(Kind kind, int64_t channel) { return coefficients_.from(kind, channel * columns_); }
  const T* entry(Kind kind, int64_t channel) const { return coefficients_.from(kind, channel * columns_); }

  void set(Kind kind, int64_t channel, T value) {
    for (int64_t f = 0; f < blocks_.fold(); ++f)
      std::fill_n(entry(kind, f * channels() + channel), columns_, value);
  }

  Moments& partial(int64_t unit, int64_t channel) { return partials_[unit * channels() + channel]; }

  // Returns the channel's first element. Means of units are stored as differences from it, which are as small
  // as the differences within the data. Rounding larger means would lose what the variance is made of.
  double origin(int64_t channel) const {
    double first = 0;
    with_elements(norm_.dtype, norm_.input, [&](const auto* elements) {
      first = static_cast<double>(compute_value(elements[channel * norm_.shape.inner]));
    });
    return is_finite(first) ? first : 0;
  }

  // Uses each channel's first element as the shift, since sums of differences from it lose little.
  void take_shift(const Rows& rows, const void* input, std::vector<T>& shift) const {
    const int64_t step = rows.row_is_channel ? rows.pitch : columns_;
    const int64_t entries = static_cast<int64_t>(shift.size() - kSumLanes) / blocks_.sum_fold();
    with_elements(norm_.dtype, input, [&](const auto* elements) {
      for (int64_t c = 0; c < entries / columns_; ++c) {
        const T first = static_cast<T>(compute_value(elements[c * step]));
        std::fill_n(shift.data() + c * columns_, columns_, is_finite(first) ? first : T(0));
      }
    });
    for (int64_t f = 1; f < blocks_.sum_fold(); ++f)
      std::copy_n(shift.data(), entries, shift.data() + f * entries);
  }

  NormalizationTable<T> normalization_table(int64_t channel) const {
    return {entry(kCenter, channel), entry(kScale, channel), entry(kOffset, channel)};
  }

  GradientRows<T> gradient_rows(const BatchNormGradient& grad, const Rows& rows, int64_t channel,
                                int64_t element, int64_t byte) const {
    const InputGradientTable<T> gradient{entry(kGradient, channel), entry(kDeviation, channel),
                                         entry(kConstant, channel)};
    const ReluMask relu = !norm_.has_relu()      ? ReluMask::none
                          : grad.mask == nullptr ? ReluMask::recomputed
                                                 : ReluMask::stored;
    return {rows,
            at(norm_, norm_.input, element),
            at(norm_, grad.grad_output, element),
            at(grad.mask, byte),
            at(norm_, grad.grad_input, element),
            at(norm_, grad.grad_residual, element),
            normalization_table(channel),
            gradient,
            relu,
            relu_bounds<T>(norm_.ceiling),
            constant_statistics_,
            streams(rows, {norm_.input, grad.grad_output, grad.grad_input, grad.grad_residual})};
  }

  const BatchNorm& norm_;
  const ChannelBlocks blocks_;
  const BatchNormKernels<T>& kernels_;
  const int64_t columns_;  // number of entries of a channel in the tables
  Coefficients<T> coefficients_;
  bool constant_statistics_ = false;
  std::vector<Moments> partials_;
};

}  // namespace steadygrad::cpu
