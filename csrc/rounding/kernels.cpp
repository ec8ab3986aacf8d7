// A task is a run of rows; a row (or a group of it) is read twice, the second time from the cache: once for its scale,
// once for its values. The matrix is read, and the result written, at the speed of memory.
#include "rounding/rounding.hpp"

#include "simd.hpp"

namespace quire::QUIRE_ISA {
namespace {

constexpr int64_t kTaskElements = 1 << 16;

template <class Body>
void for_rows(Pool& pool, int64_t n, int64_t k, const Body& body) {
  const int64_t rows = kTaskElements / (k + 1) + 1;
  parallel_for(pool, (n + rows - 1) / rows, 0, [&](int64_t task, int) {
    const int64_t begin = task * rows, end = begin + rows < n ? begin + rows : n;
    for (int64_t row = begin; row < end; ++row) body(row);
  });
}

// Not a number if one of them is not.
float largest_magnitude(const bf16* x, int64_t k) {
  F best{}, poison{};
  int64_t i = 0;
  const auto look = [&](F value) {
    best = max(best, abs(value));
    poison += value * set(0.0f);
  };
  for (; i + kLanes <= k; i += kLanes) look(load(x + i));
  if (i < k) look(load_part(x + i, k - i));
  return largest(best) + sum(poison);
}

float round_scale(float scale) { return widen(narrow(scale)); }

float inverse(float scale) { return scale == 0.0f ? 0.0f : 1.0f / scale; }

F clamp(F value, float low, float high) { return min(max(value, set(low)), set(high)); }

void int8(Pool& pool, const bf16* weight_nk, int64_t n, int64_t k, int8_t* values_nk, float* scale_n) {
  for_rows(pool, n, k, [=](int64_t row) {
    const bf16* x = weight_nk + row * k;
    int8_t* values = values_nk + row * k;
    scale_n[row] = round_scale(largest_magnitude(x, k) / 127.0f);
    const float factor = inverse(scale_n[row]);
    int64_t i = 0;
    typedef int8_t B __attribute__((vector_size(kLanes)));
    for (; i + kLanes <= k; i += kLanes) {
      const B bytes = __builtin_convertvector(round_to_int(clamp(load(x + i) * set(factor), -127, 127)), B);
      std::memcpy(values + i, &bytes, sizeof bytes);
    }
    for (; i < k; ++i) {
      int32_t lanes[kLanes];
      store(lanes, round_to_int(clamp(set(widen(x[i])) * set(factor), -127, 127)));
      values[i] = static_cast<int8_t>(lanes[0]);
    }
  });
}

// A float within e4m3's range to its nearest e4m3, ties to even: normal numbers by rounding the mantissa's bits away,
// smaller ones by adding a number whose last bit is e4m3's smallest.
U to_e4m3(F value) {
  const U bits = reinterpret_cast<U>(value);
  const U sign = (bits >> 24) & 0x80u;
  const U magnitude = bits & 0x7fffffffu;
  const U normal = ((magnitude + 0x7ffffu + ((magnitude >> 20) & 1u)) >> 20) - (120u << 3);
  const F shifted = reinterpret_cast<F>(magnitude) + set(16384.0f);  // 2^-9 is the last bit of 2^14
  const U small = reinterpret_cast<U>(shifted) - 0x46800000u;
  const U is_small = magnitude < (121u << 23);  // 2^-6, the smallest normal
  return sign | (is_small & small) | (~is_small & normal);
}

void fp8(Pool& pool, const bf16* weight_nk, int64_t n, int64_t k, uint8_t* values_nk, float* scale_n) {
  for_rows(pool, n, k, [=](int64_t row) {
    const bf16* x = weight_nk + row * k;
    scale_n[row] = round_scale(largest_magnitude(x, k) / 448.0f);
    const float factor = inverse(scale_n[row]);
    for (int64_t i = 0; i < k; i += kLanes) {
      const int64_t count = k - i < kLanes ? k - i : kLanes;
      uint32_t lanes[kLanes];
      const U bytes = to_e4m3(clamp(load_part(x + i, count) * set(factor), -448, 448));
      std::memcpy(lanes, &bytes, sizeof bytes);
      for (int64_t lane = 0; lane < count; ++lane) values_nk[row * k + i + lane] = static_cast<uint8_t>(lanes[lane]);
    }
  });
}

// The value of the largest magnitude goes to the end of the range that reaches further, -8: the scale has its sign. A
// quarter of a step beyond it, as the definition says.
float wanted_scale(const bf16* x, int64_t size) {
  F low = load(x), high = low, poison{};
  for (int64_t i = 0; i < size; i += kLanes) {
    const F value = load(x + i);
    low = min(low, value);
    high = max(high, value);
    poison += value * set(0.0f);
  }
  const float lowest = -largest(-low), highest = largest(high);
  return (highest > -lowest ? highest : lowest) / -8.25f + sum(poison);
}

// The multiples of one step that are nearest to the scales of a span's groups, as the definition says.
void round_scales(float* scale, int64_t count) {
  float largest = 0, poison = 0;
  for (int64_t group = 0; group < count; ++group) {
    const float magnitude = __builtin_fabsf(scale[group]);
    largest = magnitude > largest ? magnitude : largest;
    poison += scale[group] * 0.0f;
  }
  largest += poison;
  const float least = largest / 15.0f;
  uint32_t bits;
  std::memcpy(&bits, &least, sizeof bits);
  bits = (bits + 0xfffffu) & ~0xfffffu;
  float step;
  std::memcpy(&step, &bits, sizeof step);
  const float factor = inverse(step);
  for (int64_t group = 0; group < count; ++group) {
    const float multiple = __builtin_floorf(__builtin_fabsf(scale[group]) * factor + 0.625f);
    const float sign = scale[group] > 0.0f ? 1.0f : scale[group] < 0.0f ? -1.0f : 0.0f;
    scale[group] = (multiple < 1.0f ? 1.0f : multiple) * sign * step;
  }
}

void int4_values(const bf16* x, int64_t size, float scale, uint8_t* nibbles) {
  typedef uint64_t Q __attribute__((vector_size(4 * kLanes)));  // two neighbours, the lower index in the lower half
  typedef uint8_t B __attribute__((vector_size(kLanes / 2)));
  const F factor = set(inverse(scale));
  for (int64_t i = 0; i < size; i += kLanes) {
    const Q pairs = reinterpret_cast<Q>(round_to_int(clamp(load(x + i) * factor, -8, 7)) + 8);
    const B bytes = __builtin_convertvector(pairs | (pairs >> 28), B);
    std::memcpy(nibbles + i / 2, &bytes, sizeof bytes);
  }
}

void int4(Pool& pool, const bf16* weight_nk, int64_t n, int64_t k, int64_t group_size, int64_t span,
          uint8_t* nibbles_nk2, float* scale_ng) {
  const int64_t groups = k / group_size, per_span = span / group_size;
  for_rows(pool, n, k, [=](int64_t row) {
    float* const scale = scale_ng + row * groups;
    for (int64_t group = 0; group < groups; ++group) {
      scale[group] = wanted_scale(weight_nk + row * k + group * group_size, group_size);
      if (span == 0) scale[group] = round_scale(scale[group]);
    }
    for (int64_t group = 0; span > 0 && group < groups; group += per_span) round_scales(scale + group, per_span);
    for (int64_t group = 0; group < groups; ++group) {
      const int64_t first = row * k + group * group_size;
      int4_values(weight_nk + first, group_size, scale[group], nibbles_nk2 + first / 2);
    }
  });
}

}  // namespace

extern const RoundingKernels rounding_kernels;
const RoundingKernels rounding_kernels = {int8, fp8, int4};

}  // namespace quire::QUIRE_ISA
