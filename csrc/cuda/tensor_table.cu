#include <algorithm>
#include <stdexcept>

#include "cuda/launch.h"
#include "cuda/tensor_table.h"

namespace steadygrad::cuda {
namespace {

constexpr int kUploadThreads = 256;

// The arguments of a launch are copied as a whole, however many words count.
template <int kSize>
struct UploadArguments {
  static constexpr int kWords = kSize;

  uint64_t* to;
  int64_t count;
  uint64_t words[kSize];
};
using FewWords = UploadArguments<510>;
using ManyWords = UploadArguments<4092>;
static_assert(sizeof(FewWords) <= 4096, "more than a page");
static_assert(sizeof(ManyWords) <= 32764, "more than a launch can carry");

template <class Arguments>
__global__ void __launch_bounds__(kUploadThreads) upload_kernel(const Arguments __grid_constant__ arguments) {
  for (int64_t i = blockIdx.x * kUploadThreads + threadIdx.x; i < arguments.count;
       i += gridDim.x * kUploadThreads) {
    arguments.to[i] = arguments.words[i];
  }
}

template <class Arguments>
void upload_with(const char* function, const std::vector<uint64_t>& image, void* to, Stream stream) {
  Arguments arguments;
  const int64_t words = static_cast<int64_t>(image.size());
  for (int64_t done = 0; done < words; done += Arguments::kWords) {
    arguments.to = static_cast<uint64_t*>(to) + done;
    arguments.count = std::min<int64_t>(Arguments::kWords, words - done);
    std::copy_n(image.data() + done, arguments.count, arguments.words);
    launch(function, stream, upload_kernel<Arguments>, blocks_for(arguments.count, kUploadThreads),
           kUploadThreads, arguments);
  }
}

const Operand& operand_of(const TensorOperands& tensor, int role) {
  if (role == kParam) return tensor.param;
  if (role == kExtra) return tensor.extra;
  return role == kGrad ? tensor.grad : tensor.states[role - kFirstState];
}

int64_t geometry_size(const TensorOperands& tensor) {
  int64_t strided = 0;
  for (int role = 0; role < kRoles; ++role) strided += operand_of(tensor, role).strides != nullptr ? 1 : 0;
  return strided == 0 ? 0 : (2 + strided) * tensor.ndim;
}

bool is_used(const Operand& operand) { return operand.data != nullptr; }

Contents contents_of_one(const TensorOperands& tensor) {
  if (tensor.numel == 0) return Contents::float32_contiguous;
  if (tensor.compute_dtype() == DType::float64) return Contents::any;
  for (int role = 0; role < kRoles; ++role) {
    const Operand& operand = operand_of(tensor, role);
    if (is_used(operand) && !is_contiguous<float>(operand)) return Contents::no_float64;
  }
  return Contents::float32_contiguous;
}

int32_t checked_chunks(int64_t chunks) {
  if (chunks > INT32_MAX) throw std::runtime_error("steadygrad: expected fewer than 2^44 elements in all");
  return static_cast<int32_t>(chunks);
}

}  // namespace

TensorTable build_table(const Tensors& tensors, int32_t groups, const StepEntries& step, Arena& arena,
                        std::vector<uint64_t>& image) {
  const int64_t count = static_cast<int64_t>(tensors.size());
  int64_t geometry_total = 0;
  bool has[kRoles] = {};
  for (const TensorOperands& tensor : tensors) {
    geometry_total += geometry_size(tensor);
    for (int role = 0; role < kRoles; ++role) has[role] = has[role] || is_used(operand_of(tensor, role));
  }
  const char* const begin = arena.take<char>(0);
  uint32_t* const arrived = arena.take<uint32_t>(2);
  TensorHead* const heads = arena.take<TensorHead>(count);
  Operand* operands[kRoles] = {};
  for (int role = 0; role < kRoles; ++role) {
    if (has[role]) operands[role] = arena.take<Operand>(count);
  }
  int32_t* const nonempty = arena.take<int32_t>(count);
  int32_t* const group_begin = arena.take<int32_t>(groups + 1);
  StepCounter* const counters = step.counters != nullptr ? arena.take<StepCounter>(count) : nullptr;
  int64_t* const geometry = arena.take<int64_t>(geometry_total);
  image.assign((arena.take<char>(0) - begin) / sizeof(uint64_t), 0);

  // Where in the image the word for a device address stands.
  const auto host = [&](auto* device) {
    return reinterpret_cast<decltype(device)>(reinterpret_cast<char*>(image.data()) +
                                              (reinterpret_cast<const char*>(device) - begin));
  };
  TensorTable table;
  table.tensors = static_cast<int32_t>(count);
  table.groups = groups;
  int64_t chunks = 0;
  int64_t geometry_used = 0;
  const auto keep = [&](const int64_t* values, int32_t ndim) {
    int64_t* const device = geometry + geometry_used;
    std::copy_n(values, ndim, host(device));
    geometry_used += ndim;
    return device;
  };
  const auto keep_sizes = [&](const TensorOperands& tensor) {
    const int64_t* const device = keep(tensor.sizes, tensor.ndim);
    for (int32_t d = 0; d < tensor.ndim; ++d) {
      // Of an empty tensor no element is ever looked up.
      const uint64_t size = std::max<uint64_t>(1, static_cast<uint64_t>(tensor.sizes[d]));
      *host(geometry + geometry_used++) = static_cast<int64_t>(UINT64_MAX / size);
    }
    return device;
  };
  for (int64_t t = 0; t < count; ++t) {
    const TensorOperands& tensor = tensors[t];
    TensorHead& head = *host(heads + t);
    head.numel = tensor.numel;
    head.ndim = tensor.ndim;
    head.group = tensor.group;
    head.first_chunk = checked_chunks(chunks);
    head.slot = step.is_step ? tensor.place : static_cast<int32_t>(t);
    head.sizes = geometry_size(tensor) > 0 ? keep_sizes(tensor) : nullptr;
    for (int role = 0; role < kRoles; ++role) {
      if (!has[role]) continue;
      const Operand& operand = operand_of(tensor, role);
      Operand& kept = *host(operands[role] + t);
      // Gradients come anew with each step: their addresses travel with the launch of pass 1.
      kept.data = role == kGrad && step.is_step ? nullptr : operand.data;
      kept.dtype = operand.dtype;
      kept.strides = operand.strides != nullptr ? keep(operand.strides, tensor.ndim) : nullptr;
    }
    if (counters != nullptr) {
      // Field by field: what pads a struct would make equal images differ.
      const auto keep_number = [](const Number& number, Number& kept) {
        kept.data = number.data;
        kept.dtype = number.dtype;
      };
      keep_number((*step.counters)[t].step, host(counters + t)->step);
      for (int i = 0; i < kMaxNumbers; ++i) {
        keep_number((*step.counters)[t].numbers[i], host(counters + t)->numbers[i]);
      }
    }
    if (tensor.numel > 0) {
      *host(nonempty + table.nonempty_tensors++) = static_cast<int32_t>(t);
      // Tensors come in the order of their groups.
      for (int32_t g = tensor.group + 1; g <= groups; ++g) *host(group_begin + g) = table.nonempty_tensors;
    }
    chunks += (tensor.numel + kChunk - 1) / kChunk;
  }
  table.chunks = checked_chunks(chunks);
  table.heads = heads;
  std::copy_n(operands, kRoles, table.operands);
  table.nonempty = nonempty;
  table.group_begin = group_begin;
  table.counters = counters;
  table.arrived = arrived;
  table.contents = contents_of(tensors);
  return table;
}

Contents contents_of(const Tensors& tensors) {
  Contents contents = Contents::float32_contiguous;
  for (const TensorOperands& tensor : tensors) contents = std::max(contents, contents_of_one(tensor));
  return contents;
}

TensorTable upload_table(const char* function, const Tensors& tensors, const Allocate& allocate,
                         Stream stream) {
  std::vector<uint64_t> image;
  TensorTable table;
  void* const base = allocate_arena(
      allocate, [&](Arena& arena) { table = build_table(tensors, 1, StepEntries(), arena, image); });
  upload(function, image, base, stream);
  return table;
}

void upload(const char* function, const std::vector<uint64_t>& image, void* to, Stream stream) {
  const bool few = image.size() <= FewWords::kWords;
  const auto upload_all = few ? upload_with<FewWords> : upload_with<ManyWords>;
  upload_all(function, image, to, stream);
}

}  // namespace steadygrad::cuda
