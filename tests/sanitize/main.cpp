// sanitize [TEXT]: runs all cases, or those whose name contains TEXT, on both backends and compares the
// results: bit for bit, but for batch norm and norms from pairs of fp32.
#include <cstdio>

#include "cpu/parallel.h"
#include "cpu/vector_kernels.h"
#include "sanitize/openmp.h"
#include "sanitize/report.h"

// The sanitizers' runtimes read these options. Leak detection fails where a debugger is not allowed to
// attach.
extern "C" const char* __asan_default_options() { return "detect_leaks=0"; }
extern "C" const char* __ubsan_default_options() { return "print_stacktrace=1"; }
// This turns off the second that it waits for other threads at exit; one race leads to many reports.
extern "C" const char* __tsan_default_options() { return "atexit_sleep_ms=0:halt_on_error=1"; }

int main(int count, char** arguments) {
  using namespace steadygrad;
  if (cpu::openmp_library().empty()) {
    std::fputs("the CPU backend did not find its OpenMP runtime\n", stderr);
    return 1;
  }
  sanitize::Report report(count > 1 ? arguments[1] : "");
  sanitize::check_norms(report);
  sanitize::check_clips(report);
  sanitize::check_penalties(report);
  sanitize::check_steps(report);
  sanitize::check_batch_norms(report);
  for (const std::string& failure : report.failures()) std::fprintf(stderr, "%s\n", failure.c_str());
  std::printf("%lld cases, %zu with differences; instruction set %s; %lld teams of %d threads\n",
              static_cast<long long>(report.cases()), report.failures().size(), cpu::instruction_set(),
              static_cast<long long>(sanitize::team_count()), cpu::max_threads());
  return report.failures().empty() && report.cases() > 0 ? 0 : 1;
}
