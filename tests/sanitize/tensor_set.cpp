#include "sanitize/tensor_set.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace steadygrad::sanitize {
namespace {

constexpr const char* kRoleNames[kRoles] = {"param", "grad", "state 0", "state 1", "state 2", "extra"};
constexpr int kGrad = 1;

int64_t size_of(DType dtype) {
  if (dtype == DType::float64) return 8;
  return dtype == DType::float32 ? 4 : 2;
}

// SplitMix64 (Steele, Lea and Flood 2014).
uint64_t random_bits(uint64_t& state) {
  uint64_t bits = state += 0x9e3779b97f4a7c15u;
  bits = (bits ^ bits >> 30) * 0xbf58476d1ce4e5b9u;
  bits = (bits ^ bits >> 27) * 0x94d049bb133111ebu;
  return bits ^ bits >> 31;
}

double ordinary_value(uint64_t& state) {
  const uint64_t bits = random_bits(state);
  if (bits % 16 == 0) return bits % 32 == 0 ? 0.0 : -0.0;
  const double fraction = static_cast<double>(static_cast<int64_t>(bits) >> 11) * 0x1p-52;
  return std::ldexp(fraction, static_cast<int>(bits % 12) - 9);
}

double extreme_value(DType dtype, uint64_t& state) {
  const int range = dtype == DType::float64 ? 900 : dtype == DType::float16 ? 14 : 120;
  const double value = ordinary_value(state);
  return std::ldexp(value, static_cast<int>(random_bits(state) % (2 * range)) - range);
}

double nonfinite_value(uint64_t& state) {
  constexpr double kValues[] = {INFINITY, -INFINITY, NAN};
  const uint64_t bits = random_bits(state);
  return bits % 64 == 0 ? kValues[bits / 64 % 3] : ordinary_value(state);
}

void put(void* to, DType dtype, int64_t index, double value) {
  switch (dtype) {
    case DType::float32:
      static_cast<float*>(to)[index] = static_cast<float>(value);
      return;
    case DType::float64:
      static_cast<double*>(to)[index] = value;
      return;
    case DType::bfloat16:
      static_cast<BFloat16*>(to)[index] = to_bfloat16(static_cast<float>(value));
      return;
    case DType::float16:
      static_cast<Float16*>(to)[index] = to_float16(static_cast<float>(value));
      return;
  }
}

double get(const void* from, DType dtype, int64_t index) {
  switch (dtype) {
    case DType::float32:
      return static_cast<const float*>(from)[index];
    case DType::float64:
      return static_cast<const double*>(from)[index];
    case DType::bfloat16:
      return to_float(static_cast<const BFloat16*>(from)[index]);
    default:
      return to_float(static_cast<const Float16*>(from)[index]);
  }
}

// The shape has two dimensions if the size has a factor for it.
std::vector<int64_t> sizes_of(int64_t numel) {
  for (const int64_t rows : {100, 11, 3}) {
    if (numel > rows && numel % rows == 0) return {rows, numel / rows};
  }
  return {1, numel};
}

std::vector<int64_t> strides_of(Layout layout, const std::vector<int64_t>& sizes) {
  switch (layout) {
    case Layout::transposed:
      return {2, 2 * sizes[0]};
    case Layout::sparse:
      return {3 * sizes[1] + 5, 3};
    case Layout::expanded:
      return {0, 0};
    default:
      return {};
  }
}

Block block_for(const Form& form, int64_t numel, const std::vector<int64_t>& sizes,
                const std::vector<int64_t>& strides) {
  if (numel == 0) return Block(0);
  int64_t elements = numel + (form.layout == Layout::misaligned ? 1 : 0);
  if (!strides.empty()) elements = (sizes[0] - 1) * strides[0] + (sizes[1] - 1) * strides[1] + 1;
  return Block(elements * size_of(form.dtype));
}

Operand& operand_of(TensorOperands& tensor, int role) {
  if (role == 0) return tensor.param;
  if (role == kExtra) return tensor.extra;
  return role == kGrad ? tensor.grad : tensor.states[role - 2];
}

}  // namespace

TensorSet::TensorSet(const Specs& specs, Uses uses, Values gradients, uint64_t seed) : uses_(uses) {
  for (const TensorSpec& spec : specs.tensors) {
    Tensor& tensor = *tensors_.emplace_back(new Tensor{spec, sizes_of(spec.numel), {}});
    TensorOperands& operands = operands_.emplace_back();
    operands.numel = spec.numel;
    operands.sizes = tensor.sizes.data();
    operands.ndim = static_cast<int32_t>(tensor.sizes.size());
    operands.group = uses.groups ? spec.group : 0;
    operands.place = static_cast<int32_t>(tensors_.size()) - 1;
    for (int role = 0; role < kRoles; ++role) {
      const bool used = role == 0        ? uses.param
                        : role == kGrad  ? uses.grad
                        : role == kExtra ? uses.extra && is_half(spec.forms[0].dtype)
                                         : role - 2 < uses.states;
      if (used) fill(tensors_.size() - 1, role, role == kGrad ? gradients : Values::ordinary, seed);
    }
  }
}

void TensorSet::renew_gradients(Values values, uint64_t seed) {
  for (size_t t = 0; t < tensors_.size(); ++t) fill(t, kGrad, values, seed);
}

void TensorSet::fill(size_t t, int role, Values values, uint64_t seed) {
  Tensor& tensor = *tensors_[t];
  const Form& form = tensor.spec.forms[role];
  Storage& storage = tensor.storages[role];
  storage.strides = strides_of(form.layout, tensor.sizes);
  Block memory = block_for(form, tensor.spec.numel, tensor.sizes, storage.strides);
  uint64_t state = seed * 1000003 + t * kRoles + static_cast<uint64_t>(role);
  const int64_t elements = memory.bytes() / size_of(form.dtype);
  for (int64_t i = 0; i < elements; ++i) {
    // One tensor of three has non-finite elements; the others show what is done to finite ones.
    double value = values == Values::extreme                   ? extreme_value(form.dtype, state)
                   : values == Values::nonfinite && t % 3 == 1 ? nonfinite_value(state)
                                                               : ordinary_value(state);
    // These are like moments: squares are not negative, and larger than the square of the mean.
    if (role >= 2 && role != kExtra) value = std::fabs(value) * (role == 3 ? 0x1p-6 : 1);
    put(memory.data(), form.dtype, i, value);
  }
  Operand& operand = operand_of(operands_[t], role);
  const int64_t begin = form.layout == Layout::misaligned && elements > 0 ? size_of(form.dtype) : 0;
  operand.data = elements == 0 ? nullptr : memory.as<char>() + begin;
  operand.dtype = form.dtype;
  operand.strides = storage.strides.empty() ? nullptr : storage.strides.data();
  storage.memory = std::move(memory);
}

std::string TensorSet::difference_from(const TensorSet& emulated) const {
  for (size_t t = 0; t < tensors_.size(); ++t) {
    for (int role = 0; role < kRoles; ++role) {
      const Block& mine = tensors_[t]->storages[role].memory;
      const Block& other = emulated.tensors_[t]->storages[role].memory;
      if (mine.bytes() == 0 || std::memcmp(mine.data(), other.data(), mine.bytes()) == 0) continue;
      const DType dtype = tensors_[t]->spec.forms[role].dtype;
      const int64_t size = size_of(dtype);
      for (int64_t i = 0; i < mine.bytes() / size; ++i) {
        if (std::memcmp(mine.as<char>() + i * size, other.as<char>() + i * size, size) == 0) continue;
        const double a = get(mine.data(), dtype, i);
        const double b = get(other.data(), dtype, i);
        if (a != a && b != b)
          continue;  // which operand's NaN an instruction passes on is the compiler's choice
        char text[160];
        std::snprintf(text, sizeof(text),
                      "tensor %zu of %lld elements, %s, element %lld: cpu %.17g, emulated %.17g", t,
                      static_cast<long long>(tensors_[t]->spec.numel), kRoleNames[role],
                      static_cast<long long>(i), a, b);
        return text;
      }
    }
  }
  return "";
}

}  // namespace steadygrad::sanitize
