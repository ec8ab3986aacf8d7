// Memory that kernels stream over. A stream over 4 KiB pages spends its time on addresses: large pieces lie in huge
// pages where the system has them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>

namespace quire {

// Uninitialised, aligned to a cache line at least; freed with std::free. Throws std::bad_alloc.
using Memory = std::unique_ptr<std::byte[], void (*)(std::byte*)>;
Memory allocate(int64_t bytes);

// Room for some values, which growing forgets.
template <class T>
class Buffer {
 public:
  void resize(int64_t count) {
    memory_.reset();
    memory_ = allocate(count * static_cast<int64_t>(sizeof(T)));
  }
  T* data() const { return reinterpret_cast<T*>(memory_.get()); }

 private:
  Memory memory_{nullptr, [](std::byte* data) { std::free(data); }};
};

}  // namespace quire
