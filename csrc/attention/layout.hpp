// One block of one head: where a token's numbers lie, how they are stored, and how a stretch of them is read back.
//
// In 8 bits a stretch of w pairs (w = 16, or the rest) is stored as w lower and then w upper values, rather than pair by
// pair: widened, the two halves are one shift and one mask away from w pairs of bf16. A token's values share one
// float32 scale per head; the scales follow the values.
#pragma once

#include "attention/attention.hpp"
#include "simd.hpp"

namespace quire::QUIRE_ISA {

inline constexpr int64_t kRun = 16;  // pairs in a stretch

inline int64_t at_most(int64_t value, int64_t limit) { return value < limit ? value : limit; }
inline int64_t round_up(int64_t value, int64_t to) { return (value + to - 1) / to * to; }

// A block as the functions here see it. `d` is even: an odd head gets a dimension of zeros.
struct BlockLayout {
  explicit BlockLayout(const KvLayer& layer)
      : s(layer.block_size), d(round_up(layer.head_dim, 2)), format(layer.format),
        bytes(kv_block_bytes(layer.format, layer.block_size, layer.head_dim)) {}

  int64_t element_bytes() const { return format == KvFormat::bf16 ? 2 : 1; }
  // Of token `at`'s dimension j, in elements from the block's start.
  int64_t key(int64_t at, int64_t j) const { return (j / 2) * 2 * s + in_row(at, j % 2, s); }
  int64_t value(int64_t at, int64_t j) const { return (at / 2) * 2 * d + in_row(j, at % 2, d); }
  const float* scales(const std::byte* block) const { return reinterpret_cast<const float*>(block + s * d); }
  float* scales(std::byte* block) const { return reinterpret_cast<float*>(block + s * d); }

  int64_t s, d;
  KvFormat format;
  int64_t bytes;

 private:
  // Element `half` of pair `index`, in a row of `length` pairs.
  int64_t in_row(int64_t index, int64_t half, int64_t length) const {
    if (format == KvFormat::bf16) return 2 * index + half;
    const int64_t run = index / kRun;
    return run * 2 * kRun + half * at_most(length - run * kRun, kRun) + index % kRun;
  }
};

// Largest magnitude that a format stores; a token's scale is its largest value's share of that.
inline float largest_stored(KvFormat format) { return format == KvFormat::int8 ? 127.0f : 448.0f; }

// e4m3 without subnormals: an exponent of 0 means 2^-7 like any other, and only code 0 is zero.
inline I to_fp8(F value) {
  const I bits = reinterpret_cast<I>(value);
  const I sign = (bits >> 24) & 0x80, magnitude = bits & 0x7fffffff;
  const I above = ((magnitude + 0x7ffff + ((magnitude >> 20) & 1)) >> 20) - (120 << 3);
  return sign | (above & (above > 0));
}

// GCC 12 takes __builtin_convertvector of bytes apart, lane by lane.
inline I signed_bytes(const std::byte* from) {
#if defined(__AVX512F__)
  return reinterpret_cast<I>(_mm512_maskz_cvtepi8_epi32(
      static_cast<__mmask16>(0xffff), _mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
#elif defined(__AVX2__)
  return reinterpret_cast<I>(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))));
#else
  I values;
  for (int lane = 0; lane < kLanes; ++lane) values[lane] = static_cast<int8_t>(from[lane]);
  return values;
#endif
}

// Floats of kLanes stored bytes, exact in bf16.
template <KvFormat kFormat>
inline F from_8_bits(const std::byte* from) {
  const I codes = signed_bytes(from);
  if constexpr (kFormat == KvFormat::int8) return to_float(codes);
  const I magnitude = codes & 0x7f;
  const I bits = ((magnitude << 20) + (120 << 23)) & (magnitude != 0);
  return reinterpret_cast<F>(bits | (codes & static_cast<int32_t>(0x80000000)));
}

// `count` pairs of a row, from the start of a stretch, as bf16 pairs.
template <KvFormat kFormat>
inline void expand_pairs(const std::byte* lower_from, const std::byte* upper_from, bf16* to) {
  const U lower = reinterpret_cast<U>(from_8_bits<kFormat>(lower_from));
  const U upper = reinterpret_cast<U>(from_8_bits<kFormat>(upper_from));
  const U pairs = (lower >> 16) | (upper & 0xffff0000u);
  std::memcpy(to, &pairs, sizeof pairs);
}

template <KvFormat kFormat>
inline void expand_run(const std::byte* from, int64_t count, bf16* to) {
  int64_t done = 0;
  for (; done + kLanes <= count; done += kLanes) {
    expand_pairs<kFormat>(from + done, from + count + done, to + 2 * done);
  }
  if (done == count) return;
  std::byte halves[2 * kLanes] = {};
  bf16 pairs[2 * kLanes];
  std::memcpy(halves, from + done, static_cast<std::size_t>(count - done));
  std::memcpy(halves + kLanes, from + count + done, static_cast<std::size_t>(count - done));
  expand_pairs<kFormat>(halves, halves + kLanes, pairs);
  std::memcpy(to + 2 * done, pairs, static_cast<std::size_t>(count - done) * 2 * sizeof(bf16));
}

// A row of `length` pairs, whole.
template <KvFormat kFormat>
inline void expand_row(const std::byte* from, int64_t length, bf16* to) {
  const int64_t whole = length / kRun * kRun;
  for (int64_t run = 0; run < whole; run += kRun) {
    for (int64_t at = 0; at < kRun; at += kLanes) {
      expand_pairs<kFormat>(from + 2 * run + at, from + 2 * run + kRun + at, to + 2 * (run + at));
    }
  }
  if (whole < length) expand_run<kFormat>(from + 2 * whole, length - whole, to + 2 * whole);
}

}  // namespace quire::QUIRE_ISA
