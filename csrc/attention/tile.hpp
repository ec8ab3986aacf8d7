// A tile of keys: kTile tokens from a fixed position, as the products want them, whatever the block size and format.
#pragma once

#include "attention/layout.hpp"

namespace quire::QUIRE_ISA {

inline constexpr int64_t kTile = 128;   // tokens whose scores are worked on together
inline constexpr int64_t kScoreGroup = 16;  // tokens side by side in a row of keys
inline constexpr int64_t kValueGroup = 32;  // tokens of a sum that the products take at once

// Row p of keys[g]: 16 tokens' pairs of dimensions 2p and 2p + 1. Row p of values[g]: for all dimensions, the pairs of
// tokens 2p and 2p + 1, 16 rows. Strides are in elements. Scales belong to tokens; null where there are none.
struct KeyTile {
  const bf16* keys[kTile / kScoreGroup];
  int64_t key_stride;
  const bf16* values[kTile / kValueGroup];
  int64_t value_stride;
  const float* key_scale;
  const float* value_scale;
};

// One request's blocks of one head.
class KeySource {
 public:
  KeySource(const KvLayer& kv, const PagedRequests& requests, int64_t request, int64_t head)
      : layout(kv), keys_(kv.keys + head * kv.num_blocks * layout.bytes),
        values_(kv.values + head * kv.num_blocks * layout.bytes),
        table_(requests.block_table + request * requests.table_stride),
        num_blocks_((requests.context_lens[request] + kv.block_size - 1) / kv.block_size) {}

  const std::byte* keys(int64_t position) const { return keys_ + offset(position); }
  const std::byte* values(int64_t position) const { return values_ + offset(position); }

  // Brings kScoreGroup tokens nearer.
  void prefetch(int64_t position) const {
    const int64_t width = layout.element_bytes();
    for (int64_t done = 0; done < kScoreGroup; done += layout.s) {
      if ((position + done) / layout.s >= num_blocks_) return;
      const int64_t at = (position + done) % layout.s, tokens = at_most(layout.s, kScoreGroup);
      const std::byte* values_at = values(position + done) + at * layout.d * width;
      for (int64_t byte = 0; byte < tokens * layout.d * width; byte += 64) __builtin_prefetch(values_at + byte, 0, 2);
      const int64_t row = 2 * tokens * width, rows_per_line = row < 64 && layout.s == tokens ? 64 / row : 1;
      const std::byte* keys_at = keys(position + done) + 2 * at * width;
      for (int64_t p = 0; p < layout.d / 2; p += rows_per_line) {
        __builtin_prefetch(keys_at + p * 2 * layout.s * width, 0, 2);
      }
    }
  }

  const BlockLayout layout;

 private:
  // Beyond the context lies block 0: finite, and hidden from every query.
  int64_t offset(int64_t position) const {
    const int64_t index = position / layout.s;
    return (index < num_blocks_ ? table_[index] : 0) * layout.bytes;
  }

  const std::byte* keys_;
  const std::byte* values_;
  const int64_t* table_;
  int64_t num_blocks_;
};

// Where tiles are put together that cannot be used in place. Dimensions are padded with zeros, for keys to 32 and for
// values to 16: a row of an AMX tile.
struct TileBuffer {
  bf16* keys;    // [kTile / 16][dk / 2][16][2]
  bf16* values;  // [kTile / 2][dv][2]
  float* scales; // [2][kTile]
  int64_t dk, dv;

  static int64_t padded_keys(int64_t d) { return round_up(d, 32); }
  static int64_t padded_values(int64_t d) { return round_up(d, 16); }

  // Once per task: what staging never writes.
  void clear_padding(int64_t d) const {
    for (int64_t g = 0; d < dk && g < kTile / kScoreGroup; ++g) {
      bf16* group = keys + g * dk * kScoreGroup;
      std::memset(group + d * kScoreGroup, 0, static_cast<std::size_t>((dk - d) * kScoreGroup) * sizeof(bf16));
    }
    for (int64_t p = 0; d < dv && p < kTile / 2; ++p) {
      std::memset(values + (p * dv + d) * 2, 0, static_cast<std::size_t>(dv - d) * 2 * sizeof(bf16));
    }
  }

  KeyTile load(const KeySource& source, int64_t start, int64_t num_groups) const {
    const BlockLayout& layout = source.layout;
    KeyTile tile{};
    const bool plain = layout.format == KvFormat::bf16;
    if (plain && layout.s >= kScoreGroup && layout.d == dk) {
      tile.key_stride = 2 * layout.s;
      for (int64_t g = 0; g < num_groups; ++g) {
        const int64_t position = start + g * kScoreGroup;
        tile.keys[g] = reinterpret_cast<const bf16*>(source.keys(position)) + 2 * (position % layout.s);
      }
    } else {
      tile.key_stride = 2 * kScoreGroup;
      for (int64_t g = 0; g < num_groups; ++g) {
        tile.keys[g] = keys + g * dk * kScoreGroup;
        stage_keys(source, start + g * kScoreGroup, keys + g * dk * kScoreGroup);
      }
    }
    const int64_t value_groups = (num_groups * kScoreGroup + kValueGroup - 1) / kValueGroup;
    if (plain && layout.s >= kValueGroup && layout.d == dv) {
      tile.value_stride = 2 * layout.d;
      for (int64_t g = 0; g < value_groups; ++g) {
        const int64_t position = start + g * kValueGroup;
        tile.values[g] = reinterpret_cast<const bf16*>(source.values(position)) + position % layout.s * layout.d;
      }
    } else {
      tile.value_stride = 2 * dv;
      for (int64_t g = 0; g < value_groups; ++g) {
        tile.values[g] = values + g * kValueGroup * dv;
        stage_values(source, start + g * kValueGroup, values + g * kValueGroup * dv);
      }
    }
    if (!plain) {
      tile.key_scale = scales;
      tile.value_scale = scales + kTile;
      stage_scales(source, start, value_groups * kValueGroup);
    }
    return tile;
  }

 private:
  // Rows of `length` pairs, widened to bf16. `step` is in bytes, `stride` in elements.
  static void copy_rows(KvFormat format, const std::byte* from, int64_t step, int64_t num_rows, int64_t length,
                        bf16* to, int64_t stride) {
    const auto each_row = [&](const auto& copy) {
      for (int64_t row = 0; row < num_rows; ++row) copy(from + row * step, to + row * stride);
    };
    switch (format) {
      case KvFormat::bf16:
        each_row([&](const std::byte* row, bf16* wide) { std::memcpy(wide, row, static_cast<std::size_t>(length) * 4); });
        break;
      case KvFormat::int8:
        each_row([&](const std::byte* row, bf16* wide) { expand_row<KvFormat::int8>(row, length, wide); });
        break;
      case KvFormat::fp8:
        each_row([&](const std::byte* row, bf16* wide) { expand_row<KvFormat::fp8>(row, length, wide); });
        break;
    }
  }

  static void stage_keys(const KeySource& source, int64_t position, bf16* to) {
    const BlockLayout& layout = source.layout;
    const int64_t tokens = at_most(layout.s, kScoreGroup), width = layout.element_bytes();
    const int64_t step = 2 * layout.s * width, num_rows = layout.d / 2;
    for (int64_t done = 0; done < kScoreGroup; done += tokens) {
      const std::byte* from = source.keys(position + done) + 2 * ((position + done) % layout.s) * width;
      copy_rows(layout.format, from, step, num_rows, tokens, to + 2 * done, 2 * kScoreGroup);
    }
  }

  void stage_values(const KeySource& source, int64_t position, bf16* to) const {
    const BlockLayout& layout = source.layout;
    const int64_t row_bytes = 2 * layout.d * layout.element_bytes();
    for (int64_t done = 0; done < kValueGroup; done += at_most(layout.s, kValueGroup)) {
      const std::byte* from = source.values(position + done) + (position + done) % layout.s / 2 * row_bytes;
      const int64_t num_rows = at_most(layout.s, kValueGroup) / 2;
      copy_rows(layout.format, from, row_bytes, num_rows, layout.d, to + done * dv, 2 * dv);
    }
  }

  void stage_scales(const KeySource& source, int64_t start, int64_t tokens) const {
    const int64_t step = at_most(source.layout.s, kTile);
    for (int64_t done = 0; done < tokens; done += step) {
      const int64_t position = start + done, at = position % source.layout.s;
      const auto size = static_cast<std::size_t>(at_most(step, tokens - done)) * sizeof(float);
      std::memcpy(scales + done, source.layout.scales(source.keys(position)) + at, size);
      std::memcpy(scales + kTile + done, source.layout.scales(source.values(position)) + at, size);
    }
  }
};

}  // namespace quire::QUIRE_ISA
