// What the machine can do at most, for kernels to be measured against: dot products that never leave the registers, and
// reading memory. Callers time them, and take the best of several runs.
#pragma once

#include "linear/linear.hpp"
#include "linear/tile_amx.hpp"
#include "simd.hpp"

namespace quire::QUIRE_ISA {

inline constexpr int64_t kProbeSteps = 1 << 14;

#if defined(__AMX_TILE__)
template <Weights kind>
inline int64_t spin_tiles() {
  // Ordinary numbers: with zeros, tiles take less power and run at a higher clock.
  alignas(64) uint16_t numbers[kTileRows * kTileBytes / 2];
  for (uint32_t i = 0; i < kTileRows * kTileBytes / 2; ++i) {
    numbers[i] = static_cast<uint16_t>(0x3f80u ^ (i * 40503u & 0x807fu));
  }
  configure_tiles(kTileRows, kTileRows, kTileBytes);
  zero_sums<true>();
  _tile_loadd(4, numbers, kTileBytes);
  _tile_loadd(5, numbers, kTileBytes);
  _tile_loadd(6, numbers, kTileBytes);
  _tile_loadd(7, numbers, kTileBytes);
  for (int64_t step = 0; step < kProbeSteps; ++step) dot_tiles<kind, true>();
  _tile_release();
  return kProbeSteps * 4 * kTileRows * kTileRows * kTileBytes / (kind == Weights::bf16 ? 2 : 1);
}
#endif

// What the compiler can neither foresee nor leave out.
template <class T>
inline T unforeseen(T value) {
  volatile T hidden = value;
  return hidden;
}

// Enough independent sums to hide any latency.
template <class Sum, class Element, class Dot>
inline int64_t spin_vectors(int64_t products_per_lane, const Dot& dot) {
  Sum sums[kTileSums];
  for (int i = 0; i < kTileSums; ++i) sums[i] = set(unforeseen(static_cast<Element>(i)));
  for (int64_t step = 0; step < kProbeSteps; ++step) {
#pragma GCC unroll 24
    for (int i = 0; i < kTileSums; ++i) sums[i] = dot(sums[i]);
  }
  for (int i = 1; i < kTileSums; ++i) sums[0] += sums[i];
  unforeseen(sums[0][0]);
  return kProbeSteps * kTileSums * kLanes * products_per_lane;
}

inline int64_t spin(Probe kind) {
#if defined(__AMX_TILE__)
  if (kind == Probe::bf16) return spin_tiles<Weights::bf16>();
  if (kind == Probe::int8) return spin_tiles<Weights::unsigned_bytes>();
#endif
  const I ones = set(unforeseen(0x01010101));
  const F factor = set(unforeseen(0.5f));
  switch (kind) {
    case Probe::bf16: return spin_vectors<F, float>(2, [&](F sum) { return dot_pair(sum, ones, ones); });
    case Probe::int8: return spin_vectors<I, int32_t>(4, [&](I sum) { return dot_quad(sum, ones, ones); });
    case Probe::fp32: break;
  }
  return spin_vectors<F, float>(1, [&](F sum) { return fma(factor, factor, sum); });
}

// Multiply-adds done by all threads.
inline int64_t multiply_in_registers(Pool& pool, Probe kind) {
  constexpr int64_t kMostThreads = 1024, kTasksPerThread = 4;
  int64_t done[kMostThreads] = {};
  parallel_for(pool, kTasksPerThread * pool.threads(), 0, [&](int64_t, int thread) {
    done[thread % kMostThreads] += spin(kind);
  });
  int64_t all = 0;
  for (const int64_t one : done) all += one;
  return all;
}

// Reads all of `data`, in order, shared among the threads.
inline void read_memory(Pool& pool, const std::byte* data, int64_t bytes) {
  constexpr int64_t kTaskBytes = 1 << 20, kStride = 4 * sizeof(I);
  parallel_for(pool, bytes / kTaskBytes, 0, [&](int64_t task, int) {
    const std::byte* from = data + task * kTaskBytes;
    I seen[4] = {};
    for (int64_t at = 0; at < kTaskBytes; at += kStride) {
      for (int i = 0; i < 4; ++i) {
        __builtin_prefetch(from + at + kPrefetch + i * static_cast<int>(sizeof(I)));
        seen[i] |= load_units(from + at + i * static_cast<int>(sizeof(I)));
      }
    }
    int32_t lanes[kLanes];
    store(lanes, (seen[0] | seen[1]) | (seen[2] | seen[3]));
    for (const int32_t lane : lanes) unforeseen(lane);
  });
}

}  // namespace quire::QUIRE_ISA
