#include "emulation/settings.h"

#include <cstdlib>
#include <thread>

#include "emulation/device.h"
#include "emulation/sanitizers.h"

namespace steadygrad::emulation {
namespace {

class Reader {
 public:
  explicit Reader(std::string& problem) : problem_(problem) {}

  std::string text(const std::string& name, const std::string& otherwise) const {
    const char* value = std::getenv(("STEADYGRAD_EMULATION_" + name).c_str());
    return value == nullptr ? otherwise : value;
  }

  uint64_t number(const std::string& name, uint64_t otherwise, uint64_t least, uint64_t most) {
    const std::string value = text(name, std::to_string(otherwise));
    char* end = nullptr;
    const unsigned long long parsed = std::strtoull(value.c_str(), &end, 10);
    if (value.empty() || *end != '\0' || parsed < least || parsed > most) {
      refuse(name, "a number from " + std::to_string(least) + " to " + std::to_string(most), value);
      return otherwise;
    }
    return parsed;
  }

  void refuse(const std::string& name, const std::string& expected, const std::string& value) {
    problem_ = "STEADYGRAD_EMULATION_" + name + ": expected " + expected + ", got '" + value + "'";
  }

 private:
  std::string& problem_;
};

Settings read() {
  Settings result;
  Reader environment(result.problem);
  const std::string order = environment.text("ORDER", "random");
  if (order == "forward") {
    result.order = Order::forward;
  } else if (order == "reverse") {
    result.order = Order::reverse;
  } else if (order != "random") {
    environment.refuse("ORDER", "random, forward or reverse", order);
  }
  result.seed = environment.number("SEED", 1, 0, UINT64_MAX);
  const unsigned processors = std::thread::hardware_concurrency();
  result.threads =
      static_cast<unsigned>(environment.number("THREADS", processors == 0 ? 1 : processors, 1, 1024));
  // The sanitizers' frames are several times as large.
  const bool sanitized = STEADYGRAD_ADDRESS_SANITIZER || STEADYGRAD_THREAD_SANITIZER;
  const uint64_t stack = environment.number("STACK", sanitized ? 256 << 10 : 64 << 10, 32 << 10, 64 << 20);
  constexpr uint64_t kPage = 4096;
  result.stack_bytes = (stack + kPage - 1) / kPage * kPage;
  result.poison = environment.number("POISON", 1, 0, 1) != 0;
  result.verbose = environment.number("VERBOSE", 0, 0, 1) != 0;
  return result;
}

}  // namespace

const Settings& settings() {
  static const Settings result = read();
  return result;
}

int multiprocessors() {
  std::string problem;
  return static_cast<int>(Reader(problem).number("MULTIPROCESSORS", kMultiprocessors, 1, 1024));
}

uint64_t cooperative_multiprocessors() {
  const auto all = static_cast<uint64_t>(multiprocessors());
  std::string problem;
  return Reader(problem).number("COOPERATIVE", all, 0, all);
}

uint64_t fp64_ratio() {
  std::string problem;
  return Reader(problem).number("FP64_RATIO", 2, 1, 64);
}

}  // namespace steadygrad::emulation
