// New tokens' keys and values on their way into the cache. A task is one head of some neighbouring tokens.
#pragma once

#include <limits>

#include "attention/layout.hpp"

namespace quire::QUIRE_ISA {

inline constexpr int64_t kTokensPerWrite = 64;

// `place(j)`: where dimension j goes, in elements. With `finite`, what is not finite becomes zero.
template <class Place>
inline void write_row(const uint16_t* x, int64_t head_dim, const BlockLayout& layout, int64_t at, bool finite,
                      std::byte* block, const Place& place) {
  constexpr uint16_t kExponent = 0x7f80;
  const auto stored = [&](int64_t j) -> bf16 {
    return j == head_dim || (finite && (x[j] & kExponent) == kExponent) ? bf16{0} : x[j];
  };
  if (layout.format == KvFormat::bf16) {
    auto* to = reinterpret_cast<bf16*>(block);
    for (int64_t j = 0; j < layout.d; ++j) to[place(j)] = stored(j);
    return;
  }
  float largest = 0.0f;
  for (int64_t j = 0; j < head_dim; ++j) {
    const float magnitude = std::fabs(widen(stored(j)));
    largest = magnitude <= largest ? largest : magnitude;  // NaN stays, unless a number follows
    if (magnitude != magnitude) {
      largest = magnitude;
      break;
    }
  }
  // A key that is not finite makes its scores NaN, and its request fails, as it would with a wider cache.
  const bool sound = largest <= std::numeric_limits<float>::max();
  const float most = largest_stored(layout.format);
  const float inverse = sound && largest > 0.0f ? most / largest : 0.0f;
  auto* scales = const_cast<float*>(layout.scales(block));
  scales[at] = sound ? largest / most : std::numeric_limits<float>::quiet_NaN();
  auto* to = reinterpret_cast<uint8_t*>(block);
  for (int64_t j = 0; j < layout.d; ++j) {
    const float value = sound ? widen(stored(j)) * inverse : 0.0f;
    to[place(j)] = layout.format == KvFormat::int8 ? to_int8(value) : to_fp8(value);
  }
}

inline void write_kv(Pool& pool, const KvLayer& kv, const uint16_t* k, int64_t k_stride, const uint16_t* v,
                     int64_t v_stride, const int64_t* slots, int64_t t) {
  const BlockLayout layout(kv);
  const int64_t num_chunks = (t + kTokensPerWrite - 1) / kTokensPerWrite;
  const int64_t d = kv.head_dim;
  const auto write_chunk = [&](int64_t head, int64_t chunk) {
    for (int64_t token = chunk * kTokensPerWrite; token < at_most(t, (chunk + 1) * kTokensPerWrite); ++token) {
      const int64_t block = slots[token] / layout.s, at = slots[token] % layout.s;
      if (block == 0) continue;  // nobody's; several tokens of a step may name the same slot of it
      const int64_t offset = (head * kv.num_blocks + block) * layout.bytes;
      write_row(k + token * k_stride + head * d, d, layout, at, false, kv.keys + offset,
                [&](int64_t j) { return layout.key(at, j); });
      write_row(v + token * v_stride + head * d, d, layout, at, true, kv.values + offset,
                [&](int64_t j) { return layout.value(at, j); });
    }
  };
  if (t <= 2) {  // less work than waking a thread
    parallel_for(pool, 1, 0, [&](int64_t, int) {
      for (int64_t head = 0; head < kv.num_heads; ++head) write_chunk(head, 0);
    });
    return;
  }
  parallel_for(pool, kv.num_heads * num_chunks, 0,
               [&](int64_t task, int) { write_chunk(task % kv.num_heads, task / kv.num_heads); });
}

}  // namespace quire::QUIRE_ISA
