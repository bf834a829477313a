#include "sanitize/memory.h"

#include <cstring>

namespace steadygrad::sanitize {

Block::Block(int64_t bytes) : bytes_(bytes), memory_(new std::byte[static_cast<size_t>(bytes)]) {
  std::memset(memory_.get(), 0xff, static_cast<size_t>(bytes));
}

std::function<void*(int64_t)> DeviceMemory::allocate() {
  return [this](int64_t bytes) {
    blocks_.clear();
    ++allocations_;
    return blocks_.emplace_back(bytes).data();
  };
}

}  // namespace steadygrad::sanitize
