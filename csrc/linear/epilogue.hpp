// What happens to finished sums: scale, bias, rounding and what is fused with them. One panel's columns of some rows at
// a time, while the sums are in cache; all columns of a row before the next, since rows of the output lie far apart and
// a cache line of it is a panel wide.
#pragma once

#include "linear/formats.hpp"
#include "linear/linear.hpp"
#include "linear/tile.hpp"
#include "simd.hpp"

namespace quire::QUIRE_ISA {

// One vector of output features of a weight: sums become results, rows apart.
template <Format format>
struct Finish {
  F scale{}, bias{};
  bool has_bias = false;

  Finish() = default;
  Finish(const PackedWeight& weight, const bf16* bias_n, int64_t column, int64_t count) : has_bias(bias_n != nullptr) {
    if constexpr (format == Format::int8 || format == Format::fp8) scale = load(weight.scale + column);
    if (has_bias) bias = load_part(bias_n + column, count);
  }

  F operator()(const float* sums, const TileRows& rows, int64_t row) const {
    F y = load(sums);
    if constexpr (format == Format::int8) {
      const I whole = load_sum<I>(sums) - 128 * rows.sum[row];
      y = to_float(whole) * (scale * set(rows.scale[row]));
    }
    if constexpr (format == Format::fp8) y = y * scale;
    return has_bias ? y + bias : y;
  }
};

template <class To>
inline void put(To* to, F value, int64_t count) {
  if (count == kLanes) {
    store(to, value);
  } else {
    store_part(to, value, count);
  }
}

template <Format format>
struct FinishPanel {
  Finish<format> of[kPanelVectors];

  FinishPanel(const PackedWeight& weight, const bf16* bias_n, int64_t panel) {
    for (int64_t v = 0; v < kPanelVectors; ++v) {
      const int64_t column = panel * kPanel + v * kLanes, left = weight.n - column;
      if (left > 0) of[v] = {weight, bias_n, column, left < kLanes ? left : kLanes};
    }
  }
};

// Calls `body(row, v, count)` for the `count` columns of each vector v of each row.
template <class Body>
inline void for_vectors_of_rows(int64_t num_rows, int64_t columns, const Body& body) {
  if (columns >= kPanel) {
    for (int64_t row = 0; row < num_rows; ++row) {
#pragma GCC unroll 8
      for (int64_t v = 0; v < kPanelVectors; ++v) body(row, v, static_cast<int64_t>(kLanes));
    }
    return;
  }
  for (int64_t row = 0; row < num_rows; ++row) {
    for (int64_t v = 0; v * kLanes < columns; ++v) {
      body(row, v, columns - v * kLanes < kLanes ? columns - v * kLanes : kLanes);
    }
  }
}

template <Format format>
inline void finish_panel(const Product& product, int64_t panel, const TileRows& rows, int64_t first_row,
                         int64_t num_rows, const float* sums, const float* up_sums) {
  const int64_t first = panel * kPanel, columns = product.weight->n - first;
  const FinishPanel<format> finish(*product.weight, product.bias, panel);
  const auto for_each = [&](const auto& body) {
    for_vectors_of_rows(num_rows, columns, [&](int64_t row, int64_t v, int64_t count) {
      const int64_t at = row * kPanel + v * kLanes, to = (first_row + row) * product.out_stride + first + v * kLanes;
      body(row, v, count, finish.of[v](sums + at, rows, row), at, to);
    });
  };
  auto* const out = static_cast<bf16*>(product.out);
  switch (product.epilogue) {
    case Epilogue::store:
      for_each([&](int64_t, int64_t, int64_t count, F y, int64_t, int64_t to) { put(out + to, y, count); });
      break;
    case Epilogue::store_float: {
      auto* const wide = static_cast<float*>(product.out);
      for_each([&](int64_t, int64_t, int64_t count, F y, int64_t, int64_t to) { put(wide + to, y, count); });
      break;
    }
    case Epilogue::add_residual:
      for_each([&](int64_t, int64_t, int64_t count, F y, int64_t, int64_t to) {
        const F residual = count == kLanes ? load(product.residual + to) : load_part(product.residual + to, count);
        put(out + to, through_bf16(y) + residual, count);
      });
      break;
    case Epilogue::silu_mul: {
      const FinishPanel<format> finish_up(*product.up, product.up_bias, panel);
      for_each([&](int64_t row, int64_t v, int64_t count, F y, int64_t at, int64_t to) {
        const F up = through_bf16(finish_up.of[v](up_sums + at, rows, row));
        put(out + to, through_bf16(silu(through_bf16(y))) * up, count);
      });
      break;
    }
  }
}

// `rows` begins at `first_row` of the call; `sums` as `panel_sums` left them, `up_sums` for silu_mul only.
inline void finish_panel(const Product& product, int64_t panel, const TileRows& rows, int64_t first_row,
                         int64_t num_rows, const float* sums, const float* up_sums) {
  switch (product.weight->format) {
    case Format::bf16: return finish_panel<Format::bf16>(product, panel, rows, first_row, num_rows, sums, up_sums);
    case Format::int8: return finish_panel<Format::int8>(product, panel, rows, first_row, num_rows, sums, up_sums);
    case Format::int4: return finish_panel<Format::int4>(product, panel, rows, first_row, num_rows, sums, up_sums);
    case Format::fp8: return finish_panel<Format::fp8>(product, panel, rows, first_row, num_rows, sums, up_sums);
  }
}

}  // namespace quire::QUIRE_ISA
