// Sums of products by vectors: R input rows by V vectors of output features at once, for any of the four formats.
//
// A tile keeps R x V sums in registers while it walks down a strip of one panel. Each step loads V vectors of weights
// (once for all R rows) and one 4-byte unit of each input row, broadcast; 24 sums hide the latency of AVX-512's dot
// products, 8 fit the 16 registers of smaller sets. With few rows the strip is the panel's full width, so that the
// weights, which are all that is read from memory then, stream by in order and once. With many rows the panel's block
// stays in cache while row tiles pass over it.
//
// Sums go to memory, as float [rows][32]: the next block of features goes on from there, so the order over k is one
// sequence however the blocks are cut. Whole numbers (int8) are exact in any order; int4's are turned into floats group
// by group, again in order. Where the scales of a group's parts are whole multiples of one step, the multiplying is done
// in whole numbers too: of the parts' sums with few rows, of the weights themselves, written out as bytes, with many.
#pragma once

#include "linear/formats.hpp"
#include "linear/linear.hpp"
#include "simd.hpp"

namespace quire::QUIRE_ISA {

#if defined(__AVX512F__) || defined(__aarch64__)
inline constexpr int kMaxTileRows = 12, kTileSums = 24;
#else
inline constexpr int kMaxTileRows = 4, kTileSums = 8;
#endif
inline constexpr int64_t kPanelRow = kPanel * 4;  // bytes of one step over a panel
inline constexpr int64_t kPrefetch = 2048;         // bytes ahead of what is being multiplied

// Some input rows, as the tiles read them: row after row, or, where `chunked`, in chunks of 16 rows by 64 bytes that
// follow each other in memory, as AMX loads them (rows a power of two apart drive each other out of the cache).
struct TileRows {
  const std::byte* x;    // bf16, or bytes where they were quantised
  int64_t stride;        // bytes from row to row: 64 within a chunk
  bool chunked = false;
  int64_t row_bytes = 0;  // of a row, padded; where `chunked` only
  const float* scale = nullptr;  // of quantised rows: [rows][groups]
  const int32_t* sum = nullptr;
  int64_t groups = 0;  // scales of a row
  int64_t subs = 0;    // sums of a row
};

// Vectors side by side for a tile of `rows`: a power of two, at most a panel.
constexpr int vectors_for(int rows) {
  int vectors = 1;
  while (vectors * 2 * rows <= kTileSums && vectors * 2 <= kPanelVectors) vectors *= 2;
  return vectors;
}

inline I load_units(const std::byte* from) { return load(reinterpret_cast<const int32_t*>(from)); }
inline I broadcast_unit(const std::byte* from) {
  int32_t unit;
  std::memcpy(&unit, from, sizeof unit);
  return set(unit);
}

// Adds `steps` panel rows' products, beginning at `weights` and at `x`.
template <class Form, int R, int V>
inline __attribute__((always_inline)) void multiply(typename Form::Sum (&sums)[R][V], const std::byte* x,
                                                    int64_t stride, const std::byte* weights, int64_t steps) {
  constexpr int kUnits = Form::kUnits;
  for (int64_t step = 0; step < steps; ++step) {
    I units[V][kUnits];
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
      __builtin_prefetch(weights + kPrefetch + v * 4 * kLanes);
      Form::expand(load_units(weights + v * 4 * kLanes), units[v]);
    }
#pragma GCC unroll 2
    for (int u = 0; u < kUnits; ++u) {
#pragma GCC unroll 12
      for (int r = 0; r < R; ++r) {
        const I broadcast = broadcast_unit(x + r * stride + u * 4);
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) sums[r][v] = Form::dot(sums[r][v], units[v][u], broadcast);
      }
    }
    weights += kPanelRow;
    x += 4 * kUnits;
  }
}

template <class Sum>
inline Sum load_sum(const float* from) {
  Sum sum;
  std::memcpy(&sum, from, sizeof sum);
  return sum;
}

// bf16, fp8 and int8: sums of one kind all the way. `go_on`: from what `out` holds, not from zero.
template <class Form, int R>
inline void tile(const TileRows& rows, const std::byte* weights, int64_t steps, bool go_on, float* out) {
  constexpr int V = vectors_for(R);
  using Sum = typename Form::Sum;
  for (int column = 0; column < kPanel; column += V * kLanes) {
    Sum sums[R][V] = {};
    if (go_on) {
      for (int r = 0; r < R; ++r) {
        for (int v = 0; v < V; ++v) sums[r][v] = load_sum<Sum>(out + r * kPanel + column + v * kLanes);
      }
    }
    multiply<Form, R, V>(sums, rows.x, rows.stride, weights + column * 4, steps);
    for (int r = 0; r < R; ++r) {
      for (int v = 0; v < V; ++v) std::memcpy(out + r * kPanel + column + v * kLanes, &sums[r][v], sizeof(Sum));
    }
  }
}

// The value of a group's whole number, added to a sum; the same in every kernel that serves int4.
inline F add_group(F sum, I whole, F weight_scale, F row_scale) {
  return fma(to_float(whole), weight_scale * row_scale, sum);
}
// With zero points: a group's zeros weigh as much as the row's values in it.
inline F subtract_zeros(F sum, F zero_scale, F row_scale, int32_t row_sum) {
  return fma(-zero_scale, row_scale * set(static_cast<float>(row_sum)), sum);
}

// The scales of one panel's groups, from the first: in bf16 where that loses nothing, which is less to read.
struct GroupScales {
  const float* wide;
  const bf16* narrow;
  const float* zero;  // zero * scale, or null

  F at(int64_t index) const { return narrow != nullptr ? load(narrow + index) : load(wide + index); }
};

inline GroupScales group_scales(const PackedWeight& weight, int64_t panel) {
  const int64_t first = panel * (weight.k / weight.group_size) * kPanel;
  return {weight.scale == nullptr ? nullptr : weight.scale + first,
          weight.narrow_scale == nullptr ? nullptr : weight.narrow_scale + first,
          weight.zero_scale == nullptr ? nullptr : weight.zero_scale + first};
}

// int4: groups [first, first + count) of one panel.
template <int R>
inline void tile_int4(const TileRows& rows, const std::byte* weights, int64_t group_size, int64_t first, int64_t count,
                      const GroupScales& scales, float* out) {
  constexpr int V = vectors_for(R);
  const int64_t steps = group_size / 8;
  for (int column = 0; column < kPanel; column += V * kLanes) {
    for (int64_t group = first; group < first + count; ++group) {
      I sums[R][V] = {};
      multiply<Int4Form, R, V>(sums, rows.x + group * group_size, rows.stride,
                               weights + group * steps * kPanelRow + column * 4, steps);
      for (int v = 0; v < V; ++v) {
        const int64_t at = group * kPanel + column + v * kLanes;
        const F weight_scale = scales.at(at);
        for (int r = 0; r < R; ++r) {
          float* to = out + r * kPanel + column + v * kLanes;
          const int32_t row_sum = rows.sum[r * rows.subs + group];
          const F row_scale = set(rows.scale[r * rows.groups + group]);
          const F before = group == 0 ? F{} : load(to);
          if (scales.zero == nullptr) {
            store(to, add_group(before, sums[r][v] - 8 * row_sum, weight_scale, row_scale));
          } else {
            const F after = add_group(before, sums[r][v], weight_scale, row_scale);
            store(to, subtract_zeros(after, load(scales.zero + at), row_scale, row_sum));
          }
        }
      }
    }
  }
}

// The parts of one panel's groups, with whole multipliers.
struct Parts {
  const int8_t* multiplier;  // [k / size][32]
  int64_t size, per_group;   // features of a part; parts of a group
};

inline Parts parts_of(const PackedWeight& weight, int64_t panel) {
  return {weight.multiplier + panel * (weight.k / weight.sub_size) * kPanel, weight.sub_size,
          weight.group_size / weight.sub_size};
}

inline I load_multipliers(const int8_t* from) {
  typedef int8_t B __attribute__((vector_size(kLanes)));
  B bytes;
  std::memcpy(&bytes, from, sizeof bytes);
  return __builtin_convertvector(bytes, I);
}

// int4 with multipliers, few rows.
template <int R>
inline void tile_parts(const TileRows& rows, const std::byte* weights, int64_t groups, const Parts& parts,
                       const GroupScales& scales, float* out) {
  constexpr int V = vectors_for(R);
  const int64_t steps = parts.size / 8;
  for (int column = 0; column < kPanel; column += V * kLanes) {
    const std::byte* from = weights + column * 4;
    for (int64_t group = 0; group < groups; ++group) {
      I whole[R][V] = {};
      for (int64_t part = group * parts.per_group; part < (group + 1) * parts.per_group; ++part) {
        I sums[R][V] = {};
        multiply<Int4Form, R, V>(sums, rows.x + part * parts.size, rows.stride, from, steps);
        from += steps * kPanelRow;
        for (int v = 0; v < V; ++v) {
          const I multiplier = load_multipliers(parts.multiplier + part * kPanel + column + v * kLanes);
          for (int r = 0; r < R; ++r) whole[r][v] += multiplier * (sums[r][v] - 8 * rows.sum[r * rows.subs + part]);
        }
      }
      for (int v = 0; v < V; ++v) {
        const F weight_scale = scales.at(group * kPanel + column + v * kLanes);
        for (int r = 0; r < R; ++r) {
          float* to = out + r * kPanel + column + v * kLanes;
          const F before = group == 0 ? F{} : load(to);
          store(to, add_group(before, whole[r][v], weight_scale, set(rows.scale[r * rows.groups + group])));
        }
      }
    }
  }
}

// Of weights that are written out as int8's are: groups [first, first + count), `weights` beginning with the first.
template <int R>
inline void tile_written_groups(const TileRows& rows, const std::byte* weights, int64_t group_size, int64_t first,
                                int64_t count, const GroupScales& scales, float* out) {
  constexpr int V = vectors_for(R);
  const int64_t per_group = rows.subs / rows.groups;
  for (int column = 0; column < kPanel; column += V * kLanes) {
    const std::byte* from = weights + column * 4;
    for (int64_t group = first; group < first + count; ++group) {
      I sums[R][V] = {};
      multiply<Int8Form, R, V>(sums, rows.x + group * group_size, rows.stride, from, group_size / 4);
      from += group_size / 4 * kPanelRow;
      for (int r = 0; r < R; ++r) {
        int32_t row_sum = 0;
        const int32_t* parts = rows.sum + r * rows.subs + group * per_group;
        for (int64_t part = 0; part < per_group; ++part) row_sum += parts[part];
        for (int v = 0; v < V; ++v) {
          float* to = out + r * kPanel + column + v * kLanes;
          const F weight_scale = scales.at(group * kPanel + column + v * kLanes);
          const F before = group == 0 ? F{} : load(to);
          const F row_scale = set(rows.scale[r * rows.groups + group]);
          store(to, add_group(before, sums[r][v] - 128 * row_sum, weight_scale, row_scale));
        }
      }
    }
  }
}

// A whole number of chunks, where there are chunks.
inline TileRows skip_rows(TileRows rows, int64_t count) {
  rows.x += count * (rows.chunked ? rows.row_bytes : rows.stride);
  if (rows.scale != nullptr) rows.scale += count * rows.groups;
  if (rows.sum != nullptr) rows.sum += count * rows.subs;
  return rows;
}

// Calls `body.template run<R>()` for the R that `rows` is.
template <int R, class Body>
inline void with_rows(int64_t rows, const Body& body) {
  if constexpr (R > 1) {
    if (rows < R) return with_rows<R - 1>(rows, body);
  }
  body.template operator()<R>();
}

// Any number of rows, in tiles of nearly equal height.
template <class Body>
inline void for_tiles(int64_t rows, const Body& body) {
  const int64_t tiles = (rows + kMaxTileRows - 1) / kMaxTileRows;
  for (int64_t index = 0, first = 0; index < tiles; ++index) {
    const int64_t count = (rows - first) / (tiles - index);
    with_rows<kMaxTileRows>(count, [&]<int R>() { body.template operator()<R>(first); });
    first += count;
  }
}

// Panel rows, each written out as two: `Form` is fp8 or int4. `zero` is taken from each byte.
template <class Form>
inline void write_out(const std::byte* from, int64_t num_rows, std::byte* to, int8_t zero = 0) {
  typedef int8_t B __attribute__((vector_size(4 * kLanes)));
  constexpr int64_t kVector = sizeof(I);
  for (int64_t row = 0; row < num_rows; ++row) {
    for (int64_t at = 0; at < kPanelRow; at += kVector) {
      I units[2];
      __builtin_prefetch(from + row * kPanelRow + at + kPrefetch);
      Form::expand(load_units(from + row * kPanelRow + at), units);
      for (int half = 0; half < 2; ++half) {
        const B bytes = reinterpret_cast<B>(units[half]) - zero;
        std::memcpy(to + (2 * row + half) * kPanelRow + at, &bytes, sizeof bytes);
      }
    }
  }
}

// int4 times its multipliers: parts [first, first + count) as bytes, with 128 added if `offset`. A nibble times at most
// 15 stays within its byte, so whole words are multiplied; negative multipliers turn the nibbles round.
template <bool offset>
inline void write_out_parts(const std::byte* from, const Parts& parts, int64_t first, int64_t count, std::byte* to) {
  typedef uint8_t B __attribute__((vector_size(4 * kLanes)));
  typedef uint16_t W __attribute__((vector_size(4 * kLanes)));
  const int64_t rows = parts.size / 8;
  for (int64_t part = first; part < first + count; ++part) {
    for (int64_t column = 0; column < kPanel; column += kLanes) {
      const I multiplier = load_multipliers(parts.multiplier + part * kPanel + column);
      const I negative = multiplier >> 31, size = (multiplier ^ negative) - negative;
      const I turn = negative & 0x0f0f0f0f;
      const W factor = reinterpret_cast<W>(size | (size << 16));
      const I zero = (size << 3) - (size & negative);  // 8 times, or 7 times where nibbles are turned round
      const B zeros = reinterpret_cast<B>(reinterpret_cast<U>(offset ? zero ^ 0x80 : zero) * 0x01010101u);
      for (int64_t row = 0; row < rows; ++row) {
        const std::byte* at = from + row * kPanelRow + column * 4;
        __builtin_prefetch(at + kPrefetch);
        I units[2];
        Int4Form::expand(load_units(at), units);
        for (int half = 0; half < 2; ++half) {
          const B bytes = reinterpret_cast<B>(reinterpret_cast<W>(units[half] ^ turn) * factor) - zeros;
          std::memcpy(to + (2 * row + half) * kPanelRow + column * 4, &bytes, sizeof bytes);
        }
      }
    }
    from += rows * kPanelRow;
    to += 2 * rows * kPanelRow;
  }
}

// fp8 for many rows: widened once, a block at a time, and then as bf16; the same products in the same order.
inline constexpr int64_t kWideSteps = 256;
inline void wide_fp8_sums(const TileRows& rows, const std::byte* weights, int64_t steps, int64_t num_rows, float* out,
                          std::byte* spare) {
  for (int64_t first_step = 0; first_step < 2 * steps; first_step += kWideSteps) {
    const int64_t left = 2 * steps - first_step, count = left < kWideSteps ? left : kWideSteps;
    write_out<Fp8Form>(weights + first_step / 2 * kPanelRow, count / 2, spare);
    for_tiles(num_rows, [&]<int R>(int64_t first) {
      TileRows here = skip_rows(rows, first);
      here.x += first_step * 4;
      tile<Bf16Form, R>(here, spare, count, first_step > 0, out + first * kPanel);
    });
  }
}

inline void int4_sums(const PackedWeight& weight, int64_t panel, const std::byte* weights, const TileRows& rows,
                      int64_t num_rows, float* out, std::byte* spare) {
  const int64_t size = weight.group_size, groups = weight.k / size;
  const GroupScales scales = group_scales(weight, panel);
  if (weight.multiplier == nullptr) {
    for_tiles(num_rows, [&]<int R>(int64_t first) {
      tile_int4<R>(skip_rows(rows, first), weights, size, 0, groups, scales, out + first * kPanel);
    });
    return;
  }
  const Parts parts = parts_of(weight, panel);
  if (num_rows <= kMaxTileRows) {
    for_tiles(num_rows, [&]<int R>(int64_t) { tile_parts<R>(rows, weights, groups, parts, scales, out); });
    return;
  }
  const int64_t most = kWideSteps * 4 / size;
  for (int64_t first_group = 0; first_group < groups; first_group += most) {
    const int64_t count = groups - first_group < most ? groups - first_group : most;
    write_out_parts<true>(weights + first_group * size / 8 * kPanelRow, parts, first_group * parts.per_group,
                          count * parts.per_group, spare);
    for_tiles(num_rows, [&]<int R>(int64_t first) {
      tile_written_groups<R>(skip_rows(rows, first), spare, size, first_group, count, scales, out + first * kPanel);
    });
  }
}

// [rows][32] sums of one panel, with `kWideSteps` panel rows of memory to spare: float, or whole numbers for int8.
inline void panel_sums(const PackedWeight& weight, int64_t panel, const TileRows& rows, int64_t num_rows, float* out,
                       std::byte* spare) {
  const int64_t panel_bytes = kPanel * weight.padded_k * bits_of(weight.format) / 8;
  const std::byte* weights = weight.data + panel * panel_bytes;
  const int64_t steps = panel_bytes / kPanelRow;
  const auto uniform = [&]<class Form>() {
    for_tiles(num_rows, [&]<int R>(int64_t first) {
      tile<Form, R>(skip_rows(rows, first), weights, steps, false, out + first * kPanel);
    });
  };
  switch (weight.format) {
    case Format::bf16: return uniform.template operator()<Bf16Form>();
    case Format::int8: return uniform.template operator()<Int8Form>();
    case Format::fp8:
      if (num_rows > kMaxTileRows) return wide_fp8_sums(rows, weights, steps, num_rows, out, spare);
      return uniform.template operator()<Fp8Form>();
    case Format::int4: return int4_sums(weight, panel, weights, rows, num_rows, out, spare);
  }
}

}  // namespace quire::QUIRE_ISA
