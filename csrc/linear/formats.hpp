// How the four formats multiply. A 128-byte row of a panel becomes kUnits vectors per 16-lane half (or less, by the
// set's vectors), each of which meets one 4-byte unit of the input row: a pair of bf16, or four signed bytes.
#pragma once

#include "linear/linear.hpp"
#include "simd.hpp"

namespace quire::QUIRE_ISA {

inline constexpr int kPanelVectors = static_cast<int>(kPanel) / kLanes;

struct Bf16Form {
  using Sum = F;
  static constexpr int kUnits = 1;
  static void expand(I row, I (&units)[kUnits]) { units[0] = row; }
  static F dot(F sum, I weight, I x) { return dot_pair(sum, weight, x); }
};

// Weights are stored with 128 added, so that they are the unsigned side of the product; 128 times the sum of the row's
// values comes off at the end.
struct Int8Form {
  using Sum = I;
  static constexpr int kUnits = 1;
  static void expand(I row, I (&units)[kUnits]) { units[0] = row; }
  static I dot(I sum, I weight, I x) { return dot_quad(sum, weight, x); }
};

struct Int4Form {
  using Sum = I;
  static constexpr int kUnits = 2;
  static void expand(I row, I (&units)[kUnits]) {
    units[0] = row & 0x0f0f0f0f;
    units[1] = (row >> 4) & 0x0f0f0f0f;
  }
  static I dot(I sum, I weight, I x) { return dot_quad(sum, weight, x); }
};

// The bf16 pair of two e4m3 bytes, one in each half of a lane: exact, with subnormals and NaN.
#if defined(__AVX512BW__)
// Upper and lower byte of each bf16, by table from the nibbles: 64 values at once.
inline void widen_e4m3(I row, I (&pairs)[2]) {
  typedef uint16_t W __attribute__((vector_size(64)));
  typedef int64_t L __attribute__((vector_size(64)));
  const auto table = [](int64_t low, int64_t high) {
    return reinterpret_cast<__m512i>(L{low, high, low, high, low, high, low, high});
  };
  // Exponents move from bias 7 to 127: (e + 120) >> 1 and the sign above, the exponent's last bit and mantissa below.
  const __m512i upper_of = table(0x434241403f3e3d3c, 0x434241403f3e3d3c);
  // Subnormals: 0..7 times 2^-9.
  const __m512i tiny_upper_of = table(0x3c3c3c3c3b3b3b00, 0);
  const __m512i tiny_lower_of = table(0x60402000c0800000, 0);
  const W bytes = reinterpret_cast<W>(row);
  const __m512i magnitude = reinterpret_cast<__m512i>(bytes & 0x7f7f);
  const __mmask64 tiny = _mm512_cmplt_epu8_mask(magnitude, _mm512_set1_epi8(8));
  const __mmask64 nan = _mm512_cmpeq_epi8_mask(magnitude, _mm512_set1_epi8(0x7f));
  __m512i upper = _mm512_shuffle_epi8(upper_of, reinterpret_cast<__m512i>((bytes >> 4) & 0x0f0f));
  __m512i lower = reinterpret_cast<__m512i>((bytes << 4) & 0xf0f0);
  upper = _mm512_mask_shuffle_epi8(upper, tiny, tiny_upper_of, magnitude);
  lower = _mm512_mask_shuffle_epi8(lower, tiny, tiny_lower_of, magnitude);
  upper = _mm512_mask_mov_epi8(upper, nan, magnitude);
  const W above = reinterpret_cast<W>(upper) | (bytes & 0x8080), below = reinterpret_cast<W>(lower);
  pairs[0] = reinterpret_cast<I>((above << 8) | (below & 0x00ff));
  pairs[1] = reinterpret_cast<I>((above & 0xff00) | (below >> 8));
}
#else
// The bits of the float that a byte (in the lane's lowest bits) stands for.
inline I widen_e4m3(I byte) {
  const I magnitude = byte & 0x7f;
  const F tiny = to_float(magnitude) * set(0x1p-9f);
  const I is_tiny = magnitude < 8;
  const I usual = (magnitude << 20) + (120 << 23);
  const I wide = (is_tiny & reinterpret_cast<I>(tiny)) | (~is_tiny & usual);
  const I is_nan = magnitude == 0x7f;
  return wide | (is_nan & 0x7fc00000) | ((byte & 0x80) << 24);
}
inline void widen_e4m3(I row, I (&pairs)[2]) {
  const I upper = set(static_cast<int32_t>(0xffff0000));
  const auto pair = [&](I low, I high) {
    return ((widen_e4m3(low & 0xff) >> 16) & 0xffff) | (widen_e4m3(high & 0xff) & upper);
  };
  pairs[0] = pair(row, row >> 16);
  pairs[1] = pair(row >> 8, row >> 24);
}
#endif

struct Fp8Form {
  using Sum = F;
  static constexpr int kUnits = 2;
  static void expand(I row, I (&units)[kUnits]) { widen_e4m3(row, units); }
  static F dot(F sum, I weight, I x) { return dot_pair(sum, weight, x); }
};

}  // namespace quire::QUIRE_ISA
