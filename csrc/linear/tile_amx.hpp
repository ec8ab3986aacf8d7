// Sums of products by AMX tiles: up to 32 input rows by one panel, four tiles of 16 x 16 sums, with two tiles of input
// rows and two of weights between them. Input rows are read where they lie (64 bytes of a row are a tile's row), and so
// is the panel, whose layout is that of weight tiles; fp8 and int4 are written out to bf16 and bytes, a block at a time.
//
// Four products need four tiles: with everything in the second-level cache, loading takes as long as multiplying. So the
// panel goes in blocks that stay in the first-level cache while all row tiles pass over them, loaded so as to leave no
// trace there; sums wait in memory.
//
// A tile product of bf16 adds pairs in an order of its own, which is not that of the vectors' dot product, hence bf16 and
// fp8 use tiles for one row as for a thousand. Whole numbers are exact: few rows take the vectors (tile.hpp) instead.
#pragma once

#include "linear/formats.hpp"
#include "linear/linear.hpp"
#include "linear/tile.hpp"
#include "simd.hpp"

namespace quire::QUIRE_ISA {

inline constexpr int64_t kTileRows = 16, kTileBytes = 64;

}  // namespace quire::QUIRE_ISA

#if defined(__AMX_TILE__)

namespace quire::QUIRE_ISA {

inline constexpr int64_t kBlockSteps = 16;                           // of 16 panel rows each: 32 KiB
inline constexpr int64_t kStepBytes = kTileRows * kPanelRow;         // of a panel: both weight tiles
inline constexpr int kJoined = 4;                                   // groups of int4 that join the float sums at once
inline constexpr int64_t kAmxSpare = kBlockSteps * kStepBytes + kJoined * 4 * 2 * kTileRows * kPanel;

// What lies in memory is what tiles see: the intrinsics do not tell the compiler that they read it.
inline void settle() { asm volatile("" ::: "memory"); }

// Tiles 0 and 1 are the sums of `upper` rows, 2 and 3 of `lower` more; 4 and 5 input rows; 6 and 7 weights.
inline void configure_tiles(int64_t upper, int64_t lower, int64_t k_bytes) {
  struct alignas(64) {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
  } config;
  const auto set_tile = [&](int tile, int64_t rows, int64_t bytes) {
    config.rows[tile] = static_cast<uint8_t>(rows);
    config.row_bytes[tile] = static_cast<uint16_t>(rows == 0 ? 0 : bytes);
  };
  for (int side = 0; side < 2; ++side) {
    set_tile(side, upper, kTileBytes);
    set_tile(2 + side, lower, kTileBytes);
    set_tile(6 + side, k_bytes / 4, kTileBytes);
  }
  set_tile(4, upper, k_bytes);
  set_tile(5, lower, k_bytes);
  settle();
  _tile_loadconfig(&config);
}

// What weight tiles hold; int8's panels are unsigned, int4's values are written out with their sign.
enum class Weights { bf16, unsigned_bytes, signed_bytes };

// All products of the tiles that are loaded. Tile numbers must be literals.
template <Weights kind, bool both>
inline void dot_tiles() {
  if constexpr (kind == Weights::unsigned_bytes) {
    _tile_dpbsud(0, 4, 6);
    _tile_dpbsud(1, 4, 7);
    if constexpr (both) _tile_dpbsud(2, 5, 6);
    if constexpr (both) _tile_dpbsud(3, 5, 7);
  } else if constexpr (kind == Weights::signed_bytes) {
    _tile_dpbssd(0, 4, 6);
    _tile_dpbssd(1, 4, 7);
    if constexpr (both) _tile_dpbssd(2, 5, 6);
    if constexpr (both) _tile_dpbssd(3, 5, 7);
  } else {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    if constexpr (both) _tile_dpbf16ps(2, 5, 6);
    if constexpr (both) _tile_dpbf16ps(3, 5, 7);
  }
}

// Weights to come, to be asked for while tiles multiply: `lines` cache lines a step.
struct Ahead {
  const std::byte* next;
  int64_t lines;

  void ask() {
    for (int64_t line = 0; line < lines; ++line, next += 64) __builtin_prefetch(next, 0, 2);
  }
};

// `bytes` at `next` in equal parts, over `steps` steps of each of `tiles` tiles.
inline Ahead ahead_of_tile(const std::byte* next, int64_t bytes, int64_t tile, int64_t tiles, int64_t steps) {
  const int64_t lines = (bytes / 64 + tiles * steps - 1) / (tiles * steps);
  return {next + tile * steps * lines * 64, lines};
}

// Sums += products over `steps` tiles' width of features, of input rows beginning at `first_byte` of each row.
template <Weights kind, bool both>
inline void multiply_tiles(const TileRows& rows, int64_t first_byte, const std::byte* weights, int64_t steps,
                           Ahead& ahead) {
  const int64_t step_bytes = rows.chunked ? kTileRows * kTileBytes : kTileBytes, stride = rows.stride;
  const std::byte* upper = rows.x + first_byte / kTileBytes * step_bytes + first_byte % kTileBytes;
  const std::byte* lower = upper + kTileRows * (rows.chunked ? rows.row_bytes : rows.stride);
  for (int64_t step = 0; step < steps; ++step) {
    ahead.ask();
    _tile_loadd(6, weights, kPanelRow);
    _tile_stream_loadd(4, upper, stride);
    _tile_loadd(7, weights + kTileBytes, kPanelRow);
    if constexpr (both) _tile_stream_loadd(5, lower, stride);
    dot_tiles<kind, both>();
    weights += kStepBytes;
    upper += step_bytes;
    lower += step_bytes;
  }
}

template <bool both>
inline void zero_sums() {
  _tile_zero(0);
  _tile_zero(1);
  if constexpr (both) _tile_zero(2);
  if constexpr (both) _tile_zero(3);
}
template <bool both>
inline void load_sums(const float* from) {
  _tile_loadd(0, from, kPanelRow);
  _tile_loadd(1, from + kTileRows, kPanelRow);
  if constexpr (both) _tile_loadd(2, from + kTileRows * kPanel, kPanelRow);
  if constexpr (both) _tile_loadd(3, from + kTileRows * kPanel + kTileRows, kPanelRow);
}
template <bool both>
inline void store_sums(void* to) {
  auto* const out = static_cast<float*>(to);
  _tile_stored(0, out, kPanelRow);
  _tile_stored(1, out + kTileRows, kPanelRow);
  if constexpr (both) _tile_stored(2, out + kTileRows * kPanel, kPanelRow);
  if constexpr (both) _tile_stored(3, out + kTileRows * kPanel + kTileRows, kPanelRow);
}

// Calls `body.template operator()<both>(first, count)` for tiles of 32 rows and then for the rest, with tiles configured.
template <class Body>
inline void for_amx_tiles(int64_t rows, int64_t k_bytes, const Body& body) {
  const int64_t full = rows / (2 * kTileRows) * (2 * kTileRows), rest = rows - full;
  if (full > 0) configure_tiles(kTileRows, kTileRows, k_bytes);
  for (int64_t first = 0; first < full; first += 2 * kTileRows) body.template operator()<true>(first, 2 * kTileRows);
  if (rest > kTileRows) {
    configure_tiles(kTileRows, rest - kTileRows, k_bytes);
    body.template operator()<true>(full, rest);
  } else if (rest > 0) {
    configure_tiles(rest, 0, k_bytes);
    body.template operator()<false>(full, rest);
  }
}

// bf16, fp8 and int8.
inline void amx_sums(const PackedWeight& weight, const std::byte* weights, const TileRows& rows, int64_t num_rows,
                     float* out, std::byte* spare) {
  const bool whole = weight.format == Format::int8, wide = weight.format == Format::fp8;
  const int64_t steps = weight.padded_k * (whole ? 1 : 2) / kTileBytes;
  const int64_t tiles = (num_rows + 2 * kTileRows - 1) / (2 * kTileRows);
  // Few rows: nothing to keep in the cache but the weights that are to come.
  const int64_t most = num_rows <= 2 * kTileRows && !wide ? steps : kBlockSteps;
  for (int64_t first_step = 0; first_step < steps; first_step += most) {
    const int64_t count = steps - first_step < most ? steps - first_step : most;
    const std::byte* block = weights + first_step * kStepBytes / (wide ? 2 : 1);
    const int64_t block_bytes = count * kStepBytes / (wide ? 2 : 1);
    const std::byte* next = most == steps ? block + 2 * kStepBytes : block + block_bytes;
    if (wide) {
      write_out<Fp8Form>(block, count * kTileRows / 2, spare);
      settle();
      block = spare;
    }
    for_amx_tiles(num_rows, kTileBytes, [&]<bool both>(int64_t first, int64_t) {
      const TileRows here = skip_rows(rows, first);
      if (first_step == 0) {
        zero_sums<both>();
      } else {
        load_sums<both>(out + first * kPanel);
      }
      Ahead ahead = ahead_of_tile(next, block_bytes, first / (2 * kTileRows), tiles, count);
      if (whole) {
        multiply_tiles<Weights::unsigned_bytes, both>(here, first_step * kTileBytes, block, count, ahead);
      } else {
        multiply_tiles<Weights::bf16, both>(here, first_step * kTileBytes, block, count, ahead);
      }
      store_sums<both>(out + first * kPanel);
    });
  }
}

// The whole numbers of G groups, each [rows][32] and `kWhole` apart, joined to the float sums group by group; a sum goes
// to memory once for all of them. Zeros are off already where they are all 8.
inline constexpr int64_t kWhole = 2 * kTileRows * kPanel;
template <int G>
inline void add_group_sums(const TileRows& rows, int64_t first_group, int64_t num_rows, const int32_t* whole,
                           const GroupScales& scales, float* out) {
  for (int64_t at = 0; at < kPanel; at += kLanes) {
    F weight_scale[G];
    for (int g = 0; g < G; ++g) weight_scale[g] = scales.at((first_group + g) * kPanel + at);
    float* to = out + at;
    for (int64_t row = 0; row < num_rows; ++row, to += kPanel) {
      const int64_t of_row = row * rows.groups + first_group;
      F sum = first_group == 0 ? F{} : load(to);
#pragma GCC unroll 4
      for (int g = 0; g < G; ++g) {
        const F row_scale = set(rows.scale[of_row + g]);
        sum = add_group(sum, load(whole + g * kWhole + row * kPanel + at), weight_scale[g], row_scale);
        if (scales.zero == nullptr) continue;
        sum = subtract_zeros(sum, load(scales.zero + (first_group + g) * kPanel + at), row_scale, rows.sum[of_row + g]);
      }
      store(to, sum);
    }
  }
}

// int4: a block of groups is written out as bytes; the tiles multiply some groups, whose whole numbers then join the
// float sums.
inline void amx_sums_int4(const PackedWeight& weight, int64_t panel, const std::byte* weights, const TileRows& rows,
                          int64_t num_rows, float* out, std::byte* spare) {
  const int64_t group_size = weight.group_size, groups = weight.k / group_size;
  const int64_t k_bytes = group_size < kTileBytes ? group_size : kTileBytes, steps = group_size / k_bytes;
  const int64_t group_bytes = group_size / 4 * kPanelRow, most = kBlockSteps * kStepBytes / group_bytes;
  const GroupScales scales = group_scales(weight, panel);
  auto* const whole = reinterpret_cast<int32_t*>(spare + kBlockSteps * kStepBytes);
  const int64_t tiles = (num_rows + 2 * kTileRows - 1) / (2 * kTileRows);
  for (int64_t first_group = 0; first_group < groups; first_group += most) {
    const int64_t end = first_group + most < groups ? first_group + most : groups;
    const std::byte* block = weights + first_group * group_bytes / 2;
    if (weight.multiplier != nullptr) {
      const Parts parts = parts_of(weight, panel);
      write_out_parts<false>(block, parts, first_group * parts.per_group, (end - first_group) * parts.per_group, spare);
    } else {
      write_out<Int4Form>(block, (end - first_group) * group_size / 8, spare, scales.zero == nullptr ? 8 : 0);
    }
    settle();
    for_amx_tiles(num_rows, k_bytes, [&]<bool both>(int64_t first, int64_t count) {
      const TileRows here = skip_rows(rows, first);
      Ahead ahead = ahead_of_tile(weights + end * group_bytes / 2, (end - first_group) * group_bytes / 2,
                                  first / (2 * kTileRows), tiles, (end - first_group) * steps);
      for (int64_t group = first_group; group < end; group += kJoined) {
        const int64_t joined = end - group < kJoined ? end - group : kJoined;
        for (int64_t g = 0; g < joined; ++g) {
          zero_sums<both>();
          multiply_tiles<Weights::signed_bytes, both>(here, (group + g) * group_size,
                                                      spare + (group + g - first_group) * group_bytes, steps, ahead);
          store_sums<both>(whole + g * kWhole);
        }
        with_rows<kJoined>(joined, [&]<int G>() {
          add_group_sums<G>(here, group, count, whole, scales, out + first * kPanel);
        });
      }
    });
  }
}

// As `panel_sums`; `spare` has kAmxSpare bytes.
inline void amx_panel_sums(const PackedWeight& weight, int64_t panel, const TileRows& rows, int64_t num_rows,
                           float* out, std::byte* spare) {
  const std::byte* weights = weight.data + panel * kPanel * weight.padded_k * bits_of(weight.format) / 8;
  if (weight.format == Format::int4) {
    amx_sums_int4(weight, panel, weights, rows, num_rows, out, spare);
  } else {
    amx_sums(weight, weights, rows, num_rows, out, spare);
  }
}

}  // namespace quire::QUIRE_ISA

#endif
