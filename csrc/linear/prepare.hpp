// Input rows as the tiles want them: quantised where the weights ask for it, padded where k is no multiple of 64. Rows
// that are fit as they are stay where they are.
#pragma once

#include <cstdlib>
#include <new>

#include "linear/linear.hpp"
#include "linear/quantize.hpp"
#include "linear/tile.hpp"
#include "simd.hpp"

namespace quire::QUIRE_ISA {

// Memory of one call.
class CallMemory {
 public:
  CallMemory() = default;
  CallMemory(const CallMemory&) = delete;
  CallMemory& operator=(const CallMemory&) = delete;
  ~CallMemory() { std::free(data_); }

  std::byte* take(int64_t bytes) {
    data_ = static_cast<std::byte*>(std::aligned_alloc(64, static_cast<std::size_t>((bytes + 63) / 64 * 64)));
    if (data_ == nullptr) throw std::bad_alloc();
    return data_;
  }

 private:
  std::byte* data_ = nullptr;
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

inline TileRows quantized_rows(Pool& pool, const Rows& rows, const PackedWeight& weight, CallMemory& memory) {
  const int64_t group_size = weight.format == Format::int8 ? rows.k : weight.group_size;
  const int64_t groups = num_groups(rows.k, weight.padded_k, group_size);
  const QuantizedRows* given = rows.quantized;
  if (given != nullptr && given->group_size == group_size) {
    return {reinterpret_cast<const std::byte*>(given->values), weight.padded_k, given->scale, given->sum, groups};
  }
  std::byte* const values = memory.take(rows.t * (weight.padded_k + groups * 8));
  auto* const scale = reinterpret_cast<float*>(values + rows.t * weight.padded_k);
  auto* const sum = reinterpret_cast<int32_t*>(scale + rows.t * groups);
  for_row_blocks(pool, rows.t, [&](int64_t row) {
    quantize_row(rows.x + row * rows.stride, rows.k, weight.padded_k, group_size,
                 reinterpret_cast<int8_t*>(values + row * weight.padded_k), scale + row * groups, sum + row * groups);
  });
  return {values, weight.padded_k, scale, sum, groups};
}

inline TileRows padded_rows(Pool& pool, const Rows& rows, const PackedWeight& weight, CallMemory& memory) {
  const int64_t bytes = rows.k * 2, padded_bytes = weight.padded_k * 2;
  std::byte* const copy = memory.take(rows.t * padded_bytes);
  for_row_blocks(pool, rows.t, [&](int64_t row) {
    std::byte* const to = copy + row * padded_bytes;
    std::memcpy(to, rows.x + row * rows.stride, static_cast<std::size_t>(bytes));
    std::memset(to + bytes, 0, static_cast<std::size_t>(padded_bytes - bytes));
  });
  return {copy, padded_bytes, nullptr, nullptr, 0};
}

// All rows of a call, for weights like `weight`.
inline TileRows prepare(Pool& pool, const Rows& rows, const PackedWeight& weight, CallMemory& memory) {
  if (weight.format == Format::int8 || weight.format == Format::int4) {
    return quantized_rows(pool, rows, weight, memory);
  }
  if (rows.k != weight.padded_k) return padded_rows(pool, rows, weight, memory);
  return {reinterpret_cast<const std::byte*>(rows.x), rows.stride * 2, nullptr, nullptr, 0};
}

}  // namespace quire::QUIRE_ISA
