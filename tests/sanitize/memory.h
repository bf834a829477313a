// Memory in which every access past an end, and every read before a write, is noticed.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

namespace steadygrad::sanitize {

// A heap block of exactly `bytes`, filled with 0xff: as numbers NaN and -1.
class Block {
 public:
  explicit Block(int64_t bytes);

  int64_t bytes() const { return bytes_; }
  void* data() const { return bytes_ == 0 ? nullptr : memory_.get(); }

  template <class T>
  T* as() const {
    return static_cast<T*>(data());
  }

 private:
  int64_t bytes_;
  std::unique_ptr<std::byte[]> memory_;
};

// One object in a block of its own.
template <class T>
class Single {
 public:
  explicit Single(T value) : block_(sizeof(T)) { *get() = value; }
  Single() : block_(sizeof(T)) {}

  T* get() const { return block_.as<T>(); }
  T value() const { return *get(); }

 private:
  Block block_;
};

// The device memory of calls. As with the bindings, the next call frees the block of the call before.
class DeviceMemory {
 public:
  std::function<void*(int64_t)> allocate();
  int64_t allocations() const { return allocations_; }

 private:
  std::vector<Block> blocks_;
  int64_t allocations_ = 0;
};

}  // namespace steadygrad::sanitize
