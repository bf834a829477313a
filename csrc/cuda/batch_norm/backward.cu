// The backward pass in two reads. The first read takes the sums of the gradient and of its products with the
// input; the second one writes the gradients of input and residual, from the last element to the first. The
// residual's gradient is known in the first read already, but written there it would drive what the second
// read needs out of L2.
#include "core/backend.h"
#include "cuda/batch_norm/one_read.h"
#include "cuda/batch_norm/passes.h"
#include "cuda/launch.h"
#include "cuda/tensor_table.h"

namespace steadygrad::cuda {
namespace {

constexpr const char* kFunction = "batch_norm";

struct SumsArguments {
  Tiles tiles;
  BatchNorm norm;
  BatchNormGradient grad;
  GradientSums* partials;
};

template <class Access, bool kColumns>
__global__ void __launch_bounds__(kTileThreads, kBlocksAtOnce<Access>)
    gradient_sums_kernel(const SumsArguments __grid_constant__ arguments) {
  using T = typename Access::Compute;
  constexpr int kKept = kKeptBy<kColumns>;
  __shared__ SharedSums<T, kKept> shared;
  __shared__ Normalization<T> shared_channels[kMostGroupChannels];
  __shared__ ReluTerms<T, kKept, kWidestGroup> terms;
  const Tiles& tiles = arguments.tiles;
  const BatchNorm& norm = arguments.norm;
  const int64_t group = blockIdx.x % tiles.groups;
  const int64_t split = blockIdx.x / tiles.groups;
  Cursor<kColumns, Access::kAligned> cursor(tiles, group, split, threadIdx.x);
  T centers[kKept];
  share_relu_terms(tiles, norm, group, cursor.x(), cursor.y(), cursor.channel(), shared_channels, terms,
                   centers);
  ThreadGradientSums<T, kKept> sums = read_gradient_sums<Access, kColumns>(
      tiles, norm, arguments.grad, cursor, centers, terms,
      [](int, const Place&, const typename Access::Unit&, const T(&)[kUnit]) {});
  reduce_gradient_sums<kColumns>(sums, cursor.x(), cursor.y(), tiles.width, tiles.depth, shared);
  if (cursor.y() != 0) return;
#pragma unroll
  for (int k = 0; k < kKept; ++k) {
    const int64_t channel = cursor.channel() + k;
    if (channel >= tiles.shape.channels) continue;
    arguments.partials[split * tiles.shape.channels + channel] =
        channel_sums(sums, k, centers[k], channel_value(norm.mean, channel, 0));
  }
}

struct InputArguments {
  Tiles tiles;
  BatchNorm norm;
  BatchNormGradient grad;
  const double* sums;         // null where the statistics are constants
  const double* count_there;  // the elements of a channel, or null where `count` says them
  double count;
};

template <class Access, bool kColumns>
__global__ void __launch_bounds__(kTileThreads, kBlocksAtOnce<Access>)
    input_gradient_kernel(const InputArguments __grid_constant__ arguments) {
  using T = typename Access::Compute;
  constexpr int kKept = kKeptBy<kColumns>;
  constexpr int kAtOnce = kGradientsAtOnce<Access, kColumns>;
  __shared__ Normalization<T> shared[kMostGroupChannels];
  __shared__ ReluTerms<T, kKept, kWidestGroup> terms;
  __shared__ InputGradient<T> shared_gradients[kMostGroupChannels];
  const Tiles& tiles = arguments.tiles;
  const BatchNorm& norm = arguments.norm;
  const BatchNormGradient& grad = arguments.grad;
  const int64_t numel = tiles.numel();
  const int64_t block = gridDim.x - 1 - blockIdx.x;
  const int64_t group = block % tiles.groups;
  const Passage passage = passage_of(norm, grad);
  const double* const sums = arguments.sums;
  const bool constant = sums == nullptr;
  const double count = arguments.count_there != nullptr ? *arguments.count_there : arguments.count;
  share_channels(tiles, group, shared_gradients, [&](int64_t channel) {
    if (constant) return channel_gradient<T>(norm, channel, 0, 0);
    return channel_gradient<T>(norm, channel, sums[channel] / count,
                               sums[tiles.shape.channels + channel] / count);
  });
  Cursor<kColumns, Access::kAligned> cursor(tiles, group, block / tiles.groups, threadIdx.x);
  T centers[kKept];
  share_relu_terms(tiles, norm, group, cursor.x(), cursor.y(), cursor.channel(), shared, terms, centers);
  InputGradient<T> gradients[kKept];
  take_channels<kKept>(shared_gradients, cursor.x(), cursor.channel(), tiles.shape.channels, gradients);
#pragma unroll
  for (int k = 0; k < kKept; ++k) gradients[k].center = centers[k];  // so both take one register
  cursor.seek(cursor.count() - 1);
  for (int left = cursor.count(); left > 0; left -= kAtOnce) {
    Place places[kAtOnce];
    typename Access::Unit inputs[kAtOnce];
    typename Access::Unit grads[kAtOnce];
    unsigned bits[kAtOnce];
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      places[j] = cursor.place(j < left);
      cursor.retreat();
      inputs[j] = Access::load(norm.input, tiles.dtype, places[j], numel);
      grads[j] = Access::load(grad.grad_output, tiles.dtype, places[j], numel);
      bits[j] = load_mask(passage, grad, places[j]);
    }
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      T x[kUnit];
      T values[kUnit];
      Access::unpack(inputs[j], x);
      Access::unpack(grads[j], values);
      const unsigned lanes =
          lanes_let_through(passage, places[j].lanes & bits[j], x, centers, terms, cursor.x());
#pragma unroll
      for (int k = 0; k < kUnit; ++k) values[k] = has_lane(lanes, k) ? values[k] : T(0);
      if (grad.grad_residual != nullptr) Access::store(grad.grad_residual, tiles.dtype, places[j], values);
      if (grad.grad_input == nullptr) continue;
#pragma unroll
      for (int k = 0; k < kUnit; ++k) {
        const InputGradient<T>& gradient = gradients[kKept == 1 ? 0 : k];
        values[k] = constant ? gradient.of_constants(values[k]) : gradient(values[k], x[k]);
      }
      Access::store(grad.grad_input, tiles.dtype, places[j], values);
    }
  }
}

// Finds the sums and leaves them in `sums`, unless it is null; weight's and bias's gradients go where `grad`
// says.
void launch_sums(const BatchNorm& norm, const BatchNormGradient& grad, GradientSums* partials,
                 const Tiles& tiles, double* sums, Stream stream) {
  with_access(tiles, [&](auto access, auto columns) {
    launch(kFunction, stream, gradient_sums_kernel<decltype(access), decltype(columns)::value>,
           tiles.blocks(), kTileThreads, SumsArguments{tiles, norm, grad, partials});
  });
  launch_finish_gradients(kFunction, partials, tiles.splits, norm, grad, sums, stream);
}

Tiles sums_tiles(const BatchNorm& norm, const BatchNormGradient& grad, Stream stream) {
  return tiles_for(kFunction, norm.shape, norm.dtype, are_aligned(norm.input, grad.grad_output),
                   grad.mask != nullptr, stream);
}

void launch_input(const BatchNorm& norm, const BatchNormGradient& grad, const double* sums,
                  const double* count_there, Stream stream) {
  if (grad.grad_input == nullptr && grad.grad_residual == nullptr) return;
  const Tiles tiles =
      tiles_for(kFunction, norm.shape, norm.dtype,
                are_aligned(norm.input, grad.grad_output, grad.grad_input, grad.grad_residual),
                grad.mask != nullptr, stream);
  const double count = static_cast<double>(norm.shape.count());
  with_access(tiles, [&](auto access, auto columns) {
    launch(kFunction, stream, input_gradient_kernel<decltype(access), decltype(columns)::value>,
           tiles.blocks(), kTileThreads, InputArguments{tiles, norm, grad, sums, count_there, count});
  });
}

}  // namespace

void batch_norm_backward(const BatchNorm& norm, const BatchNormGradient& grad, bool constant_statistics,
                         const Allocate& allocate, Stream stream) {
  const DeviceGuard guard(stream.device, kFunction);
  const bool input_needs_sums = grad.grad_input != nullptr && !constant_statistics;
  if (input_needs_sums && backward_in_one_read(norm, grad, allocate, stream)) return;
  double* sums = nullptr;
  if (input_needs_sums || grad.grad_weight.data != nullptr || grad.grad_bias.data != nullptr) {
    const Tiles tiles = sums_tiles(norm, grad, stream);
    GradientSums* partials = nullptr;
    allocate_arena(allocate, [&](Arena& arena) {
      partials = arena.take<GradientSums>(tiles.splits * norm.shape.channels);
      sums = arena.take<double>(2 * norm.shape.channels);
    });
    launch_sums(norm, grad, partials, tiles, sums, stream);
  }
  launch_input(norm, grad, input_needs_sums ? sums : nullptr, nullptr, stream);
}

void batch_norm_backward_sums(const BatchNorm& norm, const BatchNormGradient& grad, double* sums,
                              const Allocate& allocate, Stream stream) {
  const DeviceGuard guard(stream.device, kFunction);
  const Tiles tiles = sums_tiles(norm, grad, stream);
  void* const base =
      allocate(tiles.splits * norm.shape.channels * static_cast<int64_t>(sizeof(GradientSums)));
  launch_sums(norm, grad, static_cast<GradientSums*>(base), tiles, sums, stream);
}

void batch_norm_backward_input(const BatchNorm& norm, const BatchNormGradient& grad, const double* sums,
                               const double* count, const Allocate&, Stream stream) {
  const DeviceGuard guard(stream.device, kFunction);
  launch_input(norm, grad, sums, count, stream);
}

}  // namespace steadygrad::cuda
