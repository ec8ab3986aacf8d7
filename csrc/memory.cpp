#include "memory.hpp"

#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace quire {

Memory allocate(int64_t bytes) {
  constexpr std::size_t kCacheLine = 64, kHugePage = std::size_t{1} << 21;
  const auto size = static_cast<std::size_t>(bytes < 1 ? 1 : bytes);
  const std::size_t alignment = size >= kHugePage ? kHugePage : kCacheLine;
  void* const memory = std::aligned_alloc(alignment, (size + alignment - 1) / alignment * alignment);
  if (memory == nullptr) throw std::bad_alloc();
#if defined(__linux__)
  if (alignment == kHugePage) madvise(memory, size, MADV_HUGEPAGE);
#endif
  return {static_cast<std::byte*>(memory), [](std::byte* data) { std::free(data); }};
}

}  // namespace quire
