// The two products of a key tile, for at most kSubRows query rows at a time.
//
//   scores   [rows][kTile]  = q [rows][dk] . keys        one group of 16 tokens after the other
//   weighted [rows][dv]    += weights [rows][kTile] . values
//
// A row's sums run in one order, whatever rows stand beside it: along the dimensions for a score, along the tokens for
// a weighted value. With AMX a row is always a row of a full tile, also when it is alone; a tile instruction sums 32
// numbers at once. Without, a row is broadcast pair by pair against vectors of tokens, or of dimensions: `kRowsAtOnce`
// rows share what is loaded.
#pragma once

#include "attention/tile.hpp"

namespace quire::QUIRE_ISA {

inline constexpr int64_t kSubRows = 32;  // rows whose scores are in the first-level cache together
inline constexpr int64_t kRowStep = 16;  // rows are padded to this
inline constexpr int64_t kPairWords = 2; // elements in a pair

#if defined(__AMX_BF16__)

// Eight tiles of 16 rows of 64 bytes: 0-3 sums (row tile, column tile), 4-5 rows, 6-7 columns.
struct Tiles {
  Tiles() {
    alignas(64) uint8_t config[64] = {1};
    for (int tile = 0; tile < 8; ++tile) {
      config[16 + 2 * tile] = 64;
      config[48 + tile] = 16;
    }
    _tile_loadconfig(config);
  }
  ~Tiles() { _tile_release(); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
};

// The tile instructions say nothing to the compiler of what they read.
inline void memory_is_read() { asm volatile("" ::: "memory"); }

// Tiles 0-3 += rows . columns over `steps` steps of 32 numbers.
template <bool kTwoRows, bool kTwoColumns, class Columns>
inline void multiply_tiles(const bf16* rows, int64_t row_stride, int64_t steps, const Columns& columns,
                           int64_t column_stride) {
  const bf16* second_rows = rows + kRowStep * row_stride;
  for (int64_t step = 0; step < steps; ++step) {
    _tile_loadd(6, columns(step, 0), column_stride * 2);
    _tile_loadd(4, rows + step * 32, row_stride * 2);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (kTwoRows) {
      _tile_loadd(5, second_rows + step * 32, row_stride * 2);
      _tile_dpbf16ps(2, 5, 6);
    }
    if constexpr (kTwoColumns) {
      _tile_loadd(7, columns(step, 1), column_stride * 2);
      _tile_dpbf16ps(1, 4, 7);
      if constexpr (kTwoRows) _tile_dpbf16ps(3, 5, 7);
    }
  }
}

template <bool kTwoRows, bool kTwoColumns>
inline void store_tiles(float* to, int64_t stride) {
  _tile_stored(0, to, stride * 4);
  if constexpr (kTwoColumns) _tile_stored(1, to + 16, stride * 4);
  if constexpr (kTwoRows) {
    _tile_stored(2, to + kRowStep * stride, stride * 4);
    if constexpr (kTwoColumns) _tile_stored(3, to + kRowStep * stride + 16, stride * 4);
  }
}

template <bool kTwoRows, bool kTwoColumns>
inline void load_tiles(const float* from, int64_t stride) {
  _tile_loadd(0, from, stride * 4);
  if constexpr (kTwoColumns) _tile_loadd(1, from + 16, stride * 4);
  if constexpr (kTwoRows) {
    _tile_loadd(2, from + kRowStep * stride, stride * 4);
    if constexpr (kTwoColumns) _tile_loadd(3, from + kRowStep * stride + 16, stride * 4);
  }
}

template <bool kTwoRows, bool kTwoColumns>
inline void score_tiles(const bf16* q, int64_t dk, const KeyTile& tile, int64_t g, float* scores) {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  const auto columns = [&](int64_t step, int64_t column) { return tile.keys[g + column] + step * 16 * tile.key_stride; };
  multiply_tiles<kTwoRows, kTwoColumns>(q, dk, dk / 32, columns, tile.key_stride);
  store_tiles<kTwoRows, kTwoColumns>(scores + g * kScoreGroup, kTile);
}

// Scores of groups g and, if there are two, g + 1.
inline void score_groups(const bf16* q, int64_t rows, int64_t dk, const KeyTile& tile, int64_t g, bool two,
                         float* scores) {
  memory_is_read();
  if (rows > kRowStep) {
    two ? score_tiles<true, true>(q, dk, tile, g, scores) : score_tiles<true, false>(q, dk, tile, g, scores);
  } else {
    two ? score_tiles<false, true>(q, dk, tile, g, scores) : score_tiles<false, false>(q, dk, tile, g, scores);
  }
}

template <bool kTwoRows, bool kTwoColumns>
inline void weigh_tiles(const bf16* weights, int64_t num_groups, const KeyTile& tile, int64_t first, float* weighted,
                        int64_t dv) {
  load_tiles<kTwoRows, kTwoColumns>(weighted + first, dv);
  const auto columns = [&](int64_t step, int64_t column) {
    return tile.values[step] + (first + column * 16) * kPairWords;
  };
  multiply_tiles<kTwoRows, kTwoColumns>(weights, kTile, num_groups, columns, tile.value_stride);
  store_tiles<kTwoRows, kTwoColumns>(weighted + first, dv);
}

// Adds to dimensions `first` to `first + 31`, or to as many as there are.
inline void weigh_dimensions(const bf16* weights, int64_t rows, int64_t num_groups, const KeyTile& tile, int64_t first,
                             float* weighted, int64_t dv) {
  memory_is_read();
  const bool two = first + 16 < dv;
  if (rows > kRowStep) {
    two ? weigh_tiles<true, true>(weights, num_groups, tile, first, weighted, dv)
        : weigh_tiles<true, false>(weights, num_groups, tile, first, weighted, dv);
  } else {
    two ? weigh_tiles<false, true>(weights, num_groups, tile, first, weighted, dv)
        : weigh_tiles<false, false>(weights, num_groups, tile, first, weighted, dv);
  }
}

#else

struct Tiles {};

inline constexpr int kVectors = 16 / kLanes;  // of 16 numbers

inline I load_pairs(const bf16* from) {
  I pairs;
  std::memcpy(&pairs, from, sizeof pairs);
  return pairs;
}
inline I broadcast_pair(const bf16* from) {
  int32_t pair;
  std::memcpy(&pair, from, sizeof pair);
  return set(pair);
}

template <int kRows, int kGroups>
inline void score_some(const bf16* q, int64_t dk, int64_t pairs, const KeyTile& tile, int64_t g, float* scores) {
  F sums[kRows][kGroups * kVectors] = {};
  for (int64_t p = 0; p < pairs; ++p) {
    I keys[kGroups * kVectors];
    for (int n = 0; n < kGroups * kVectors; ++n) {
      keys[n] = load_pairs(tile.keys[g + n / kVectors] + p * tile.key_stride + n % kVectors * kLanes * kPairWords);
    }
    for (int row = 0; row < kRows; ++row) {
      const I query = broadcast_pair(q + row * dk + p * kPairWords);
      for (int n = 0; n < kGroups * kVectors; ++n) sums[row][n] = dot_pair(sums[row][n], query, keys[n]);
    }
  }
  for (int row = 0; row < kRows; ++row) {
    for (int n = 0; n < kGroups * kVectors; ++n) store(scores + row * kTile + g * kScoreGroup + n * kLanes, sums[row][n]);
  }
}

template <int kRows, int kCount>
inline void weigh_some(const bf16* weights, int64_t num_groups, const KeyTile& tile, int64_t first, float* weighted,
                       int64_t dv) {
  F sums[kRows][kCount];
  for (int row = 0; row < kRows; ++row) {
    for (int n = 0; n < kCount; ++n) sums[row][n] = load(weighted + row * dv + first + n * kLanes);
  }
  for (int64_t g = 0; g < num_groups; ++g) {
    const bf16* value_row = tile.values[g] + first * kPairWords;
    for (int64_t p = 0; p < kValueGroup / 2; ++p, value_row += tile.value_stride) {
      I values[kCount];
      for (int n = 0; n < kCount; ++n) values[n] = load_pairs(value_row + n * kLanes * kPairWords);
      for (int row = 0; row < kRows; ++row) {
        const I weight = broadcast_pair(weights + row * kTile + g * kValueGroup + p * kPairWords);
        for (int n = 0; n < kCount; ++n) sums[row][n] = dot_pair(sums[row][n], weight, values[n]);
      }
    }
  }
  for (int row = 0; row < kRows; ++row) {
    for (int n = 0; n < kCount; ++n) store(weighted + row * dv + first + n * kLanes, sums[row][n]);
  }
}

// Calls `some<rows>(first row)` for 4, 2 and 1 rows until all have been.
template <class Some>
inline void by_rows(int64_t rows, const Some& some) {
  int64_t row = 0;
  for (; row + 4 <= rows; row += 4) some.template operator()<4>(row);
  if (rows - row >= 2) {
    some.template operator()<2>(row);
    row += 2;
  }
  if (row < rows) some.template operator()<1>(row);
}

inline void score_groups(const bf16* q, int64_t rows, int64_t dk, const KeyTile& tile, int64_t g, bool two,
                         float* scores) {
  by_rows(rows, [&]<int kRows>(int64_t row) {
    const bf16* some_q = q + row * dk;
    float* some_scores = scores + row * kTile;
    if (two && kVectors == 1) {
      score_some<kRows, 2>(some_q, dk, dk / 2, tile, g, some_scores);
    } else {
      score_some<kRows, 1>(some_q, dk, dk / 2, tile, g, some_scores);
      if (two) score_some<kRows, 1>(some_q, dk, dk / 2, tile, g + 1, some_scores);
    }
  });
}

inline void weigh_dimensions(const bf16* weights, int64_t rows, int64_t num_groups, const KeyTile& tile, int64_t first,
                             float* weighted, int64_t dv) {
  by_rows(rows, [&]<int kRows>(int64_t row) {
    const bf16* some_weights = weights + row * kTile;
    float* some_weighted = weighted + row * dv;
    if (first + 16 < dv && kVectors == 1) {
      weigh_some<kRows, 2>(some_weights, num_groups, tile, first, some_weighted, dv);
    } else {
      weigh_some<kRows, kVectors>(some_weights, num_groups, tile, first, some_weighted, dv);
      if (first + 16 < dv) weigh_some<kRows, kVectors>(some_weights, num_groups, tile, first + 16, some_weighted, dv);
    }
  });
}

#endif

}  // namespace quire::QUIRE_ISA
