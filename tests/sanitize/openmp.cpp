// An OpenMP runtime for the CPU backend whose threads ThreadSanitizer can follow: libgomp itself is compiled
// without it. The entry points are those that cpu/parallel.cpp looks for.
#include "sanitize/openmp.h"

#include <atomic>
#include <thread>
#include <vector>

namespace {

constexpr int kThreads = 3;

std::atomic<int64_t> teams{0};

struct Place {
  int thread = 0;
  int threads = 1;
};
thread_local Place place;

}  // namespace

extern "C" {

int omp_get_max_threads() { return kThreads; }
int omp_get_thread_num() { return place.thread; }
int omp_get_num_threads() { return place.threads; }
int omp_in_parallel() { return place.threads > 1 ? 1 : 0; }

void GOMP_parallel(void (*body)(void*), void* data, unsigned threads, unsigned) {
  const int count = static_cast<int>(threads);
  const auto run = [=](int thread) {
    place = {thread, count};
    body(data);
    place = Place();
  };
  std::vector<std::thread> others;
  for (int thread = 1; thread < count; ++thread) others.emplace_back(run, thread);
  run(0);
  for (std::thread& other : others) other.join();
  teams.fetch_add(1);
}

}  // extern "C"

namespace steadygrad::sanitize {

int64_t team_count() { return teams.load(); }

}  // namespace steadygrad::sanitize
