// One block of one head: where a token's numbers lie, how they are stored, and how a stretch of them is read back.
//
// In 8 bits a stretch of w pairs (w = 16, or the rest) is stored as w lower and then w upper values, rather than pair by
// pair: widened, the two halves are one shift and one mask away from w pairs of bf16. A token's values share one
// float32 scale per head; the scales follow the values.
#pragma once

#include <cmath>

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
inline uint8_t to_fp8(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const uint32_t sign = (bits >> 24) & 0x80u, magnitude = bits & 0x7fffffffu;
  const uint32_t rounded = (magnitude + 0x7ffffu + ((magnitude >> 20) & 1u)) >> 20;
  constexpr uint32_t kExponent = 120u << 3;
  return static_cast<uint8_t>(sign | (rounded > kExponent ? rounded - kExponent : 0u));
}
inline uint8_t to_int8(float value) {
  return static_cast<uint8_t>(static_cast<int8_t>(std::nearbyint(value)));  // ties to even
}

// Floats of kLanes stored bytes, exact in bf16.
inline F from_8_bits(const std::byte* from, KvFormat format) {
  typedef int8_t B __attribute__((vector_size(kLanes)));
  B bytes;
  std::memcpy(&bytes, from, sizeof bytes);
  const I codes = __builtin_convertvector(bytes, I);
  if (format == KvFormat::int8) return to_float(codes);
  const I magnitude = codes & 0x7f;
  const I bits = ((magnitude << 20) + (120 << 23)) & (magnitude != 0);
  return reinterpret_cast<F>(bits | (codes & static_cast<int32_t>(0x80000000)));
}

// `count` pairs of a row, from the start of a stretch, as bf16 pairs.
inline void expand_run(const std::byte* from, int64_t count, KvFormat format, bf16* to) {
  int64_t done = 0;
  for (; done + kLanes <= count; done += kLanes) {
    const I lower = reinterpret_cast<I>(from_8_bits(from + done, format));
    const I upper = reinterpret_cast<I>(from_8_bits(from + count + done, format));
    const U pairs = (reinterpret_cast<U>(lower) >> 16) | (reinterpret_cast<U>(upper) & 0xffff0000u);
    std::memcpy(to + 2 * done, &pairs, sizeof pairs);
  }
  if (done == count) return;
  std::byte halves[2 * kLanes] = {};
  bf16 pairs[2 * kLanes];
  std::memcpy(halves, from + done, static_cast<std::size_t>(count - done));
  std::memcpy(halves + kLanes, from + count + done, static_cast<std::size_t>(count - done));
  const U lower = reinterpret_cast<U>(from_8_bits(halves, format));
  const U upper = reinterpret_cast<U>(from_8_bits(halves + kLanes, format));
  const U words = (lower >> 16) | (upper & 0xffff0000u);
  std::memcpy(pairs, &words, sizeof pairs);
  std::memcpy(to + 2 * done, pairs, static_cast<std::size_t>(count - done) * 2 * sizeof(bf16));
}

// A row of `length` pairs, whole.
inline void expand_row(const std::byte* from, int64_t length, KvFormat format, bf16* to) {
  for (int64_t done = 0; done < length; done += kRun) {
    expand_run(from + 2 * done, at_most(length - done, kRun), format, to + 2 * done);
  }
}

}  // namespace quire::QUIRE_ISA
