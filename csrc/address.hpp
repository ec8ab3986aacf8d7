// Addresses of tensors, as Python passes them.
#pragma once

#include <cstdint>

namespace quire {

template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

}  // namespace quire
