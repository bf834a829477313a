// Batch norm, forward and backward, on both of the CUDA backend's paths. The backends add in different
// orders, so results are compared to a tolerance.
#include "core/batch_norm.h"

#include <cmath>
#include <cstdlib>
#include <cstring>

#include "core/backend.h"
#include "sanitize/report.h"

namespace steadygrad::sanitize {
namespace {

struct Problem {
  BatchNormShape shape;
  DType dtype = DType::float32;
  bool relu = false;
  bool residual = false;
  int64_t offset = 0;  // elements between the begin of a block of memory and the tensor

  int64_t numel() const { return shape.outer * shape.channels * shape.inner; }
  int64_t element_bytes() const { return dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2; }
};

// A tensor with nothing behind it.
class Elements {
 public:
  // No element is less than `away` from zero.
  explicit Elements(const Problem& problem, double seed = -1, double away = 0)
      : problem_(problem), block_((problem.numel() + problem.offset) * problem.element_bytes()) {
    if (seed < 0) return;
    for (int64_t i = 0; i < problem.numel(); ++i) {
      const double value = 3 * std::sin(0.7 * static_cast<double>(i) + seed) + seed;
      set_channel_value({data(), problem.dtype}, i, value + (value < 0 ? -away : away));
    }
  }
  void* data() const { return block_.as<char>() + problem_.offset * problem_.element_bytes(); }
  double value(int64_t i) const { return channel_value({data(), problem_.dtype}, i, 0); }

 private:
  Problem problem_;
  Block block_;
};

// All that one backend reads and writes.
struct Memory {
  explicit Memory(const Problem& problem)
      : input(problem, 1),
        residual(problem, 2, 2),  // so far that rounding decides nowhere whether ReLU lets through
        grad_output(problem, 3),
        output(problem),
        grad_input(problem),
        grad_residual(problem),
        mask(problem.shape.mask_rows() * problem.shape.mask_row_bytes()),
        statistics(statistics_size(problem.shape.channels) * 8),
        vectors(6 * problem.shape.channels * 4),
        batches(int64_t{2}) {
    for (int64_t c = 0; c < 4 * problem.shape.channels; ++c) vectors.as<float>()[c] = 0.5f;
    norm.shape = problem.shape;
    norm.dtype = problem.dtype;
    norm.input = input.data();
    norm.weight = vector(0);
    norm.bias = vector(1);
    norm.eps = 1e-5;
    norm.ceiling = problem.relu ? INFINITY : NAN;
    out.residual = problem.residual ? residual.data() : nullptr;
    out.output = output.data();
    out.mask = problem.relu && problem.residual ? mask.as<uint8_t>() : nullptr;
    running.mean = vector(2);
    running.var = vector(3);
    running.num_batches_tracked = batches.get();
    running.cumulative = true;
    grad.grad_output = grad_output.data();
    grad.mask = out.mask;
    grad.grad_input = grad_input.data();
    grad.grad_residual = out.mask != nullptr ? grad_residual.data() : nullptr;
    grad.grad_weight = vector(4);
    grad.grad_bias = vector(5);
  }

  ChannelVector vector(int64_t i) const {
    return {vectors.as<float>() + i * norm.shape.channels, DType::float32};
  }
  BatchNorm with_statistics() const {
    BatchNorm full = norm;
    full.mean = {statistics.data(), DType::float64};
    full.var = {statistics.as<double>() + norm.shape.channels, DType::float64};
    return full;
  }

  Elements input, residual, grad_output, output, grad_input, grad_residual;
  Block mask, statistics, vectors;
  Single<int64_t> batches;
  BatchNorm norm;
  BatchNormOutput out;
  RunningStatistics running;
  BatchNormGradient grad;
};

bool is_close(double a, double b, double tolerance) {
  return std::fabs(a - b) <= tolerance * (1 + std::fabs(b));
}

std::string compare(const Problem& problem) {
  const Memory cpu(problem);
  const Memory emulated(problem);
  DeviceMemory forward;
  DeviceMemory backward;
  cpu_backend().batch_norm_forward(cpu.norm, cpu.out, cpu.statistics.as<double>(), cpu.running, nullptr,
                                   Stream());
  cuda_backend().batch_norm_forward(emulated.norm, emulated.out, emulated.statistics.as<double>(),
                                    emulated.running, forward.allocate(), Stream());
  std::memcpy(cpu.statistics.data(), emulated.statistics.data(), static_cast<size_t>(cpu.statistics.bytes()));
  cpu_backend().batch_norm_backward(cpu.with_statistics(), cpu.grad, false, nullptr, Stream());
  cuda_backend().batch_norm_backward(emulated.with_statistics(), emulated.grad, false, backward.allocate(),
                                     Stream());

  if (*cpu.batches.get() != *emulated.batches.get()) return "batches differ";
  // Half precision: a bit of the last place.
  const double tolerance = problem.dtype == DType::float64 ? 1e-10
                           : problem.element_bytes() == 4  ? 2e-4
                                                           : 2e-2;
  const auto differ = [&](const char* what, const Elements& a, const Elements& b) {
    for (int64_t i = 0; i < problem.numel(); ++i) {
      if (!is_close(b.value(i), a.value(i), tolerance)) return difference(what, a.value(i), b.value(i));
    }
    return std::string();
  };
  std::string found = differ("output", cpu.output, emulated.output);
  if (found.empty()) found = differ("grad_input", cpu.grad_input, emulated.grad_input);
  if (found.empty() && cpu.grad.grad_residual != nullptr) {
    found = differ("grad_residual", cpu.grad_residual, emulated.grad_residual);
  }
  const auto count = static_cast<double>(problem.shape.count());
  for (int64_t i = 2 * problem.shape.channels; found.empty() && i < 6 * problem.shape.channels; ++i) {
    const double a = cpu.vectors.as<float>()[i];
    const double b = emulated.vectors.as<float>()[i];
    // Gradients of weight and bias are sums, in which terms of both signs cancel.
    const double allowed = i < 4 * problem.shape.channels ? 1e-5 : 1e-6 * count + 1e-4;
    if (!is_close(b, a, allowed)) found = difference("vector " + std::to_string(i), a, b);
  }
  return found;
}

}  // namespace

void check_batch_norms(Report& report) {
  const struct {
    const char* name;
    BatchNormShape shape;
  } shapes[] = {
      {"last, wide", {1500, 24, 1}},        {"last, scalar", {333, 13, 1}},
      {"last, one row", {1, 16, 1}},        {"last, several blocks", {6000, 16, 1}},
      {"first, aligned", {5, 9, 64}},       {"first, unaligned", {20, 10, 49}},
      {"first, one channel", {3, 1, 3001}}, {"first, several blocks", {40, 2, 1030}},
  };
  for (const auto& [shape_name, shape] : shapes) {
    for (const DType dtype : {DType::float32, DType::float64, DType::bfloat16, DType::float16}) {
      for (const char* path : {"one_read", "two_reads"}) {
        for (int fusion = 0; fusion < 3; ++fusion) {
          const int64_t offset = fusion == 2 && shape.channels == 24 ? 1 : 0;
          const Problem problem{shape, dtype, fusion > 0, fusion > 1, offset};
          const std::string name = std::string("batch_norm ") + shape_name + ", dtype " +
                                   std::to_string(static_cast<int>(dtype)) + ", " + path + ", fusion " +
                                   std::to_string(fusion);
          report.check(name, Specs{}, [&] {
            setenv("STEADYGRAD_BATCH_NORM_PATH", path, 1);
            std::string found = compare(problem);
            unsetenv("STEADYGRAD_BATCH_NORM_PATH");
            return found;
          });
        }
      }
    }
  }
}

}  // namespace steadygrad::sanitize
