// Input rows as the tiles want them: quantised where the weights ask for it, padded where k is no multiple of 64, cut in
// chunks for AMX tiles. Rows that are fit as they are stay where they are.
#pragma once

#include <cstdlib>
#include <new>

#include "linear/linear.hpp"
#include "linear/quantize.hpp"
#include "linear/tile.hpp"
#include "linear/tile_amx.hpp"
#include "simd.hpp"

namespace quire::QUIRE_ISA {

// Memory of one call.
class CallMemory {
 public:
  CallMemory() = default;
  CallMemory(const CallMemory&) = delete;
  CallMemory& operator=(const CallMemory&) = delete;
  ~CallMemory() {
    for (std::byte* piece : pieces_) std::free(piece);
  }

  // At most twice.
  std::byte* take(int64_t bytes) {
    std::byte*& piece = pieces_[pieces_[0] == nullptr ? 0 : 1];
    piece = static_cast<std::byte*>(std::aligned_alloc(64, static_cast<std::size_t>((bytes + 63) / 64 * 64)));
    if (piece == nullptr) throw std::bad_alloc();
    return piece;
  }

 private:
  std::byte* pieces_[2] = {};
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

// Copies rows, `row_of(row)` giving each one's bytes, padded with zeros to `padded` and in chunks if there are many.
template <class RowOf>
inline TileRows copied_rows(Pool& pool, int64_t num_rows, int64_t bytes, int64_t padded, std::byte* to,
                            const RowOf& row_of) {
  const bool chunked = wants_chunks(num_rows);
  for_row_blocks(pool, num_rows, [&](int64_t row) {
    const std::byte* const from = row_of(row);
    const int64_t piece = chunked ? kTileBytes : padded;
    for (int64_t at = 0; at < padded; at += piece) {
      std::byte* const piece_to = chunked ? chunk_at(to, padded, row, at) : to + row * padded;
      const int64_t left = bytes - at, count = left < 0 ? 0 : left < piece ? left : piece;
      if (count == kTileBytes) {
        std::memcpy(piece_to, from + at, kTileBytes);
      } else {
        std::memcpy(piece_to, from + at, static_cast<std::size_t>(count));
        std::memset(piece_to + count, 0, static_cast<std::size_t>(piece - count));
      }
    }
  });
  return {.x = to, .stride = chunked ? kTileBytes : padded, .chunked = chunked, .row_bytes = padded};
}

inline int64_t whole_chunks(int64_t rows) { return (rows + kTileRows - 1) / kTileRows * kTileRows; }

inline TileRows quantized_rows(Pool& pool, const Rows& rows, const PackedWeight& weight, CallMemory& memory) {
  const int64_t group_size = weight.format == Format::int8 ? rows.k : weight.group_size, padded = weight.padded_k;
  const int64_t groups = num_groups(rows.k, padded, group_size), many = whole_chunks(rows.t);
  QuantizedRows quantized{};
  if (rows.quantized != nullptr && rows.quantized->group_size == group_size) {
    quantized = *rows.quantized;
  } else {
    quantized.values = reinterpret_cast<int8_t*>(memory.take(rows.t * (padded + groups * 8)));
    quantized.scale = reinterpret_cast<float*>(quantized.values + rows.t * padded);
    quantized.sum = reinterpret_cast<int32_t*>(quantized.scale + rows.t * groups);
    for_row_blocks(pool, rows.t, [&](int64_t row) {
      quantize_row(rows.x + row * rows.stride, rows.k, padded, group_size, quantized.values + row * padded,
                   quantized.scale + row * groups, quantized.sum + row * groups);
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
