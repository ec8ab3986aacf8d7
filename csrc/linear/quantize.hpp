// A row of activations in 8 bits, bit for bit as `ops.linear.quantize_rows` defines it. Shared by the linear kernels
// and by the norms, whose output is quantised while it is in cache.
#pragma once

#include <cstdint>
#include <cstring>

#include "simd.hpp"

namespace quire::QUIRE_ISA {

// Groups of a row: one of all features where `group_size` is k (int8 weights), else padded_k / group_size.
inline int64_t num_groups(int64_t k, int64_t padded_k, int64_t group_size) {
  return group_size >= k ? 1 : padded_k / group_size;
}

// Largest magnitude of `n` numbers; NaN if there is one. Bits of floats without sign are ordered like their values, and
// those of NaN lie above.
inline float largest_magnitude(const bf16* x, int64_t n) {
  I best{};
  const auto look = [&](F value) {
    const I bits = reinterpret_cast<I>(abs(value));
    const I larger = bits > best;
    best = (larger & bits) | (~larger & best);
  };
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) look(load(x + i));
  if (i < n) look(load_part(x + i, n - i));
  int32_t lanes[kLanes], most = 0;
  store(lanes, best);
  for (const int32_t lane : lanes) most = lane > most ? lane : most;
  float value;
  std::memcpy(&value, &most, sizeof value);
  return value;
}

// Rounded to even, within -127..127; NaN becomes 0.
inline I quantize_vector(F value, F inverse) {
  const F scaled = value * inverse;
  const I rounded = round_to_int(min(max(scaled, set(-127.0f)), set(127.0f)));
  return rounded & (scaled == scaled);
}

// `n` numbers in 8 bits, and their sum.
inline int32_t quantize_run(const bf16* x, int64_t n, F inverse, int8_t* values) {
  typedef int8_t B __attribute__((vector_size(kLanes)));
  I total{};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const I rounded = quantize_vector(load(x + i), inverse);
    total += rounded;
    const B bytes = __builtin_convertvector(rounded, B);
    std::memcpy(values + i, &bytes, sizeof bytes);
  }
  if (i < n) {
    const I rounded = quantize_vector(load_part(x + i, n - i), inverse);
    total += rounded;
    const B bytes = __builtin_convertvector(rounded, B);
    std::memcpy(values + i, &bytes, static_cast<std::size_t>(n - i));
  }
  int32_t lanes[kLanes], all = 0;
  store(lanes, total);
  for (const int32_t lane : lanes) all += lane;
  return all;
}

// `values` has room for padded_k bytes, `scale` for `num_groups` entries, `sum` for as many for each `sub_size` of a
// group; what lies beyond k becomes zero.
inline void quantize_row(const bf16* x_k, int64_t k, int64_t padded_k, int64_t group_size, int64_t sub_size,
                         int8_t* values, float* scale, int32_t* sum) {
  const int64_t groups = num_groups(k, padded_k, group_size);
  for (int64_t group = 0; group < groups; ++group) {
    const int64_t begin = group * group_size;
    const int64_t left = k - begin, n = left < 0 ? 0 : left < group_size ? left : group_size;
    const float most = largest_magnitude(x_k + begin, n);
    const F inverse = set(most > 0 ? 1.0f / most * 127.0f : 0.0f);  // as torch divides a number by a tensor
    for (int64_t sub = 0; sub < group_size; sub += sub_size) {
      const int64_t first = begin + sub, rest = n - sub, count = rest < 0 ? 0 : rest < sub_size ? rest : sub_size;
      *sum++ = quantize_run(x_k + first, count, inverse, values + first);
    }
    scale[group] = most * static_cast<float>(1.0 / 127.0);
  }
  if (padded_k > k) std::memset(values + k, 0, static_cast<std::size_t>(padded_k - k));
}

}  // namespace quire::QUIRE_ISA
