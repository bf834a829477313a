// The environment variables STEADYGRAD_EMULATION_*, read when first needed.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace steadygrad::emulation {

enum class Order { random, forward, reverse };

struct Settings {
  Order order = Order::random;
  uint64_t seed = 1;
  unsigned threads = 1;
  size_t stack_bytes = 0;
  bool poison = true;
  bool verbose = false;
  std::string problem;  // why they make no sense; empty otherwise
};

const Settings& settings();

// The number of the device's multiprocessors; read whenever it is asked.
int multiprocessors();

// How many of the device's multiprocessors a cooperative launch gets; read at every one.
uint64_t cooperative_multiprocessors();

// How many times as fast as in fp64 the device says that it computes in fp32; read whenever it is asked.
uint64_t fp64_ratio();

}  // namespace steadygrad::emulation
