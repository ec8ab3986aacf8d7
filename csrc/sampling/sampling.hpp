// From logits to tokens.
#pragma once

#include <cstdint>

#include "pool.hpp"

namespace quire {

struct SamplingKernels {
  int placeholder;
};

}  // namespace quire
