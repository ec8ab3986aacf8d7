// Packing: a plain weight, row after row, becomes panels of 32 rows that are read in step. Seen as 32-bit units (a pair
// of bf16, four bytes, eight nibbles) this is a transposition of [32][units] to [units][32], 16 units of each row at a
// time, so that both sides stay in the first-level cache. Panels are shared among the threads; the source is read once.
#pragma once

#include "linear/linear.hpp"
#include "simd.hpp"

namespace quire::QUIRE_ISA {

// `convert` turns four bytes as they lie in the source into four bytes of the panel; zeros pad source rows.
template <class Convert>
inline void pack_panel(const std::byte* rows, int64_t num_rows, int64_t row_bytes, std::byte* panel,
                       int64_t num_units, const Convert& convert) {
  constexpr int64_t kBlock = 16;
  for (int64_t first = 0; first < num_units; first += kBlock) {
    const int64_t present = row_bytes - first * 4;
    for (int64_t row = 0; row < kPanel; ++row) {
      uint32_t units[kBlock] = {};
      if (row < num_rows && present > 0) {
        const std::size_t bytes = present < 4 * kBlock ? static_cast<std::size_t>(present) : sizeof units;
        std::memcpy(units, rows + row * row_bytes + first * 4, bytes);
      }
      std::byte* to = panel + (first * kPanel + row) * 4;
      const int64_t count = num_units - first < kBlock ? num_units - first : kBlock;
      for (int64_t unit = 0; unit < count; ++unit) {
        const uint32_t value = convert(units[unit]);
        std::memcpy(to + unit * kPanel * 4, &value, sizeof value);
      }
    }
  }
}

// `row_bytes` of the source stand for k features; a panel's row has `padded_bytes` of them.
template <class Convert>
inline void pack_panels(Pool& pool, const void* from, int64_t row_bytes, int64_t padded_bytes, PackedWeight& packed,
                        const Convert& convert) {
  const auto* rows = static_cast<const std::byte*>(from);
  const auto body = [&](int64_t panel, int) {
    const int64_t first = panel * kPanel;
    const int64_t num_rows = packed.n - first < kPanel ? packed.n - first : kPanel;
    pack_panel(rows + first * row_bytes, num_rows, row_bytes, packed.data + first * padded_bytes, padded_bytes / 4,
               convert);
  };
  parallel_for(pool, packed.padded_n / kPanel, 0, body);
}

inline void pack_scales(const float* scale_n, PackedWeight& packed) {
  std::memset(packed.scale, 0, static_cast<std::size_t>(packed.padded_n) * sizeof(float));
  std::memcpy(packed.scale, scale_n, static_cast<std::size_t>(packed.n) * sizeof(float));
}

inline void pack_bf16(Pool& pool, const uint16_t* weight_nk, PackedWeight& packed) {
  pack_panels(pool, weight_nk, packed.k * 2, packed.padded_k * 2, packed, [](uint32_t unit) { return unit; });
}

inline void pack_int8(Pool& pool, const int8_t* values_nk, const float* scale_n, PackedWeight& packed) {
  pack_panels(pool, values_nk, packed.k, packed.padded_k, packed, [](uint32_t unit) { return unit ^ 0x80808080u; });
  pack_scales(scale_n, packed);
}

inline void pack_fp8(Pool& pool, const uint8_t* values_nk, const float* scale_n, PackedWeight& packed) {
  const auto swap_middle = [](uint32_t unit) {
    return (unit & 0xff0000ffu) | ((unit & 0x0000ff00u) << 8) | ((unit & 0x00ff0000u) >> 8);
  };
  pack_panels(pool, values_nk, packed.k, packed.padded_k, packed, swap_middle);
  pack_scales(scale_n, packed);
}

inline void pack_int4(Pool& pool, const uint8_t* nibbles_nk2, const float* scale_ng, const uint8_t* zero_ng,
                      const int8_t* multiplier_ns, PackedWeight& packed) {
  // Four nibbles to the lower halves of four bytes.
  const auto spread = [](uint32_t nibbles) {
    nibbles = (nibbles | (nibbles << 8)) & 0x00ff00ffu;
    return (nibbles | (nibbles << 4)) & 0x0f0f0f0fu;
  };
  pack_panels(pool, nibbles_nk2, packed.k / 2, packed.padded_k / 2, packed,
              [&](uint32_t unit) { return spread(unit & 0xffffu) | (spread(unit >> 16) << 4); });
  const auto place = [](int64_t row, int64_t group, int64_t groups) {
    return (row / kPanel * groups + group) * kPanel + row % kPanel;
  };
  const int64_t groups = packed.k / packed.group_size, subs = packed.k / packed.sub_size;
  for (int64_t row = 0; row < packed.padded_n; ++row) {
    for (int64_t group = 0; group < groups; ++group) {
      const int64_t to = place(row, group, groups);
      const bool real = row < packed.n;
      const float scale = real ? scale_ng[row * groups + group] : 0.0f;
      if (packed.narrow_scale != nullptr) packed.narrow_scale[to] = narrow(scale);
      if (packed.scale != nullptr) packed.scale[to] = scale;
      if (packed.zero_scale == nullptr) continue;
      packed.zero_scale[to] = real ? scale * static_cast<float>(zero_ng[row * groups + group]) : 0.0f;
    }
    for (int64_t sub = 0; packed.multiplier != nullptr && sub < subs; ++sub) {
      packed.multiplier[place(row, sub, subs)] = row < packed.n ? multiplier_ns[row * subs + sub] : int8_t{0};
    }
  }
}

}  // namespace quire::QUIRE_ISA
