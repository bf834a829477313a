// Lists of tensors with exactly the memory they need, made twice from the same description: one for each
// backend.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "core/param_storage.h"
#include "core/tensors.h"
#include "sanitize/memory.h"

namespace steadygrad::sanitize {

constexpr int kExtra = 2 + kMaxStates;
constexpr int kRoles = kExtra + 1;  // param, grad, states, extra

// `misaligned` begins one element into its block. `transposed` and `sparse` have strides and gaps between
// their elements. `expanded` repeats one element and can only be read.
enum class Layout { contiguous, misaligned, transposed, sparse, expanded };

struct Form {
  DType dtype = DType::float32;
  Layout layout = Layout::contiguous;
};

struct TensorSpec {
  int64_t numel = 0;
  int32_t group = 0;
  Form forms[kRoles] = {};
};

struct Specs {
  std::string name;
  std::vector<TensorSpec> tensors;

  int64_t elements() const {
    int64_t sum = 0;
    for (const TensorSpec& tensor : tensors) sum += tensor.numel;
    return sum;
  }
};

// Sizes at vector, lane, tile and chunk edges, and empty tensors.
const std::vector<int64_t>& edge_sizes();
Specs direct_tensors();  // fp32 in memory order
Specs half_tensors();    // bf16, fp16 and fp32 in all layouts
Specs double_tensors();  // fp64 too
Specs mixed_tensors();   // of 20,000 elements: enough for a team of threads
Specs many_tensors();    // hundreds of small ones in 30 groups, some of them empty
Specs empty_tensors();   // none has elements
Specs no_tensors();

// All lists above.
std::vector<Specs> all_tensors();

// `specs` with gradients that repeat one element.
Specs with_expanded_gradients(Specs specs);

struct Uses {
  bool param = false;
  bool grad = false;
  int states = 0;
  bool groups = false;  // only a step has param groups
  bool extra = false;   // beside parameters in half precision
};

// The squares of `extreme` elements leave the range of the type. With `nonfinite` some of the tensors have
// inf, -inf and NaN.
enum class Values { ordinary, extreme, nonfinite };

class TensorSet {
 public:
  TensorSet(const Specs& specs, Uses uses, Values gradients, uint64_t seed = 1);

  const std::vector<TensorOperands>& operands() const { return operands_; }

  // Makes new gradients at other addresses, for the next step.
  void renew_gradients(Values values, uint64_t seed);

  // Describes the first difference, in the tensors' elements or between them; empty if there is none.
  std::string difference_from(const TensorSet& emulated) const;

 private:
  void fill(size_t tensor, int role, Values values, uint64_t seed);

  struct Storage {
    Block memory{0};
    std::vector<int64_t> strides;
  };
  struct Tensor {
    TensorSpec spec;
    std::vector<int64_t> sizes;
    Storage storages[kRoles];
  };
  Uses uses_;
  std::vector<std::unique_ptr<Tensor>> tensors_;
  std::vector<TensorOperands> operands_;
};

}  // namespace steadygrad::sanitize
