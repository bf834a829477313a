// The device that is emulated.
#pragma once

#include <cstddef>

namespace steadygrad::emulation {

// The device has few multiprocessors, since every block of a cooperative grid takes an OS thread, and every
// thread of it a stack.
constexpr int kMultiprocessors = 8;
constexpr int kBlocksPerMultiprocessor = 2;
constexpr int kSharedBytes = 48 << 10;  // of a block, unless its kernel has asked for more
constexpr int kSharedBytesOnRequest = 227 << 10;
constexpr int kSharedBytesPerMultiprocessor = 228 << 10;
constexpr int kSharedBytesReserved = 1 << 10;  // by the system, for each block
constexpr int kL2Bytes = 50 << 20;
constexpr size_t kMemoryBytes = size_t{16} << 30;

// Returns how many blocks with so much dynamic shared memory a multiprocessor runs at a time.
constexpr int resident_blocks(size_t shared_bytes) {
  const size_t fit = kSharedBytesPerMultiprocessor / (shared_bytes + kSharedBytesReserved);
  return fit < kBlocksPerMultiprocessor ? static_cast<int>(fit) : kBlocksPerMultiprocessor;
}

}  // namespace steadygrad::emulation
