// y = x W^T for one instruction set. A call is cut into tasks, each some panels of 32 output features by a block of
// input rows, which threads claim as they get free. Row blocks are as many rows as fit the second-level cache beside a
// panel, so that with many rows each weight is read from memory once per block; with few rows there is one block, and
// the weights stream by once. Tasks of one row block follow each other, so threads share its place in memory.
#include "linear/epilogue.hpp"
#include "linear/linear.hpp"
#include "linear/pack.hpp"
#include "linear/prepare.hpp"
#include "linear/probe.hpp"
#include "linear/quantize.hpp"
#include "linear/tile.hpp"
#include "linear/tile_amx.hpp"
#include "simd.hpp"

namespace quire::QUIRE_ISA {
namespace {

constexpr int64_t kBlockBytes = 1 << 19;      // of input rows, in the second-level cache
constexpr int64_t kMaxBlockRows = 384;
constexpr int64_t kTaskWeightBytes = 1 << 18;  // read by a task, at most

#if defined(__AMX_TILE__)
constexpr int64_t kRowStep = 2 * kTileRows, kSpare = kAmxSpare;
constexpr int64_t kFewRowsOfParts = 8;  // each row's parts cost vectors some multiplying of their own
#else
constexpr int64_t kRowStep = kMaxTileRows, kSpare = kWideSteps * kPanelRow;
#endif

// Whole numbers are the same bits by vectors and by tiles; few rows stream faster by vectors.
void sums_of(const PackedWeight& weight, int64_t panel, const TileRows& rows, int64_t num_rows,
             float* out, std::byte* spare) {
#if defined(__AMX_TILE__)
  const bool exact = weight.format == Format::int8 || weight.format == Format::int4;
  const int64_t few = weight.multiplier == nullptr ? kMaxTileRows : kFewRowsOfParts;
  if (!exact || num_rows > few) return amx_panel_sums(weight, panel, rows, num_rows, out, spare);
#endif
  panel_sums(weight, panel, rows, num_rows, out, spare);
}

int64_t num_panels(const Product& product) { return product.weight->padded_n / kPanel; }

int64_t panel_bytes(const PackedWeight& weight) {
  return kPanel * weight.padded_k * bits_of(weight.format) / 8;
}

// How a call is cut. Which panels and rows share a task has no influence on any sum.
struct Cut {
  int64_t panels = 0;       // of all products
  int64_t task_panels = 1;  // per task; a task has panels of one product only
  int64_t block_rows = 1;
  int64_t column_tasks = 0;
  int64_t row_blocks = 1;

  Cut(const Product* products, int num_products, const TileRows& rows, int64_t t, int threads) {
    for (int i = 0; i < num_products; ++i) panels += num_panels(products[i]);
    const int64_t row_bytes = products[0].weight->padded_k * (rows.scale == nullptr ? 2 : 1);
    block_rows = kBlockBytes / row_bytes;
    block_rows = block_rows < 4 * kRowStep ? 4 * kRowStep : block_rows;
    block_rows = block_rows < kMaxBlockRows ? block_rows : kMaxBlockRows;
    row_blocks = (t + block_rows - 1) / block_rows;
    block_rows = ((t + row_blocks - 1) / row_blocks + kRowStep - 1) / kRowStep * kRowStep;
    row_blocks = (t + block_rows - 1) / block_rows;
    task_panels = kTaskWeightBytes / panel_bytes(*products[0].weight);
    const int64_t fair = panels * row_blocks / (4 * threads);
    task_panels = task_panels < fair ? task_panels : fair;
    task_panels = task_panels < 1 ? 1 : task_panels;
    for (int i = 0; i < num_products; ++i) column_tasks += (num_panels(products[i]) + task_panels - 1) / task_panels;
  }
};

void linear(Pool& pool, const Rows& rows, const Product* products, int num_products) {
  if (rows.t == 0 || num_products == 0) return;
  CallMemory memory(pool);
  const TileRows all = prepare(pool, rows, *products[0].weight, memory);
  const Cut cut(products, num_products, all, rows.t, pool.threads());
  const int64_t sums_bytes = cut.block_rows * kPanel * 4;
  const auto body = [&](int64_t task, int thread) {
    const int64_t first_row = task / cut.column_tasks * cut.block_rows;
    const int64_t num_rows = rows.t - first_row < cut.block_rows ? rows.t - first_row : cut.block_rows;
    int64_t column = task % cut.column_tasks;
    const Product* product = products;
    for (;; ++product) {
      const int64_t tasks = (num_panels(*product) + cut.task_panels - 1) / cut.task_panels;
      if (column < tasks) break;
      column -= tasks;
    }
    const TileRows block = skip_rows(all, first_row);
    auto* const sums = reinterpret_cast<float*>(pool.scratch(thread));
    auto* const up_sums = sums + cut.block_rows * kPanel;
    auto* const spare = reinterpret_cast<std::byte*>(up_sums + cut.block_rows * kPanel);
    const int64_t end = (column + 1) * cut.task_panels;
    const int64_t last = end < num_panels(*product) ? end : num_panels(*product);
    for (int64_t panel = column * cut.task_panels; panel < last; ++panel) {
      sums_of(*product->weight, panel, block, num_rows, sums, spare);
      if (product->epilogue == Epilogue::silu_mul) sums_of(*product->up, panel, block, num_rows, up_sums, spare);
      finish_panel(*product, panel, block, first_row, num_rows, sums, up_sums);
    }
#if defined(__AMX_TILE__)
    _tile_release();
#endif
  };
  parallel_for(pool, cut.column_tasks * cut.row_blocks, static_cast<std::size_t>(2 * sums_bytes + kSpare), body);
}

}  // namespace

extern const LinearKernels linear_kernels;
const LinearKernels linear_kernels = {pack_bf16, pack_int8, pack_fp8, pack_int4,
                                      linear,    quantize_row, multiply_in_registers, read_memory};

}  // namespace quire::QUIRE_ISA
