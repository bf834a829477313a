// The place in a kernel where a function was called. It is a default argument, so that it names the caller's
// line.
#pragma once

namespace steadygrad::emulation {

struct Location {
  const char* file = "";
  int line = 0;

  static constexpr Location here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    return {file, line};
  }
};

}  // namespace steadygrad::emulation
