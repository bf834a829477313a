#include "sanitize/report.h"

#include <cstring>
#include <exception>

#include "sanitize/openmp.h"

namespace steadygrad::sanitize {
namespace {

constexpr int64_t kWorthATeam = 1 << 17;  // as cpu/parallel.h has it

}  // namespace

void Report::check(const std::string& name, const Specs& specs, const std::function<std::string()>& run) {
  const std::string full_name = name + ", " + specs.name + " tensors";
  const bool team = specs.elements() > kWorthATeam;
  if (full_name.find(wanted_) == std::string::npos) return;
  if (wanted_.empty() && is_left_out(name.substr(0, name.find(' ')), team)) return;
  ++cases_;
  const int64_t before = team_count();
  std::string problem;
  try {
    problem = run();
  } catch (const std::exception& error) {
    problem = std::string("threw ") + error.what();
  }
  if (problem.empty() && team && team_count() == before) problem = "no team of threads was used";
  if (!problem.empty()) failures_.push_back(full_name + ": " + problem);
}

bool Report::is_left_out(const std::string& operation, bool team) {
  constexpr int64_t kOneIn = 5;
  return kFewCases && seen_[{operation, team}]++ % kOneIn != 0;
}

std::string difference(const std::string& what, double cpu, double emulated) {
  if ((cpu != cpu && emulated != emulated) || std::memcmp(&cpu, &emulated, sizeof(double)) == 0) return "";
  char text[80];
  std::snprintf(text, sizeof(text), ": cpu %.17g, emulated %.17g", cpu, emulated);
  return what + text;
}

std::string difference_of_counts(const std::string& what, int64_t cpu, int64_t emulated) {
  if (cpu == emulated) return "";
  return what + ": cpu " + std::to_string(cpu) + ", emulated " + std::to_string(emulated);
}

}  // namespace steadygrad::sanitize
