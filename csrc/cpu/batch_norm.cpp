// Each direction visits the elements twice; the second visit uses what the first one has found. Channels that
// fit a thread's cache are read from memory once.
#include <algorithm>
#include <cstring>

#include "cpu/batch_norm_pass.h"

namespace steadygrad::cpu {
namespace {

bool is_empty(const BatchNormShape& shape) { return shape.count() == 0 || shape.channels == 0; }

int64_t count_batch(const RunningStatistics& running) {
  return running.num_batches_tracked == nullptr ? 0 : ++*running.num_batches_tracked;
}

// Computes the sums of the gradients, passes them to `finish` with their channel, then computes what depends
// on the input.
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

// Computes the gradients of input and residual; without sums the statistics are constants.
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

// Clears the mask if rows without gaps leave some of its bytes unwritten, so that equal calls give equal
// masks.
void clear_mask(const BatchNorm& norm, const ChannelBlocks& blocks, const BatchNormOutput& out) {
  if (out.mask == nullptr || (blocks.columns() <= 1 && blocks.sum_fold() == 1)) return;
  std::memset(out.mask, 0, norm.shape.mask_rows() * norm.shape.mask_row_bytes());
}

}  // namespace

void batch_norm_forward(const BatchNorm& norm, const BatchNormOutput& out, double* statistics,
                        const RunningStatistics& running, const Allocate&, Stream) {
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
    clear_mask(norm, pass.blocks(), out);
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

void batch_norm_statistics(const BatchNorm& norm, double* statistics, const Allocate& allocate,
                           Stream stream) {
  batch_norm_forward(norm, BatchNormOutput(), statistics, RunningStatistics(), allocate, stream);
}

void batch_norm_normalize(const BatchNorm& norm, const BatchNormOutput& out, const Allocate&, Stream) {
  if (is_empty(norm.shape)) return;
  with_compute_type(norm.dtype, [&](auto element) {
    BatchNormPass<decltype(element)> pass(norm, 1);
    for (int64_t c = 0; c < pass.channels(); ++c) pass.set_normalization(c, pass.mean(c), pass.var(c));
    clear_mask(norm, pass.blocks(), out);
    pass.blocks().for_all_rows(pass.normalizer(out));
  });
}

void batch_norm_combine(const double* parts, int64_t count, int64_t channels, double* statistics,
                        const RunningStatistics& running, const Allocate&, Stream) {
  double elements = 0;
  for (int64_t i = 0; i < count; ++i) elements += parts[i * statistics_size(channels) + 2 * channels];
  statistics[2 * channels] = elements;
  const double factor = running_factor(running, count_batch(running));
  if (elements == 0) {
    std::fill_n(statistics, 2 * channels, 0.0);
    return;
  }
  for (int64_t c = 0; c < channels; ++c) {
    const ChannelStatistics found = combined_statistics(parts, count, channels, c);
    statistics[c] = found.mean;
    statistics[channels + c] = found.var;
    update_running(running, c, factor, statistics[c], statistics[channels + c], elements);
  }
}

void batch_norm_backward(const BatchNorm& norm, const BatchNormGradient& grad, bool constant_statistics,
                         const Allocate&, Stream) {
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

void batch_norm_backward_sums(const BatchNorm& norm, const BatchNormGradient& grad, double* sums,
                              const Allocate&, Stream) {
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
                               const double* count, const Allocate&, Stream) {
  if (is_empty(norm.shape)) return;
  differentiate_input(norm, grad, sums, *count);
}

}  // namespace steadygrad::cpu
