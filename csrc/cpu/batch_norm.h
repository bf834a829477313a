// Batch normalization on the CPU. Arguments are checked by the caller.
#pragma once

#include "core/batch_norm.h"

namespace steadygrad::cpu {

// statistics(mean, biased variance, count) of this input.
void batch_norm_statistics(const BatchNorm& norm, double* statistics);

// Finds the batch's statistics, leaves them in `statistics`, updates the running ones, and normalises.
void batch_norm_forward(const BatchNorm& norm, const BatchNormOutput& out, double* statistics,
                        const RunningStatistics& running);

// Normalises with norm.mean and norm.var.
void batch_norm_normalize(const BatchNorm& norm, const BatchNormOutput& out);

// The statistics of all parts together, from one vector of statistics of each part; updates the running ones.
void batch_norm_combine(const double* parts, int64_t count, int64_t channels, double* statistics,
                        const RunningStatistics& running);

// With `constant_statistics` mean and var do not depend on the input.
void batch_norm_backward(const BatchNorm& norm, const BatchNormGradient& grad, bool constant_statistics);

// sums: sum(grad) of each channel, then sum(grad * (x - mean)).
void batch_norm_backward_sums(const BatchNorm& norm, const BatchNormGradient& grad, double* sums);

// The input's and the residual's gradients from the sums over everything that the statistics were taken from,
// `*count` elements a channel.
void batch_norm_backward_input(const BatchNorm& norm, const BatchNormGradient& grad, const double* sums,
                               const double* count);

}  // namespace steadygrad::cpu
