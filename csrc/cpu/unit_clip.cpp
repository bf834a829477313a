#include "cpu/unit_clip.h"

#include "cpu/stage.h"

namespace steadygrad::cpu {
namespace {

constexpr NormType kSquares{NormKind::two, 2.0};

// Computes the norm of any number of elements in tiles, with the same lanes as for a chunk.
template <class T>
class LaneNorm {
 public:
  void begin(int64_t count) {
    filled_ = static_cast<int>(std::min<int64_t>(count, kLanes));
    std::fill_n(lanes_.medium, filled_, 0.0);
    if (!kScaled) return;
    std::fill_n(lanes_.small, filled_, 0.0);
    std::fill_n(lanes_.large, filled_, 0.0);
  }
  void add(const T* in, int64_t count) {
    vector_kernels<T>().accumulate_norm(lanes_, in, count, kSquares, 1);
  }
  double norm() {
    NormSums sums;
    sums.medium = combine_lanes(kSquares, lanes_.medium, filled_);
    if (kScaled) {
      sums.small = combine_lanes(kSquares, lanes_.small, filled_);
      sums.large = combine_lanes(kSquares, lanes_.large, filled_);
    }
    return finish_norm(kSquares, sums, 1);
  }

 private:
  static constexpr bool kScaled = sizeof(T) == sizeof(double);

  NormLanes lanes_;
  int filled_ = 0;
};

struct UnitNorms {
  double param = 0;
  double grad = 0;
};

// Computes the norms of units; the object is large, so it is made once for many units.
template <class T>
class UnitReader {
 public:
  UnitNorms norms(const TensorOperands& tensor, int64_t begin, int64_t count,
                  const GradientTransform<T>& transform) {
    param_norm_.begin(count);
    grad_norm_.begin(count);
    for (int64_t done = 0; done < count; done += kTile) {
      const int64_t first = begin + done;
      const int64_t size = std::min<int64_t>(kTile, count - done);
      const T* const param = param_stage_.read(tensor, tensor.param, first, size);
      const T* grad = grad_stage_.read(tensor, tensor.grad, first, size);
      if (!transform.keeps_gradient_before_clip()) {
        vector_kernels<T>().before_clip(grad_stage_.buffer(), grad, param, size, transform);
        grad = grad_stage_.buffer();
      }
      param_norm_.add(param, size);
      grad_norm_.add(grad, size);
    }
    return {param_norm_.norm(), grad_norm_.norm()};
  }

 private:
  Stage<T> param_stage_;
  Stage<T> grad_stage_;
  LaneNorm<T> param_norm_;
  LaneNorm<T> grad_norm_;
};

// Starting on a unit takes about as long as this many elements.
constexpr int64_t kUnitOverhead = 64;

}  // namespace

UnitClips::UnitClips(const Tensors& tensors, const std::vector<GroupOptions>& groups,
                     const std::vector<TransformOptions>& transforms, double eps) {
  std::vector<int64_t> cost{0};  // work in all tensors before this one
  int64_t count = 0;
  int64_t elements = 0;
  for (const TensorOperands& tensor : tensors) {
    const bool clips = groups[tensor.group].clipping != INFINITY;
    units_.push_back(units_of(tensor, count));
    const int64_t here = clips ? unit_count(tensor) : 0;
    count += here;
    elements += here * units_.back().size;
    cost.push_back(cost.back() + here * (units_.back().size + kUnitOverhead));
  }
  coefficients_.resize(count);
  for (size_t t = 0; t < tensors.size(); ++t) {
    if (cost[t + 1] > cost[t]) units_[t].coefficients = coefficients_.data() + units_[t].first;
  }
  for_each_share(cost.back(), elements, [&](int64_t first, int64_t last) {
    // A unit belongs to the share in which it begins.
    size_t t = std::upper_bound(cost.begin(), cost.end(), first) - cost.begin() - 1;
    for (; t < tensors.size() && cost[t] < last; ++t) {
      const TensorUnits& units = units_[t];
      if (units.coefficients == nullptr) continue;
      const TensorOperands& tensor = tensors[t];
      const int64_t each = units.size + kUnitOverhead;
      const int64_t begin = first <= cost[t] ? 0 : (first - cost[t] + each - 1) / each;
      const int64_t end = std::min(unit_count(tensor), (last - cost[t] + each - 1) / each);
      const double clipping = groups[tensor.group].clipping;
      with_compute_type(tensor, [&](auto element) {
        using T = decltype(element);
        const TransformOptions& options = transforms[tensor.group];
        GradientTransform<T> transform = transform_before_clip<T>(options);
        transform.zero_nonfinite = options.zero_nonfinite;
        UnitReader<T> reader;
        for (int64_t u = begin; u < end; ++u) {
          const UnitNorms norms = reader.norms(tensor, u * units.size, units.size, transform);
          units.coefficients[u] = unit_coefficient(clipping, eps, norms.param, norms.grad);
        }
      });
    }
  });
  clip_ = std::any_of(coefficients_.begin(), coefficients_.end(), [](double c) { return c != 1; });
}

}  // namespace steadygrad::cpu
