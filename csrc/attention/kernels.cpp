#include "attention/attention.hpp"
#include "simd.hpp"

namespace quire::QUIRE_ISA {

extern const AttentionKernels attention_kernels;
const AttentionKernels attention_kernels = {};

}  // namespace quire::QUIRE_ISA
