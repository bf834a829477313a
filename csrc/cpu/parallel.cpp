#include "cpu/parallel.h"

#include <algorithm>
#include <cfenv>
#include <exception>
#include <iterator>
#include <mutex>

#if defined(__linux__)
#include <dlfcn.h>
#include <link.h>
#endif

namespace steadygrad::cpu {
namespace {

// Gives another thread the caller's floating-point modes, for as long as this object lives. Whether subnormal
// numbers count as zero (torch.set_flush_denormal) is a property of each thread, and results must not depend
// on the number of threads.
class AdoptedModes {
 public:
  explicit AdoptedModes(const std::fenv_t& modes) {
    std::fegetenv(&own_);
    std::fesetenv(&modes);
  }
  ~AdoptedModes() { std::fesetenv(&own_); }
  AdoptedModes(const AdoptedModes&) = delete;
  AdoptedModes& operator=(const AdoptedModes&) = delete;

 private:
  std::fenv_t own_;
};

// The functions of an OpenMP runtime that both GCC's and LLVM's libraries export.
struct OpenMp {
  std::string path;
  void (*parallel)(void (*body)(void*), void* data, unsigned threads, unsigned flags) = nullptr;
  int (*max_threads)() = nullptr;
  int (*thread)() = nullptr;
  int (*threads)() = nullptr;
  int (*in_parallel)() = nullptr;
};

#if defined(__linux__)
int collect(dl_phdr_info* info, size_t, void* paths) {
  const std::string path = info->dlpi_name == nullptr ? "" : info->dlpi_name;
  const std::string file = path.substr(path.rfind('/') + 1);
  if (file.rfind("libgomp", 0) == 0 || file.rfind("libiomp", 0) == 0 || file.rfind("libomp", 0) == 0) {
    static_cast<std::vector<std::string>*>(paths)->push_back(path);
  }
  return 0;
}

template <class Symbol>
bool resolve(void* library, const char* name, Symbol& symbol) {
  symbol = reinterpret_cast<Symbol>(dlsym(library, name));
  return symbol != nullptr;
}

OpenMp find_openmp() {
  std::vector<std::string> loaded;
  dl_iterate_phdr(collect, &loaded);
  // Another package may have loaded a copy of its own, so torch's copy comes first. It is in torch's folder
  // or in the folder of its wheel's libraries.
  const auto is_torchs = [](const std::string& path) {
    return path.find("/torch/") != std::string::npos || path.find("/torch.libs/") != std::string::npos;
  };
  std::vector<std::string> paths;
  std::copy_if(loaded.begin(), loaded.end(), std::back_inserter(paths), is_torchs);
  std::remove_copy_if(loaded.begin(), loaded.end(), std::back_inserter(paths), is_torchs);
  for (const std::string& path : paths) {
    void* library = dlopen(path.c_str(), RTLD_LAZY | RTLD_NOLOAD);
    OpenMp openmp;
    if (library != nullptr && resolve(library, "GOMP_parallel", openmp.parallel) &&
        resolve(library, "omp_get_max_threads", openmp.max_threads) &&
        resolve(library, "omp_get_thread_num", openmp.thread) &&
        resolve(library, "omp_get_num_threads", openmp.threads) &&
        resolve(library, "omp_in_parallel", openmp.in_parallel)) {
      openmp.path = path;
      return openmp;
    }
  }
  return {};
}
#else
OpenMp find_openmp() { return {}; }
#endif

const OpenMp& openmp() {
  static const OpenMp found = find_openmp();
  return found;
}

}  // namespace

const std::string& openmp_library() { return openmp().path; }

int max_threads() { return openmp().parallel == nullptr ? 1 : openmp().max_threads(); }

void run_team(int threads, void (*body)(void*, int, int), void* context) {
  if (threads <= 1 || openmp().parallel == nullptr || openmp().in_parallel() != 0) {
    body(context, 0, 1);
    return;
  }
  struct Team {
    void (*body)(void*, int, int);
    void* context;
    std::fenv_t modes;
    std::exception_ptr error;
    std::mutex mutex;
  } team{body, context, {}, nullptr, {}};
  std::fegetenv(&team.modes);
  openmp().parallel(
      [](void* data) {
        Team& team = *static_cast<Team*>(data);
        const AdoptedModes modes(team.modes);
        try {
          team.body(team.context, openmp().thread(), openmp().threads());
        } catch (...) {
          const std::lock_guard<std::mutex> lock(team.mutex);
          team.error = std::current_exception();
        }
      },
      &team, static_cast<unsigned>(threads), 0);
  if (team.error) std::rethrow_exception(team.error);
}

ChunkTable::ChunkTable(const std::vector<TensorOperands>& tensors) {
  // Starting on a chunk takes about as long as this many elements.
  constexpr int64_t kChunkOverhead = 64;
  offsets.reserve(tensors.size() + 1);
  chunks.reserve(tensors.size());
  cost.reserve(tensors.size() + 1);
  offsets.push_back(0);
  cost.push_back(0);
  for (size_t t = 0; t < tensors.size(); ++t) {
    for (int64_t begin = 0; begin < tensors[t].numel; begin += kChunk) {
      const int64_t count = std::min(kChunk, tensors[t].numel - begin);
      chunks.push_back({static_cast<int32_t>(t), static_cast<int32_t>(count), begin});
      cost.push_back(cost.back() + count + kChunkOverhead);
    }
    offsets.push_back(static_cast<int64_t>(chunks.size()));
  }
}

int64_t ChunkTable::first_chunk_at(int64_t cost_before) const {
  return std::lower_bound(cost.begin(), cost.end(), cost_before) - cost.begin();
}

}  // namespace steadygrad::cpu
