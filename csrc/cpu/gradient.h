// Gradients transformed in place.
#pragma once

#include <functional>

#include "core/backend.h"
#include "core/unit_clip.h"
#include "cpu/parallel.h"

namespace steadygrad::cpu {

// Computes grad = transform(grad), with the options that transform_of returns for a tensor's index. Nothing
// is written if the options change nothing.
using TransformOf = std::function<TransformOptions(int32_t tensor)>;
using UnitsOf = std::function<TensorUnits(int32_t tensor)>;
void transform_grads(const Tensors& tensors, const ChunkTable& table, const TransformOf& transform_of,
                     const UnitsOf& units_of = nullptr);

}  // namespace steadygrad::cpu
