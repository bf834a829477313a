// Pass 1: a partial norm per chunk, then per tensor, then over the tensors of a scope, in the order of
// core/norm.h.
#include "cpu/grad_norm.h"

#include <algorithm>

#include "cpu/scope_norms.h"
#include "cpu/stage.h"

namespace steadygrad::cpu {
namespace {

bool sum_is_finite(const NormSums& sums) { return is_finite(sums.small + sums.medium + sums.large); }

template <class T>
class ChunkNorm {
 public:
  ChunkNorm(const TensorOperands& tensor, const Chunk& chunk, const GradientTransform<T>& transform,
            NormType type, double scale)
      : tensor_(tensor), chunk_(chunk), transform_(transform), type_(type), scale_(scale) {}

  NormPartial operator()() {
    NormPartial partial;
    partial.sums = sums(false);
    if (!sum_shows_nonfinite(type_) || !sum_is_finite(partial.sums)) {
      for_each_tile(kTile, [&](const T* grad, int64_t count) {
        vector_kernels<T>().count_nonfinite(grad, count, partial.nonfinite, partial.nan);
      });
      if (partial.nonfinite > 0) partial.sums = sums(true);
    }
    return partial;
  }

 private:
  // Calls function for tiles of up to `tile` elements, or of at most kTile if they go through a buffer.
  template <class Function>
  void for_each_tile(int64_t tile, Function function) {
    const bool in_place = Stage<T>::is_direct(tensor_.grad) && transform_.keeps_gradient_before_clip();
    if (!in_place) tile = kTile;
    for (int64_t done = 0; done < chunk_.count; done += tile) {
      const int64_t begin = chunk_.begin + done;
      const int64_t count = std::min<int64_t>(tile, chunk_.count - done);
      const T* grad = grad_.read(tensor_, tensor_.grad, begin, count);
      if (!transform_.keeps_gradient_before_clip()) {
        const T* param = transform_.penalty_before_clip.active()
                             ? param_.read(tensor_, tensor_.param, begin, count)
                             : nullptr;
        vector_kernels<T>().before_clip(grad_.buffer(), grad, param, count, transform_);
        grad = grad_.buffer();
      }
      function(grad, count);
    }
  }

  NormSums sums(bool zero_nonfinite) {
    const bool squares = type_.kind == NormKind::two && sizeof(T) == sizeof(double);
    const int filled = std::min<int32_t>(chunk_.count, kLanes);
    std::fill_n(lanes_.medium, filled, norm_identity(type_));
    if (squares) std::fill_n(lanes_.small, filled, 0.0);
    if (squares) std::fill_n(lanes_.large, filled, 0.0);
    for_each_tile(zero_nonfinite ? kTile : kChunk, [&](const T* grad, int64_t count) {
      if (zero_nonfinite) {
        vector_kernels<T>().zero_nonfinite(grad_.buffer(), grad, count);
        grad = grad_.buffer();
      }
      vector_kernels<T>().accumulate_norm(lanes_, grad, count, type_, scale_);
    });
    return {squares ? reduced(lanes_.small) : 0, reduced(lanes_.medium), squares ? reduced(lanes_.large) : 0};
  }

  double reduced(double* lanes) const {
    return combine_lanes(type_, lanes, std::min<int32_t>(chunk_.count, kLanes));
  }

  const TensorOperands& tensor_;
  const Chunk& chunk_;
  const GradientTransform<T> transform_;
  NormType type_;
  double scale_;
  NormLanes lanes_;
  Stage<T> grad_;
  Stage<T> param_;
};

NormPartial chunk_norm(const TensorOperands& tensor, const Chunk& chunk, const TransformOptions& options,
                       NormType type, double scale) {
  NormPartial partial;
  with_compute_type(tensor, [&](auto element) {
    using T = decltype(element);
    partial = ChunkNorm<T>(tensor, chunk, transform_before_clip<T>(options), type, scale)();
  });
  return partial;
}

std::vector<NormPartial> tensor_partials(const Tensors& tensors, const ChunkTable& table,
                                         const std::vector<TransformOptions>& transforms, NormType type,
                                         const std::vector<double>& scales) {
  std::vector<NormPartial> chunks(table.chunks.size());
  for_each_range(table, [&](int64_t first, int64_t last) {
    for (int64_t c = first; c < last; ++c) {
      const Chunk& chunk = table.chunks[c];
      const TensorOperands& tensor = tensors[chunk.tensor];
      chunks[c] = chunk_norm(tensor, chunk, transforms[tensor.group], type, scales[chunk.tensor]);
    }
  });
  std::vector<NormPartial> partials(tensors.size());
  NormPartial lanes[kLanes];
  for (size_t t = 0; t < tensors.size(); ++t) {
    const int64_t begin = table.offsets[t];
    const int64_t count = table.offsets[t + 1] - begin;
    if (count == 0) continue;
    partials[t] = combine_in_order<NormPartial>(
        count, lanes, [&](int64_t i) { return chunks[begin + i]; },
        [&](NormPartial& a, const NormPartial& b) { combine(type, a, b); });
  }
  return partials;
}

// Powers of different tensors have different scales, so the tensors' norms are combined, relative to the
// extreme one.
double general_norm(NormType type, const std::vector<double>& norms) {
  const double extreme = type.p > 0 ? *std::max_element(norms.begin(), norms.end())
                                    : *std::min_element(norms.begin(), norms.end());
  if (!(extreme > 0) || !is_finite(extreme)) return extreme;
  double lanes[kLanes];
  const double powers = combine_in_order<double>(
      static_cast<int64_t>(norms.size()), lanes,
      [&](int64_t i) { return std::pow(norms[i] / extreme, type.p); }, [](double& a, double b) { a += b; });
  return scaled_root(extreme, powers, type.p);
}

}  // namespace

GradNorms::GradNorms(const Tensors& tensors, const ChunkTable& table,
                     const std::vector<TransformOptions>& transforms, NormType type)
    : type_(type), scales_(tensors.size(), 1.0), empty_(tensors.size()) {
  for (size_t t = 0; t < tensors.size(); ++t) empty_[t] = tensors[t].numel == 0;
  if (type.kind == NormKind::general) {
    const double extreme = type.p > 0 ? INFINITY : -INFINITY;
    const std::vector<NormPartial> extremes =
        tensor_partials(tensors, table, transforms, norm_type(extreme), scales_);
    for (size_t t = 0; t < tensors.size(); ++t) scales_[t] = scale_for(extremes[t].sums.medium);
  }
  partials_ = tensor_partials(tensors, table, transforms, type, scales_);
}

ScopeSums GradNorms::sums_of(const std::vector<size_t>& chosen) const {
  if (chosen.empty()) return no_sums(type_);
  NormPartial lanes[kLanes];
  const NormPartial sum = combine_in_order<NormPartial>(
      static_cast<int64_t>(chosen.size()), lanes, [&](int64_t i) { return partials_[chosen[i]]; },
      [&](NormPartial& a, const NormPartial& b) { combine(type_, a, b); });
  if (type_.kind != NormKind::general) return scope_sums(sum, sum.sums.medium);
  std::vector<double> norms;
  for (size_t t : chosen) norms.push_back(finish_norm(type_, partials_[t].sums, scales_[t]));
  return scope_sums(sum, general_norm(type_, norms));
}

ScopeSums GradNorms::sums_of_one(size_t tensor) const {
  if (empty_[tensor]) return no_sums(type_);
  const NormPartial& partial = partials_[tensor];
  const bool general = type_.kind == NormKind::general;
  return scope_sums(partial,
                    general ? finish_norm(type_, partial.sums, scales_[tensor]) : partial.sums.medium);
}

ScopeSums combined_sums(NormType type, const ScopeSums* rows, size_t count) {
  if (count == 0) return no_sums(type);
  ScopeSums lanes[kLanes];
  ScopeSums sums = combine_in_order<ScopeSums>(
      static_cast<int64_t>(count), lanes, [&](int64_t i) { return rows[i]; },
      [&](ScopeSums& a, const ScopeSums& b) { combine(type, a, b); });
  if (type.kind == NormKind::general) {
    std::vector<double> norms;
    for (size_t i = 0; i < count; ++i) norms.push_back(rows[i].medium);
    sums.medium = general_norm(type, norms);
  }
  return sums;
}

Norm total_norm(const Tensors& tensors, const ChunkTable& table, NormType type, const Reduction& reduction) {
  const GradNorms norms(tensors, table, {TransformOptions{}}, type);
  StepOptions options;
  options.norm_type = type;
  return scope_norms(tensors, norms, 1, options, reduction).total;
}

}  // namespace steadygrad::cpu
