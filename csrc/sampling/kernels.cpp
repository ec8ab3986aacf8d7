#include "sampling/sampling.hpp"
#include "simd.hpp"

namespace quire::QUIRE_ISA {

extern const SamplingKernels sampling_kernels;
const SamplingKernels sampling_kernels = {0};

}  // namespace quire::QUIRE_ISA
