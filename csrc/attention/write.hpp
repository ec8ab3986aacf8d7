// New tokens' keys and values on their way into the cache. A task is one head of some neighbouring tokens.
#pragma once

#include <limits>

#include "attention/layout.hpp"

namespace quire::QUIRE_ISA {

inline constexpr int64_t kTokensPerWrite = 64;

// kLanes of a row, `n` of them there; what is not finite becomes zero if that is asked for.
inline F load_row(const uint16_t* x, int64_t n, bool finite) {
  const F value = n >= kLanes ? load(x) : load_part(x, n);
  if (!finite) return value;
  constexpr int32_t kExponent = 0x7f800000;
  return select((reinterpret_cast<I>(value) & kExponent) == kExponent, F{}, value);
}

// The largest magnitude of a row. Infinite if some number is, NaN if some number is none.
inline float row_magnitude(const uint16_t* x, int64_t head_dim, bool finite) {
  F most{};
  for (int64_t j = 0; j < head_dim; j += kLanes) {
    const F magnitude = abs(load_row(x + j, head_dim - j, finite));
    most = select(most >= magnitude, most, select(most == most, magnitude, most));
  }
  float lanes[kLanes], result = 0.0f;
  store(lanes, most);
  for (const float lane : lanes) result = lane != lane || lane > result ? lane : result;
  for (const float lane : lanes) result = lane != lane ? lane : result;
  return result;
}

// A row in 8 bits, padded to `d`. Returns its scale. A key that is not finite makes its scores NaN, and its request
// fails, as it would with a wider cache.
inline float quantize_row(const uint16_t* x, int64_t head_dim, int64_t d, KvFormat format, bool finite, uint8_t* codes) {
  const float magnitude = row_magnitude(x, head_dim, finite), most = largest_stored(format);
  const bool sound = magnitude <= std::numeric_limits<float>::max();
  const float inverse = sound && magnitude > 0.0f ? most / magnitude : 0.0f;
  for (int64_t j = 0; j < d; j += kLanes) {
    const F value = sound && j < head_dim ? load_row(x + j, head_dim - j, finite) * set(inverse) : F{};
    int32_t lanes[kLanes];
    store(lanes, format == KvFormat::int8 ? round_to_int(value) : to_fp8(value));
    for (int64_t lane = 0; lane < at_most(d - j, kLanes); ++lane) codes[j + lane] = static_cast<uint8_t>(lanes[lane]);
  }
  return sound ? magnitude / most : std::numeric_limits<float>::quiet_NaN();
}

inline void write_key(const BlockLayout& layout, const uint16_t* k, int64_t head_dim, int64_t at, uint8_t* codes,
                      std::byte* block) {
  if (layout.format == KvFormat::bf16) {
    std::byte* to = block + layout.key(at, 0) * 2;
    for (int64_t p = 0; p < head_dim / 2; ++p) std::memcpy(to + p * 4 * layout.s, k + 2 * p, 4);
    if (head_dim % 2 != 0) {
      const bf16 last[2] = {k[head_dim - 1], 0};
      std::memcpy(to + head_dim / 2 * 4 * layout.s, last, 4);
    }
    return;
  }
  layout.scales(block)[at] = quantize_row(k, head_dim, layout.d, layout.format, false, codes);
  for (int64_t half = 0; half < 2; ++half) {
    auto* to = reinterpret_cast<uint8_t*>(block) + layout.key(at, half);
    for (int64_t p = 0; p < layout.d / 2; ++p) to[p * 2 * layout.s] = codes[2 * p + half];
  }
}

inline void write_value(const BlockLayout& layout, const uint16_t* v, int64_t head_dim, int64_t at, uint8_t* codes,
                        std::byte* block) {
  if (layout.format == KvFormat::bf16) {
    constexpr uint16_t kExponent = 0x7f80;
    auto* to = reinterpret_cast<bf16*>(block) + layout.value(at, 0);
    for (int64_t j = 0; j < head_dim; ++j) to[2 * j] = (v[j] & kExponent) == kExponent ? bf16{0} : v[j];
    if (layout.d > head_dim) to[2 * head_dim] = 0;
    return;
  }
  layout.scales(block)[at] = quantize_row(v, head_dim, layout.d, layout.format, true, codes);
  auto* to = reinterpret_cast<uint8_t*>(block);
  for (int64_t j = 0; j < layout.d; j += kRun) {
    std::memcpy(to + layout.value(at, j), codes + j, static_cast<std::size_t>(at_most(layout.d - j, kRun)));
  }
}

inline void write_kv(Pool& pool, const KvLayer& kv, const uint16_t* k, int64_t k_stride, const uint16_t* v,
                     int64_t v_stride, const int64_t* slots, int64_t t) {
  const BlockLayout layout(kv);
  const int64_t num_chunks = (t + kTokensPerWrite - 1) / kTokensPerWrite, d = kv.head_dim;
  const auto write_chunk = [&](int64_t head, int64_t chunk, int thread) {
    auto* codes = reinterpret_cast<uint8_t*>(pool.scratch(thread));
    for (int64_t token = chunk * kTokensPerWrite; token < at_most(t, (chunk + 1) * kTokensPerWrite); ++token) {
      const int64_t block = slots[token] / layout.s, at = slots[token] % layout.s;
      if (block == 0) continue;  // nobody's; several tokens of a step may name the same slot of it
      const int64_t offset = (head * kv.num_blocks + block) * layout.bytes;
      write_key(layout, k + token * k_stride + head * d, d, at, codes, kv.keys + offset);
      write_value(layout, v + token * v_stride + head * d, d, at, codes, kv.values + offset);
    }
  };
  const auto scratch_bytes = static_cast<std::size_t>(layout.d);
  if (t <= 2) {  // less work than waking a thread
    parallel_for(pool, 1, scratch_bytes, [&](int64_t, int thread) {
      for (int64_t head = 0; head < kv.num_heads; ++head) write_chunk(head, 0, thread);
    });
    return;
  }
  parallel_for(pool, kv.num_heads * num_chunks, scratch_bytes,
               [&](int64_t task, int thread) { write_chunk(task % kv.num_heads, task / kv.num_heads, thread); });
}

}  // namespace quire::QUIRE_ISA
