// Round to nearest: a plain matrix into one of the quantised formats, as `models.quantization.rounding` defines them.
#pragma once

#include <cstdint>

#include "pool.hpp"

namespace quire {

// `weight_nk` is bf16, dense. Scales are float32 numbers that bf16 has; a row or group of zeros has scale 0.
struct RoundingKernels {
  void (*int8)(Pool&, const uint16_t* weight_nk, int64_t n, int64_t k, int8_t* values_nk, float* scale_n);
  void (*fp8)(Pool&, const uint16_t* weight_nk, int64_t n, int64_t k, uint8_t* values_nk, float* scale_n);
  // k is a multiple of group_size, which is a multiple of 16; and of span, within which scales are whole multiples of
  // one step, or which is 0.
  void (*int4)(Pool&, const uint16_t* weight_nk, int64_t n, int64_t k, int64_t group_size, int64_t span,
               uint8_t* nibbles_nk2, float* scale_ng);
};

}  // namespace quire
