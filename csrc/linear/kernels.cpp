#include "linear/linear.hpp"
#include "simd.hpp"

namespace quire::QUIRE_ISA {

extern const LinearKernels linear_kernels;
const LinearKernels linear_kernels = {};

}  // namespace quire::QUIRE_ISA
