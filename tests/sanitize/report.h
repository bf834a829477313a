// Runs named cases and keeps what went wrong.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "sanitize/tensor_set.h"

namespace steadygrad::sanitize {

// Under ThreadSanitizer everything takes many times as long: of each operation, only one case in so many is
// run, unless cases are asked for by name.
#if defined(__SANITIZE_THREAD__)
constexpr bool kFewCases = true;
#else
constexpr bool kFewCases = false;
#endif

class Report {
 public:
  // Only cases whose name contains `wanted` are run.
  explicit Report(std::string wanted) : wanted_(std::move(wanted)) {}

  // The first word of `name` is the operation. `run` returns how the backends differ, or nothing if they
  // agree. If the tensors are enough work for a team of threads, the CPU backend has to use one.
  void check(const std::string& name, const Specs& specs, const std::function<std::string()>& run);

  int64_t cases() const { return cases_; }
  const std::vector<std::string>& failures() const { return failures_; }

 private:
  bool is_left_out(const std::string& operation, bool team);

  std::string wanted_;
  int64_t cases_ = 0;
  std::map<std::pair<std::string, bool>, int64_t> seen_;
  std::vector<std::string> failures_;
};

// Returns an empty text if both numbers have the same bits or are NaN.
std::string difference(const std::string& what, double cpu, double emulated);
std::string difference_of_counts(const std::string& what, int64_t cpu, int64_t emulated);

// The cases of each file.
void check_norms(Report& report);
void check_clips(Report& report);
void check_penalties(Report& report);
void check_steps(Report& report);
void check_batch_norms(Report& report);

}  // namespace steadygrad::sanitize
