// Batch normalization on CUDA devices: the operations of cpu/batch_norm.h, queued on a stream. Arguments are
// checked by the caller; every pointer is to device memory.
#pragma once

#include "core/batch_norm.h"
#include "cuda/operations.h"

namespace steadygrad::cuda {

// statistics(mean, biased variance, count) of this input.
void batch_norm_statistics(const BatchNorm& norm, double* statistics, const Allocate& allocate,
                           Stream stream);

// Finds the batch's statistics, leaves them in `statistics`, updates the running ones, and normalises.
void batch_norm_forward(const BatchNorm& norm, const BatchNormOutput& out, double* statistics,
                        const RunningStatistics& running, const Allocate& allocate, Stream stream);

// Normalises with norm.mean and norm.var.
void batch_norm_normalize(const BatchNorm& norm, const BatchNormOutput& out, Stream stream);

// The statistics of all parts together, from one vector of statistics of each part; updates the running ones.
void batch_norm_combine(const double* parts, int64_t count, int64_t channels, double* statistics,
                        const RunningStatistics& running, Stream stream);

// With `constant_statistics` mean and var do not depend on the input.
void batch_norm_backward(const BatchNorm& norm, const BatchNormGradient& grad, bool constant_statistics,
                         const Allocate& allocate, Stream stream);

// sums: sum(grad) of each channel, then sum(grad * (x - mean)).
void batch_norm_backward_sums(const BatchNorm& norm, const BatchNormGradient& grad, double* sums,
                              const Allocate& allocate, Stream stream);

// The input's and the residual's gradients from the sums over everything that the statistics were taken from,
// `*count` elements a channel.
void batch_norm_backward_input(const BatchNorm& norm, const BatchNormGradient& grad, const double* sums,
                               const double* count, Stream stream);

}  // namespace steadygrad::cuda
