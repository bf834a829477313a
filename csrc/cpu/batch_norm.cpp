// Each direction is two visits of the elements, the second one with what the first one found. Channels that
// fit a thread's cache are read from memory once.
#include "cpu/batch_norm.h"

#include <cstring>
#include <unistd.h>
#include <vector>

#include "core/gradient.h"
#include "cpu/channel_blocks.h"

namespace steadygrad::cpu {
namespace {

int64_t element_size(DType dtype) { return dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2; }

template <class Byte>
Byte* at(Byte* data, int64_t offset) {
  return data == nullptr ? nullptr : data + offset;
}
const void* at(const BatchNorm& norm, const void* data, int64_t element) {
  return at(static_cast<const char*>(data), element * element_size(norm.dtype));
}
void* at(const BatchNorm& norm, void* data, int64_t element) {
  return at(static_cast<char*>(data), element * element_size(norm.dtype));
}

constexpr int64_t kLine = 64;

// Bytes of the last cache that threads share.
int64_t last_cache() {
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
float compute_value(float value) { return value; }
double compute_value(double value) { return value; }
float compute_value(BFloat16 value) { return to_float(value); }
float compute_value(Float16 value) { return to_float(value); }

template <class Function>
void with_compute_type(DType dtype, Function function) {
  if (dtype == DType::float64) return function(double{});
  function(float{});
}

// Coefficients of every channel, with the room that vector loads need.
template <class T>
class Coefficients {
 public:
  Coefficients(int64_t channels, int kinds) : stride_(channels + kSumLanes), values_(kinds * stride_) {}
  T& operator()(int kind, int64_t channel) { return values_[kind * stride_ + channel]; }
  const T* from(int kind, int64_t channel) const { return values_.data() + kind * stride_ + channel; }

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
        coefficients_(norm.shape.channels * blocks_.fold(), kKinds) {}

  void prepare_backward(const BatchNormGradient& grad, bool constant_statistics) {
    constant_statistics_ = constant_statistics;
    const bool finds_mask = norm_.relu && grad.mask == nullptr;
    for (int64_t c = 0; c < channels(); ++c) {
      if (finds_mask) {
        set_normalization(c, mean(c), var(c));
      } else {
        set(kCenter, c, static_cast<T>(mean(c)));
      }
    }
  }

  // What is found of each unit of each channel.
  void keep_partials() { partials_.resize(blocks_.units() * channels()); }

  void sum_input(int64_t block, int64_t unit) {
    const int64_t first = blocks_.first_channel(block);
    const int64_t count = blocks_.channels_in(block);
    std::vector<T> shift(count * blocks_.sum_fold() + kSumLanes);
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
      partial(unit, first + c) =
          moments_from_sums(static_cast<double>(shift[c]), sums.first(c), sums.second(c), elements);
    }
  }

  Moments moments(int64_t channel) {
    return combined_moments(blocks_.units(), [&](int64_t unit) { return partial(unit, channel); });
  }

  void set_normalization(int64_t channel, double mean, double var) {
    const auto at = normalization<T>(mean, var, norm_.eps, channel_value(norm_.weight, channel, 1),
                                     channel_value(norm_.bias, channel, 0));
    set(kCenter, channel, at.center);
    set(kScale, channel, at.scale);
    set(kOffset, channel, at.offset);
  }

  // What ChannelBlocks calls for some rows.
  auto normalizer(const BatchNormOutput& out) const {
    return [this, &out](const Rows& rows, int64_t channel, int64_t element, int64_t byte) {
      kernels_.normalize_rows({rows, at(norm_, norm_.input, element), at(norm_, out.residual, element),
                               at(norm_, out.output, element), at(out.mask, byte),
                               normalization_table(channel), norm_.relu,
                               streams(rows, {norm_.input, out.residual, out.output})});
    };
  }

  // Partial sums of the gradient and of its products with x - center, in the places of mean and squares.
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

  // sum(grad) and sum(grad * (x - mean)).
  void gradient_sums(int64_t channel, double& grad, double& product) {
    grad = 0;
    product = 0;
    for (int64_t unit = 0; unit < blocks_.units(); ++unit) {
      grad += partial(unit, channel).mean;
      product += partial(unit, channel).squares;
    }
    product -= (mean(channel) - static_cast<double>(coefficients_(kCenter, channel))) * grad;
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
  // The kernels' sums of one unit: lanes of each channel, or one where every element is a channel.
  class Sums {
   public:
    Sums(int64_t lanes, int64_t channels, int64_t fold)
        : lanes_(lanes), channels_(channels), fold_(fold), sums_(2 * lanes * channels * fold) {}
    double* data() { return sums_.data(); }
    double first(int64_t channel) const { return sum(channel, 0); }
    double second(int64_t channel) const { return sum(channel, 1); }

   private:
    double sum(int64_t channel, int which) const {
      if (lanes_ == 1) {
        double sum = 0;
        for (int64_t f = 0; f < fold_; ++f) sum += sums_[(which * fold_ + f) * channels_ + channel];
        return sum;
      }
      const double* const lanes = &sums_[(2 * channel + which) * kSumLanes];
      double sum = 0;
      for (int k = 0; k < kSumLanes; ++k) sum += lanes[k];
      return sum;
    }
    int64_t lanes_;
    int64_t channels_;
    int64_t fold_;
    std::vector<double> sums_;
  };

  Sums new_sums(int64_t channels) const {
    return Sums(norm_.shape.inner == 1 ? 1 : kSumLanes, channels, blocks_.sum_fold());
  }

  // Whether the tensors are together more than the last cache holds, and whole cache lines can be written.
  bool streams(const Rows& rows, std::initializer_list<const void*> tensors) const {
    const int64_t size = element_size(norm_.dtype);
    int64_t bytes = 0;
    bool aligned = rows.length * size % kLine == 0;
    for (const void* tensor : tensors) {
      if (tensor != nullptr) bytes += norm_.shape.count() * channels() * size;
      aligned = aligned && reinterpret_cast<uintptr_t>(tensor) % kLine == 0;
    }
    return aligned && bytes > last_cache();
  }

  void set(Kind kind, int64_t channel, T value) {
    for (int64_t f = 0; f < blocks_.fold(); ++f) coefficients_(kind, f * channels() + channel) = value;
  }

  Moments& partial(int64_t unit, int64_t channel) { return partials_[unit * channels() + channel]; }

  // Each channel's first element: sums of what differs from it lose little.
  void take_shift(const Rows& rows, const void* input, std::vector<T>& shift) const {
    const int64_t step = rows.row_is_channel ? rows.length : 1;
    const int64_t count = rows.row_is_channel ? rows.rows : channels();
    with_elements(norm_.dtype, input, [&](const auto* elements) {
      for (int64_t c = 0; c < count; ++c) {
        const T first = static_cast<T>(compute_value(elements[c * step]));
        shift[c] = is_finite(first) ? first : T(0);
      }
    });
    for (int64_t f = 1; f < blocks_.sum_fold(); ++f)
      std::copy_n(shift.data(), count, shift.data() + f * count);
  }

  NormalizationTable<T> normalization_table(int64_t channel) const {
    return {coefficients_.from(kCenter, channel), coefficients_.from(kScale, channel),
            coefficients_.from(kOffset, channel)};
  }

  GradientRows<T> gradient_rows(const BatchNormGradient& grad, const Rows& rows, int64_t channel,
                                int64_t element, int64_t byte) const {
    const InputGradientTable<T> gradient{coefficients_.from(kGradient, channel),
                                         coefficients_.from(kDeviation, channel),
                                         coefficients_.from(kConstant, channel)};
    const ReluMask relu = !norm_.relu            ? ReluMask::none
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
            constant_statistics_,
            streams(rows, {norm_.input, grad.grad_output, grad.grad_input, grad.grad_residual})};
  }

  const BatchNorm& norm_;
  const ChannelBlocks blocks_;
  const BatchNormKernels<T>& kernels_;
  Coefficients<T> coefficients_;
  bool constant_statistics_ = false;
  std::vector<Moments> partials_;
};

bool is_empty(const BatchNormShape& shape) { return shape.count() == 0 || shape.channels == 0; }

int64_t count_batch(const RunningStatistics& running) {
  return running.num_batches_tracked == nullptr ? 0 : ++*running.num_batches_tracked;
}

// The gradients' sums, which `finish` gets with their channel, then whatever depends on the input.
template <class T, class Finish>
void backward(const BatchNorm& norm, const BatchNormGradient& grad, bool constant_statistics, Finish finish) {
  BatchNormPass<T> pass(norm, 2);
  pass.prepare_backward(grad, constant_statistics);
  pass.keep_partials();
  pass.blocks().sum_then_visit([&](int64_t block, int64_t unit) { pass.sum_gradient(grad, block, unit); },
                               [&](int64_t first, int64_t last) {
                                 for (int64_t c = first; c < last; ++c) {
                                   double sum = 0;
                                   double product = 0;
                                   pass.gradient_sums(c, sum, product);
                                   finish(pass, c, sum, product);
                                 }
                               },
                               [&](int64_t block, int64_t unit) {
                                 if (grad.grad_input == nullptr && grad.grad_residual == nullptr) return;
                                 pass.blocks().for_each_rows(block, unit, pass.blocks().fold(),
                                                             pass.input_differentiator(grad));
                               });
}

// Without sums the statistics are constants.
void differentiate_input(const BatchNorm& norm, const BatchNormGradient& grad, const double* sums,
                         double count) {
  with_compute_type(norm.dtype, [&](auto element) {
    BatchNormPass<decltype(element)> pass(norm, 1);
    pass.prepare_backward(grad, sums == nullptr);
    for (int64_t c = 0; c < pass.channels(); ++c) {
      pass.set_input_gradient(c, sums == nullptr ? 0 : sums[c] / count,
                              sums == nullptr ? 0 : sums[pass.channels() + c] / count);
    }
    pass.blocks().for_all_rows(pass.input_differentiator(grad));
  });
}

// Folded rows leave bytes of a mask over: equal calls are to give equal masks.
void clear_mask(const BatchNorm& norm, const BatchNormOutput& out) {
  if (out.mask != nullptr) std::memset(out.mask, 0, norm.shape.mask_rows() * norm.shape.mask_row_bytes());
}

}  // namespace

void batch_norm_forward(const BatchNorm& norm, const BatchNormOutput& out, double* statistics,
                        const RunningStatistics& running) {
  const int64_t channels = norm.shape.channels;
  const auto count = static_cast<double>(norm.shape.count());
  statistics[2 * channels] = count;
  if (is_empty(norm.shape)) {
    std::fill_n(statistics, 2 * channels, 0.0);
    return;
  }
  const double factor = running_factor(running, count_batch(running));
  with_compute_type(norm.dtype, [&](auto element) {
    BatchNormPass<decltype(element)> pass(norm, 1);
    if (pass.blocks().sum_fold() > 1) clear_mask(norm, out);
    pass.keep_partials();
    pass.blocks().sum_then_visit(
        [&](int64_t block, int64_t unit) { pass.sum_input(block, unit); },
        [&](int64_t first, int64_t last) {
          for (int64_t c = first; c < last; ++c) {
            const Moments moments = pass.moments(c);
            statistics[c] = moments.mean;
            statistics[channels + c] = moments.squares / count;
            update_running(running, c, factor, statistics[c], statistics[channels + c], count);
            pass.set_normalization(c, statistics[c], statistics[channels + c]);
          }
        },
        [&](int64_t block, int64_t unit) {
          if (out.output != nullptr)
            pass.blocks().for_each_rows(block, unit, pass.blocks().fold(), pass.normalizer(out));
        });
  });
}

void batch_norm_statistics(const BatchNorm& norm, double* statistics) {
  batch_norm_forward(norm, BatchNormOutput(), statistics, RunningStatistics());
}

void batch_norm_normalize(const BatchNorm& norm, const BatchNormOutput& out) {
  if (is_empty(norm.shape)) return;
  with_compute_type(norm.dtype, [&](auto element) {
    BatchNormPass<decltype(element)> pass(norm, 1);
    for (int64_t c = 0; c < pass.channels(); ++c) pass.set_normalization(c, pass.mean(c), pass.var(c));
    if (pass.blocks().sum_fold() > 1) clear_mask(norm, out);
    pass.blocks().for_all_rows(pass.normalizer(out));
  });
}

void batch_norm_combine(const double* parts, int64_t count, int64_t channels, double* statistics,
                        const RunningStatistics& running) {
  const int64_t size = statistics_size(channels);
  double elements = 0;
  for (int64_t i = 0; i < count; ++i) elements += parts[i * size + 2 * channels];
  statistics[2 * channels] = elements;
  const double factor = running_factor(running, count_batch(running));
  if (elements == 0) {
    std::fill_n(statistics, 2 * channels, 0.0);
    return;
  }
  for (int64_t c = 0; c < channels; ++c) {
    const Moments moments = combined_moments(count, [&](int64_t i) {
      const double* const part = parts + i * size;
      return Moments{part[c], part[channels + c] * part[2 * channels], part[2 * channels]};
    });
    statistics[c] = moments.mean;
    statistics[channels + c] = moments.squares / elements;
    update_running(running, c, factor, statistics[c], statistics[channels + c], elements);
  }
}

void batch_norm_backward(const BatchNorm& norm, const BatchNormGradient& grad, bool constant_statistics) {
  if (is_empty(norm.shape)) return;
  const bool needs_sums =
      !constant_statistics || grad.grad_weight.data != nullptr || grad.grad_bias.data != nullptr;
  if (!needs_sums) return differentiate_input(norm, grad, nullptr, 0);
  const auto count = static_cast<double>(norm.shape.count());
  with_compute_type(norm.dtype, [&](auto element) {
    backward<decltype(element)>(
        norm, grad, constant_statistics, [&](auto& pass, int64_t c, double sum, double product) {
          set_channel_value(grad.grad_bias, c, sum);
          set_channel_value(grad.grad_weight, c, product * inverse_deviation(pass.var(c), norm.eps));
          pass.set_input_gradient(c, sum / count, product / count);
        });
  });
}

void batch_norm_backward_sums(const BatchNorm& norm, const BatchNormGradient& grad, double* sums) {
  const int64_t channels = norm.shape.channels;
  if (is_empty(norm.shape)) {
    std::fill_n(sums, 2 * channels, 0.0);
    return;
  }
  with_compute_type(norm.dtype, [&](auto element) {
    backward<decltype(element)>(norm, grad, false, [&](auto&, int64_t c, double sum, double product) {
      sums[c] = sum;
      sums[channels + c] = product;
    });
  });
}

void batch_norm_backward_input(const BatchNorm& norm, const BatchNormGradient& grad, const double* sums,
                               const double* count) {
  if (is_empty(norm.shape)) return;
  differentiate_input(norm, grad, sums, *count);
}

}  // namespace steadygrad::cpu
