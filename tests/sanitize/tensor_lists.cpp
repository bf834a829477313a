#include "sanitize/report.h"
#include "sanitize/tensor_set.h"

namespace steadygrad::sanitize {
namespace {

// Neighbouring tensors and roles get different forms.
Specs combined(std::string name, const std::vector<DType>& dtypes, const std::vector<Layout>& layouts,
               const std::vector<int64_t>& sizes) {
  Specs specs{std::move(name), {}};
  for (size_t t = 0; t < sizes.size(); ++t) {
    TensorSpec& spec = specs.tensors.emplace_back();
    spec.numel = sizes[t];
    spec.group = static_cast<int32_t>(3 * t / sizes.size());
    // Every third tensor has the same form in all roles, as most tensors in practice.
    for (size_t role = 0; role < kRoles; ++role) {
      const size_t place = t / 3 + (t % 3 == 0 ? 0 : role);
      spec.forms[role] = {dtypes[place % dtypes.size()], layouts[(place + t) % layouts.size()]};
    }
  }
  return specs;
}

const std::vector<Layout> kAllLayouts = {Layout::contiguous, Layout::misaligned, Layout::transposed,
                                         Layout::sparse, Layout::contiguous};

}  // namespace

const std::vector<int64_t>& edge_sizes() {
  static const std::vector<int64_t> sizes = {20000, 0, 1, 31, 33, 127, 129, 4099, 8191, 8193};
  return sizes;
}

Specs direct_tensors() { return combined("direct", {DType::float32}, {Layout::contiguous}, edge_sizes()); }

Specs half_tensors() {
  return combined("half", {DType::bfloat16, DType::float16, DType::float32}, kAllLayouts, edge_sizes());
}

Specs double_tensors() {
  return combined("double", {DType::float64, DType::float64, DType::float32, DType::float16}, kAllLayouts,
                  edge_sizes());
}

Specs mixed_tensors() {
  return combined("mixed", {DType::float32, DType::bfloat16, DType::float64, DType::float16}, kAllLayouts,
                  std::vector<int64_t>(7, 20000));
}

Specs many_tensors() {
  std::vector<int64_t> sizes;
  for (int64_t t = 0; t < (kFewCases ? 60 : 300); ++t) sizes.push_back(t % 41);
  Specs specs = combined("many", {DType::float32}, {Layout::contiguous, Layout::misaligned}, sizes);
  // The first and the last group, and two in between, have no tensor.
  for (size_t t = 0; t < sizes.size(); ++t) {
    const int32_t group = static_cast<int32_t>(1 + 28 * t / sizes.size());
    specs.tensors[t].group = group == 7 || group == 25 ? group + 1 : group;
  }
  return specs;
}

Specs empty_tensors() { return combined("empty", {DType::float32}, {Layout::contiguous}, {0, 0, 0, 0}); }

Specs no_tensors() { return {"none", {}}; }

std::vector<Specs> all_tensors() {
  return {direct_tensors(), half_tensors(),  double_tensors(), mixed_tensors(),
          many_tensors(),   empty_tensors(), no_tensors()};
}

Specs with_expanded_gradients(Specs specs) {
  specs.name += " expanded";
  for (TensorSpec& spec : specs.tensors) spec.forms[1].layout = Layout::expanded;
  return specs;
}

}  // namespace steadygrad::sanitize
