#include "emulation/poison.h"

#include <cstdint>
#include <cstring>
#include <link.h>

#include "emulation/sanitizers.h"

namespace steadygrad::emulation {
namespace {

// The zero-initialised part of this module's thread-local storage. No variable of the emulator itself may be
// in it.
struct Range {
  int initialised = 1;
  bool known = false;
  char* begin = nullptr;
  size_t bytes = 0;
};
__thread Range shared_variables;

int find_range(dl_phdr_info* module, size_t size, void*) {
  if (size < offsetof(dl_phdr_info, dlpi_tls_data) + sizeof(void*) || module->dlpi_tls_data == nullptr)
    return 0;
  auto* storage = static_cast<char*>(module->dlpi_tls_data);
  const auto* ours = reinterpret_cast<const char*>(&shared_variables);
  for (int i = 0; i < module->dlpi_phnum; ++i) {
    const auto& segment = module->dlpi_phdr[i];
    if (segment.p_type == PT_TLS && ours >= storage && ours < storage + segment.p_memsz) {
      shared_variables.begin = storage + segment.p_filesz;
      shared_variables.bytes = segment.p_memsz - segment.p_filesz;
      return 1;
    }
  }
  return 0;
}

}  // namespace

void poison_shared_variables() {
#if defined(__clang__) && (STEADYGRAD_THREAD_SANITIZER || STEADYGRAD_ADDRESS_SANITIZER)
  // Clang links a sanitizer's runtime into the program, and its variables would be filled with the rest.
  return;
#endif
  if (!shared_variables.known) {
    shared_variables.known = true;
    dl_iterate_phdr(find_range, nullptr);
  }
  poison(shared_variables.begin, shared_variables.bytes);
}

STEADYGRAD_UNCHECKED void poison(void* memory, size_t bytes) {
  if (bytes == 0) return;
#if STEADYGRAD_THREAD_SANITIZER
  // Sanitizers check memset, which is slow. The barrier keeps the compiler from turning this loop into one.
  auto* bytes_left = static_cast<unsigned char*>(memory);
  for (; bytes >= sizeof(uint64_t); bytes -= sizeof(uint64_t), bytes_left += sizeof(uint64_t)) {
    *reinterpret_cast<uint64_t __attribute__((may_alias, aligned(1)))*>(bytes_left) = ~uint64_t{0};
    asm volatile("" ::: "memory");
  }
  for (; bytes > 0; --bytes) *bytes_left++ = 0xff;
#else
  std::memset(memory, 0xff, bytes);
#endif
}

}  // namespace steadygrad::emulation
