// Vectors of one instruction set, in plain functions. Included by kernels.cpp files only, which are compiled once per
// set: everything here lives in that set's namespace, so that no two sets' code can be mixed by the linker. For the
// same reason kernels use no templates of the standard library that could be left as calls.
//
//   F        kLanes floats                 load/store: any alignment; `_part`: the first n lanes, others zero / untouched
//   I        kLanes 32-bit integers        a "pair": two bf16 in 32 bits, the lower index in the lower half
//
// Arithmetic on F and I is C's (+ - *, comparisons give masks of all ones). Products are fused only by `fma`.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "pool.hpp"

#ifndef QUIRE_ISA
#error "QUIRE_ISA names the instruction set this file is compiled for"
#endif

namespace quire::QUIRE_ISA {

#if defined(__AVX512F__)
inline constexpr int kLanes = 16;
#elif defined(__AVX2__)
inline constexpr int kLanes = 8;
#else
inline constexpr int kLanes = 4;
#endif

using bf16 = uint16_t;  // the upper half of a float's bits
typedef float F __attribute__((vector_size(4 * kLanes)));
typedef int32_t I __attribute__((vector_size(4 * kLanes)));
typedef uint32_t U __attribute__((vector_size(4 * kLanes)));
typedef uint16_t H __attribute__((vector_size(2 * kLanes)));

inline F set(float value) { return value - F{}; }  // minus zero: -0 stays -0, so nothing is left to compute
inline I set(int32_t value) { return I{} + value; }

inline F load(const float* from) {
  F value;
  std::memcpy(&value, from, sizeof value);
  return value;
}
inline I load(const int32_t* from) {
  I value;
  std::memcpy(&value, from, sizeof value);
  return value;
}
inline void store(float* to, F value) { std::memcpy(to, &value, sizeof value); }
inline void store(int32_t* to, I value) { std::memcpy(to, &value, sizeof value); }

inline F load_part(const float* from, int64_t n) {
#if defined(__AVX512F__)
  return reinterpret_cast<F>(_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1), from));
#else
  F value{};
  std::memcpy(&value, from, static_cast<std::size_t>(n) * sizeof(float));
  return value;
#endif
}
inline void store_part(float* to, F value, int64_t n) {
#if defined(__AVX512F__)
  _mm512_mask_storeu_ps(to, static_cast<__mmask16>((1u << n) - 1), reinterpret_cast<__m512>(value));
#else
  std::memcpy(to, &value, static_cast<std::size_t>(n) * sizeof(float));
#endif
}

inline F widen(H value) { return reinterpret_cast<F>(__builtin_convertvector(value, U) << 16); }
inline float widen(bf16 value) {
  const uint32_t bits = static_cast<uint32_t>(value) << 16;
  float wide;
  std::memcpy(&wide, &bits, sizeof wide);
  return wide;
}
inline F load(const bf16* from) {
  H value;
  std::memcpy(&value, from, sizeof value);
  return widen(value);
}
inline F load_part(const bf16* from, int64_t n) {
#if defined(__AVX512F__)
  const __m256i value = _mm256_maskz_loadu_epi16(static_cast<__mmask16>((1u << n) - 1), from);
  return widen(reinterpret_cast<H>(value));
#else
  H value{};
  std::memcpy(&value, from, static_cast<std::size_t>(n) * sizeof(bf16));
  return widen(value);
#endif
}

// To nearest, ties to even; NaN stays NaN. The same bits on every instruction set (denormals are kept, unlike in
// VCVTNEPS2BF16).
inline H narrow(F value) {
  const U bits = reinterpret_cast<U>(value);
  const U rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const U nan = (bits >> 16) | 0x40u;
  const I is_nan = value != value;
  return __builtin_convertvector((reinterpret_cast<U>(is_nan) & nan) | (~reinterpret_cast<U>(is_nan) & rounded), H);
}
inline bf16 narrow(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  if (value != value) return static_cast<bf16>((bits >> 16) | 0x40u);
  return static_cast<bf16>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}
inline void store(bf16* to, F value) {
  const H half = narrow(value);
  std::memcpy(to, &half, sizeof half);
}
inline void store_part(bf16* to, F value, int64_t n) {
  const H half = narrow(value);
#if defined(__AVX512F__)
  _mm256_mask_storeu_epi16(to, static_cast<__mmask16>((1u << n) - 1), reinterpret_cast<__m256i>(half));
#else
  std::memcpy(to, &half, static_cast<std::size_t>(n) * sizeof(bf16));
#endif
}
// What a value becomes when it is stored and loaded again.
inline F through_bf16(F value) { return widen(narrow(value)); }

// a * b + c. Fused where the set can; elsewhere two roundings, always.
inline F fma(F a, F b, F c) {
#if defined(__AVX512F__)
  return reinterpret_cast<F>(
      _mm512_fmadd_ps(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b), reinterpret_cast<__m512>(c)));
#elif defined(__FMA__)
  return reinterpret_cast<F>(
      _mm256_fmadd_ps(reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b), reinterpret_cast<__m256>(c)));
#else
  return a * b + c;
#endif
}

inline F select(I mask, F yes, F no) {
  return reinterpret_cast<F>((mask & reinterpret_cast<I>(yes)) | (~mask & reinterpret_cast<I>(no)));
}
// Whether any lane of a comparison's mask is set.
inline bool any(I mask) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask(reinterpret_cast<__m512i>(mask), reinterpret_cast<__m512i>(mask)) != 0;
#elif defined(__AVX2__)
  return _mm256_movemask_ps(reinterpret_cast<__m256>(mask)) != 0;
#else
  uint64_t halves[sizeof mask / sizeof(uint64_t)], all = 0;
  std::memcpy(halves, &mask, sizeof mask);
  for (const uint64_t half : halves) all |= half;
  return all != 0;
#endif
}
// The second where the two are equal or one is NaN. GCC 12 does not see one instruction in `select`.
inline F max(F a, F b) {
#if defined(__AVX512F__)
  constexpr auto kAll = static_cast<__mmask16>(0xffff);
  return reinterpret_cast<F>(_mm512_maskz_max_ps(kAll, reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b)));
#elif defined(__AVX2__)
  return reinterpret_cast<F>(_mm256_max_ps(reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b)));
#else
  return select(a > b, a, b);
#endif
}
inline F min(F a, F b) {
#if defined(__AVX512F__)
  constexpr auto kAll = static_cast<__mmask16>(0xffff);
  return reinterpret_cast<F>(_mm512_maskz_min_ps(kAll, reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b)));
#elif defined(__AVX2__)
  return reinterpret_cast<F>(_mm256_min_ps(reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b)));
#else
  return select(a < b, a, b);
#endif
}
inline F abs(F value) { return reinterpret_cast<F>(reinterpret_cast<I>(value) & 0x7fffffff); }
inline F to_float(I value) { return __builtin_convertvector(value, F); }

// Ties to even; |value| < 2^22.
inline I round_to_int(F value) {
  const F magic = set(12582912.0f);  // 1.5 * 2^23: the sum's last bit is 1
  return reinterpret_cast<I>(value + magic) - reinterpret_cast<I>(magic);
}

// All lanes, halved again and again: one order, whatever the values.
inline float sum(F value) {
  float lanes[kLanes];
  store(lanes, value);
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int lane = 0; lane < width; ++lane) lanes[lane] += lanes[lane + width];
  }
  return lanes[0];
}
inline float largest(F value) {
  float lanes[kLanes];
  store(lanes, value);
  float best = lanes[0];
  for (int lane = 1; lane < kLanes; ++lane) best = lanes[lane] > best ? lanes[lane] : best;
  return best;
}

// e^x within 2 units in the last place for |x| <= 88; 0 below -88 (so for -inf), NaN for NaN, e^88 above 88.
// 2^n times a polynomial of the rest in [-ln 2 / 2, ln 2 / 2] (coefficients: Cephes).
inline F exp(F x) {
  const F clamped = select(x > set(88.0f), set(88.0f), x);
  const F n = to_float(round_to_int(select(clamped < set(-88.0f), set(-88.0f), clamped) * set(1.44269504088896341f)));
  F r = fma(n, set(-0.693359375f), clamped);
  r = fma(n, set(2.12194440e-4f), r);
  F p = set(1.9875691500e-4f);
  p = fma(p, r, set(1.3981999507e-3f));
  p = fma(p, r, set(8.3334519073e-3f));
  p = fma(p, r, set(4.1665795894e-2f));
  p = fma(p, r, set(1.6666665459e-1f));
  p = fma(p, r, set(5.0000001201e-1f));
  p = fma(p, r * r, r + set(1.0f));
  const F scale = reinterpret_cast<F>((round_to_int(n) + 127) << 23);
  return select(clamped < set(-88.0f), F{}, p * scale);
}

inline F silu(F x) { return x / (set(1.0f) + exp(-x)); }

// acc + a.low * b.low + a.high * b.high over pairs of bf16, lane by lane.
inline F dot_pair(F acc, I a, I b) {
#if defined(__AVX512BF16__)
  return reinterpret_cast<F>(_mm512_dpbf16_ps(
      reinterpret_cast<__m512>(acc), reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b)));
#else
  const F a_low = reinterpret_cast<F>(a << 16), b_low = reinterpret_cast<F>(b << 16);
  const I upper = set(static_cast<int32_t>(0xffff0000));
  const F a_high = reinterpret_cast<F>(a & upper), b_high = reinterpret_cast<F>(b & upper);
  return fma(a_high, b_high, fma(a_low, b_low, acc));
#endif
}

// acc + the sum of four products per lane: unsigned bytes of `a` times signed bytes of `b`. Exact.
inline I dot_quad(I acc, I a, I b) {
#if defined(__AVX512VNNI__)
  return reinterpret_cast<I>(
      _mm512_dpbusd_epi32(reinterpret_cast<__m512i>(acc), reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)));
#else
  // Even and odd bytes apart, as 16-bit numbers, so that no sum of two products saturates.
  typedef int16_t S __attribute__((vector_size(4 * kLanes)));
  typedef uint16_t W __attribute__((vector_size(4 * kLanes)));
  const S a_even = reinterpret_cast<S>(reinterpret_cast<W>(a) & 0xff);
  const S a_odd = reinterpret_cast<S>(reinterpret_cast<W>(a) >> 8);
  const S b_even = reinterpret_cast<S>(reinterpret_cast<W>(b) << 8) >> 8;
  const S b_odd = reinterpret_cast<S>(b) >> 8;
#if defined(__AVX512BW__)
  const auto pairs = [](S x, S y) {
    return reinterpret_cast<I>(_mm512_madd_epi16(reinterpret_cast<__m512i>(x), reinterpret_cast<__m512i>(y)));
  };
#elif defined(__AVX2__)
  const auto pairs = [](S x, S y) {
    return reinterpret_cast<I>(_mm256_madd_epi16(reinterpret_cast<__m256i>(x), reinterpret_cast<__m256i>(y)));
  };
#elif defined(__SSE2__)
  const auto pairs = [](S x, S y) {
    return reinterpret_cast<I>(_mm_madd_epi16(reinterpret_cast<__m128i>(x), reinterpret_cast<__m128i>(y)));
  };
#else
  const auto pairs = [](S x, S y) {
    const I x_low = (reinterpret_cast<I>(x) << 16) >> 16, y_low = (reinterpret_cast<I>(y) << 16) >> 16;
    return x_low * y_low + (reinterpret_cast<I>(x) >> 16) * (reinterpret_cast<I>(y) >> 16);
  };
#endif
  return acc + pairs(a_even, b_even) + pairs(a_odd, b_odd);
#endif
}

// Runs `body(task, thread)` for every task of the pool's call.
template <class Body>
inline void parallel_for(Pool& pool, int64_t num_tasks, std::size_t scratch_bytes, const Body& body) {
  pool.run(
      num_tasks,
      [](const void* context, int64_t task, int thread) { (*static_cast<const Body*>(context))(task, thread); }, &body,
      scratch_bytes);
}

}  // namespace quire::QUIRE_ISA
