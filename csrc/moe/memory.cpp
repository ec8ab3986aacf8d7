#include "moe/moe.hpp"

namespace quire {

std::byte* MoeMemory::reserve(int64_t bytes) {
  if (bytes > size_) {
    memory_.reset();
    size_ = 0;
    memory_ = allocate(bytes);
    size_ = bytes;
  }
  return memory_.get();
}

}  // namespace quire
