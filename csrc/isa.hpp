// Instruction sets the kernels are compiled for, worst to best.
#pragma once

#include <string>
#include <vector>

namespace quire {

enum class Isa { portable, avx2, avx512, avx512_bf16, amx };

const char* name(Isa isa);

// Compiled in and runnable on this processor under this operating system, worst to best; portable is always there.
std::vector<Isa> usable_isas();

// The named one. Throws std::invalid_argument, with what can be had, for a name that is unknown or cannot run here.
Isa isa_by_name(const std::string& wanted);

}  // namespace quire
