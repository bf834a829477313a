// The device that is emulated.
#pragma once

#include <cstddef>

namespace steadygrad::emulation {

// Few multiprocessors: every block of a cooperative grid takes an OS thread, and all of its threads a stack.
constexpr int kMultiprocessors = 8;
constexpr int kBlocksPerMultiprocessor = 2;
constexpr int kSharedBytes = 48 << 10;  // of a block, unless its kernel has asked for more
constexpr int kSharedBytesOnRequest = 227 << 10;
constexpr int kL2Bytes = 50 << 20;
constexpr size_t kMemoryBytes = size_t{16} << 30;

}  // namespace steadygrad::emulation
