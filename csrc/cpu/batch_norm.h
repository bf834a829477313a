// Batch normalization on the CPU. The caller checks the arguments.
#pragma once

#include "core/batch_norm.h"

namespace steadygrad::cpu {

// Computes the input's statistics: means, biased variances and count.
void batch_norm_statistics(const BatchNorm& norm, double* statistics);

// Computes the batch's statistics and writes them to `statistics`, updates the running ones, and normalises.
void batch_norm_forward(const BatchNorm& norm, const BatchNormOutput& out, double* statistics,
                        const RunningStatistics& running);

// Normalises with norm.mean and norm.var.
void batch_norm_normalize(const BatchNorm& norm, const BatchNormOutput& out);

// Combines the statistics of several parts, one vector per part, and updates the running ones.
void batch_norm_combine(const double* parts, int64_t count, int64_t channels, double* statistics,
                        const RunningStatistics& running);

// Computes the gradients. With `constant_statistics`, mean and var do not depend on the input.
void batch_norm_backward(const BatchNorm& norm, const BatchNormGradient& grad, bool constant_statistics);

// Computes sum(grad) of every channel, followed by sum(grad * (x - mean)) of every channel.
void batch_norm_backward_sums(const BatchNorm& norm, const BatchNormGradient& grad, double* sums);

// Computes the gradients of input and residual from sums over all elements that the statistics come from;
// each channel has `*count` of them.
void batch_norm_backward_input(const BatchNorm& norm, const BatchNormGradient& grad, const double* sums,
                               const double* count);

}  // namespace steadygrad::cpu
