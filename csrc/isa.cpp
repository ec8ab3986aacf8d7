#include "isa.hpp"

#include <stdexcept>

#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace quire {
namespace {

#if defined(__x86_64__)
// Linux hands out the tile registers' 8 KiB of state to processes that ask; before that, tile instructions fault.
bool tiles_permitted() {
#if defined(__linux__)
  constexpr int kRequestPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM
  constexpr int kTileData = 18;               // XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

// GCC 12 knows no name for AMX in __builtin_cpu_supports.
bool has_amx() {
  unsigned eax = 7, ebx = 0, ecx = 0, edx = 0;
  __asm__("cpuid" : "+a"(eax), "=b"(ebx), "+c"(ecx), "=d"(edx));
  constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24, kInt8 = 1u << 25;
  return (edx & kBf16) != 0 && (edx & kTile) != 0 && (edx & kInt8) != 0 && tiles_permitted();
}
#endif

bool runs_here([[maybe_unused]] Isa isa) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const bool bf16 = avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
  switch (isa) {
    case Isa::portable: return true;
    case Isa::avx2: return avx2;
    case Isa::avx512: return avx512;
    case Isa::avx512_bf16: return bf16;
    case Isa::amx: return bf16 && has_amx();
  }
#endif
  return isa == Isa::portable;
}

constexpr Isa kCompiled[] = {
    Isa::portable,
#ifdef QUIRE_HAS_avx2
    Isa::avx2,
#endif
#ifdef QUIRE_HAS_avx512
    Isa::avx512,
#endif
#ifdef QUIRE_HAS_avx512_bf16
    Isa::avx512_bf16,
#endif
#ifdef QUIRE_HAS_amx
    Isa::amx,
#endif
};

}  // namespace

const char* name(Isa isa) {
  switch (isa) {
    case Isa::portable: return "portable";
    case Isa::avx2: return "avx2";
    case Isa::avx512: return "avx512";
    case Isa::avx512_bf16: return "avx512_bf16";
    case Isa::amx: return "amx";
  }
  return "";
}

std::vector<Isa> usable_isas() {
  std::vector<Isa> usable;
  for (const Isa isa : kCompiled) {
    if (runs_here(isa)) usable.push_back(isa);
  }
  return usable;
}

Isa isa_by_name(const std::string& wanted) {
  std::string known;
  for (const Isa isa : usable_isas()) {
    if (wanted == name(isa)) return isa;
    known += std::string(known.empty() ? "" : ", ") + name(isa);
  }
  throw std::invalid_argument("instruction set '" + wanted + "' cannot be used here; there are: " + known);
}

}  // namespace quire
