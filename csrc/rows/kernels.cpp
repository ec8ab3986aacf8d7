#include "rows/rows.hpp"
#include "simd.hpp"

namespace quire::QUIRE_ISA {

extern const RowKernels row_kernels;
const RowKernels row_kernels = {};

}  // namespace quire::QUIRE_ISA
