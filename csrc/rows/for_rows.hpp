// Loops over rows and over the vectors of a row.
#pragma once

#include <cstddef>
#include <cstdint>

#include "simd.hpp"

namespace quire::QUIRE_ISA {

inline constexpr int64_t kTaskElements = 32768;  // about 10 microseconds of work: what waking a thread is worth
inline constexpr int kTasksPerThread = 4;

// Runs `body(row, thread)` for rows 0..t-1 of `n` elements each; small calls are one task, which the caller runs without
// waking anyone.
template <class Body>
inline void for_rows(Pool& pool, int64_t t, int64_t n, std::size_t scratch_bytes, const Body& body) {
  int64_t rows = kTaskElements / (n + 1) + 1;
  const int64_t share = (t + kTasksPerThread * pool.threads() - 1) / (kTasksPerThread * pool.threads());
  if (rows < share) rows = share;
  parallel_for(pool, (t + rows - 1) / rows, scratch_bytes, [&](int64_t task, int thread) {
    const int64_t begin = task * rows, end = begin + rows < t ? begin + rows : t;
    for (int64_t row = begin; row < end; ++row) body(row, thread);
  });
}

// Runs `body(first, count)` over n elements, a vector at a time; all but the last are whole.
template <class Body>
[[gnu::always_inline]] inline void for_vectors(int64_t n, const Body& body) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) body(i, int64_t{kLanes});
  if (i < n) body(i, n - i);
}

}  // namespace quire::QUIRE_ISA
