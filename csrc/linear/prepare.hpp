// Input rows as the tiles want them: quantised where the weights ask for it, padded where k is no multiple of 64, cut in
// chunks for AMX tiles. Rows that are fit as they are stay where they are.
#pragma once

#include "linear/linear.hpp"
#include "linear/quantize.hpp"
#include "linear/tile.hpp"
#include "linear/tile_amx.hpp"
#include "simd.hpp"

namespace quire::QUIRE_ISA {

// Memory of one call, lent by the pool.
class CallMemory {
 public:
  explicit CallMemory(Pool& pool) : pool_(pool) {}
  CallMemory(const CallMemory&) = delete;
  CallMemory& operator=(const CallMemory&) = delete;
  ~CallMemory() {
    for (const Scratch& piece : pieces_) {
      if (piece.data != nullptr) pool_.give_back(piece);
    }
  }

  // At most twice.
  std::byte* take(int64_t bytes) {
    Scratch& piece = pieces_[pieces_[0].data == nullptr ? 0 : 1];
    piece = pool_.borrow(static_cast<std::size_t>(bytes));
    return piece.data;
  }

 private:
  Pool& pool_;
  Scratch pieces_[2];
};

// Rows per task, so that waking a thread for them is worth it.
inline constexpr int64_t kRowsPerTask = 8;

template <class Body>
inline void for_row_blocks(Pool& pool, int64_t rows, const Body& body) {
  parallel_for(pool, (rows + kRowsPerTask - 1) / kRowsPerTask, 0, [&](int64_t task, int) {
    const int64_t first = task * kRowsPerTask, end = first + kRowsPerTask < rows ? first + kRowsPerTask : rows;
    for (int64_t row = first; row < end; ++row) body(row);
  });
}

// With tiles of 16 rows, and more than two of them: in chunks.
inline bool wants_chunks([[maybe_unused]] int64_t rows) {
#if defined(__AMX_TILE__)
  return rows > 2 * kTileRows;
#else
  return false;
#endif
}

// Up to 64 bytes of `bytes` that begin at `at`, and zeros.
inline void copy_piece(std::byte* to, const std::byte* from, int64_t at, int64_t bytes) {
  if (at + 64 <= bytes) {
    std::memcpy(to, from + at, 64);
    return;
  }
  const int64_t count = at < bytes ? bytes - at : 0;
  std::memcpy(to, from + at, static_cast<std::size_t>(count));
  std::memset(to + count, 0, static_cast<std::size_t>(64 - count));
}

// Rows of `bytes`, `row_of(row)` giving where each begins, padded with zeros to `padded`; in chunks if there are many.
template <class RowOf>
inline TileRows copied_rows(Pool& pool, int64_t num_rows, int64_t bytes, int64_t padded, std::byte* to,
                            const RowOf& row_of) {
  if (!wants_chunks(num_rows)) {
    for_row_blocks(pool, num_rows, [&](int64_t row) {
      for (int64_t at = 0; at < padded; at += 64) copy_piece(to + row * padded + at, row_of(row), at, bytes);
    });
    return {.x = to, .stride = padded};
  }
  parallel_for(pool, (num_rows + kTileRows - 1) / kTileRows, 0, [&](int64_t chunk, int) {
    const int64_t first = chunk * kTileRows, left = num_rows - first, count = left < kTileRows ? left : kTileRows;
    std::byte* piece = to + first * padded;
    for (int64_t at = 0; at < padded; at += kTileBytes, piece += kTileRows * kTileBytes) {
      for (int64_t row = 0; row < count; ++row) copy_piece(piece + row * kTileBytes, row_of(first + row), at, bytes);
    }
  });
  return {.x = to, .stride = kTileBytes, .chunked = true, .row_bytes = padded};
}

inline int64_t whole_chunks(int64_t rows) { return (rows + kTileRows - 1) / kTileRows * kTileRows; }

inline TileRows quantized_rows(Pool& pool, const Rows& rows, const PackedWeight& weight, CallMemory& memory) {
  const int64_t group_size = weight.format == Format::int8 ? rows.k : weight.group_size, padded = weight.padded_k;
  const int64_t sub_size = weight.format == Format::int8 ? rows.k : weight.sub_size, many = whole_chunks(rows.t);
  const int64_t groups = num_groups(rows.k, padded, group_size), subs = groups * (group_size / sub_size);
  QuantizedRows quantized{};
  if (rows.quantized != nullptr && rows.quantized->group_size == group_size &&
      rows.quantized->sub_size == sub_size) {
    quantized = *rows.quantized;
  } else {
    quantized.values = reinterpret_cast<int8_t*>(memory.take(rows.t * (padded + (groups + subs) * 4)));
    quantized.scale = reinterpret_cast<float*>(quantized.values + rows.t * padded);
    quantized.sum = reinterpret_cast<int32_t*>(quantized.scale + rows.t * groups);
    for_row_blocks(pool, rows.t, [&](int64_t row) {
      quantize_row(rows.x + row * rows.stride, rows.k, padded, group_size, sub_size, quantized.values + row * padded,
                   quantized.scale + row * groups, quantized.sum + row * subs);
    });
  }
  const auto* const values = reinterpret_cast<const std::byte*>(quantized.values);
  TileRows prepared{.x = values, .stride = padded};
  if (wants_chunks(rows.t)) {
    prepared = copied_rows(pool, rows.t, padded, padded, memory.take(many * padded),
                           [&](int64_t row) { return values + row * padded; });
  }
  prepared.scale = quantized.scale;
  prepared.sum = quantized.sum;
  prepared.groups = groups;
  prepared.subs = subs;
  return prepared;
}

// All rows of a call, for weights like `weight`.
inline TileRows prepare(Pool& pool, const Rows& rows, const PackedWeight& weight, CallMemory& memory) {
  if (weight.format == Format::int8 || weight.format == Format::int4) {
    return quantized_rows(pool, rows, weight, memory);
  }
  const auto row_of = [&](int64_t row) { return reinterpret_cast<const std::byte*>(rows.x + row * rows.stride); };
  if (rows.k == weight.padded_k && !wants_chunks(rows.t)) return {.x = row_of(0), .stride = rows.stride * 2};
  const int64_t padded = weight.padded_k * 2;
  return copied_rows(pool, rows.t, rows.k * 2, padded, memory.take(whole_chunks(rows.t) * padded), row_of);
}

}  // namespace quire::QUIRE_ISA
