// y = x W^T, of packed weights in four formats. Legend: t rows, k features in, n features out.
//
// Packed layout, the same for every instruction set: panels of 32 output features, laid end to end; n is padded to 32,
// k to 64, with zeros. A panel is a sequence of 128-byte rows, each holding for its 32 outputs in turn:
//   bf16   2 features in (a pair)                      [n/32][k/2][32][2]
//   int8   4 bytes, each value + 128                   [n/32][k/4][32][4]
//   fp8    4 e4m3 bytes, in the order 0, 2, 1, 3       [n/32][k/4][32][4]
//   int4   8 nibbles: byte j holds feature j in its lower and feature 4 + j in its upper half   [n/32][k/8][32][4]
// A row of 64 bytes holds 16 outputs: a vector of AVX-512, or a row of an AMX tile.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

#include "memory.hpp"
#include "pool.hpp"

namespace quire {

enum class Format : int { bf16 = 0, int8 = 1, int4 = 2, fp8 = 3 };
inline constexpr int64_t kPanel = 32;
constexpr int bits_of(Format format) { return format == Format::bf16 ? 16 : format == Format::int4 ? 4 : 8; }

// Memory for many weights: laid end to end in large pieces, since a piece of its own for each would seldom be large
// enough for a huge page. A piece lives as long as a weight in it. For one thread at a time.
class Arena {
 public:
  std::shared_ptr<std::byte> take(int64_t bytes);

 private:
  std::shared_ptr<std::byte> piece_;
  int64_t used_ = 0, size_ = 0;
};

// A weight as the kernels read it. Scales and zeros are padded like the panels.
struct PackedWeight {
  Format format;
  int64_t n, k;                    // as the model has them
  int64_t padded_n, padded_k;
  int64_t group_size;              // int4: features that share a scale, of the weight and of rows; 0 otherwise
  int64_t sub_size;                // int4: features that share a zero or a multiplier: group_size or less; 0 otherwise
  int64_t nbytes;                  // of all that follows
  std::byte* data;                 // panels
  float* scale;                    // int8, fp8: [padded_n]; int4: [panel][k / group_size][32]; null for bf16
  uint16_t* narrow_scale;          // int4 whose scales all are numbers of bf16: those, and `scale` is null
  float* zero_scale;               // int4 with zero points: zero * scale, laid out like scale; null where all are 8
  int8_t* multiplier;              // int4 whose scales are whole multiples of a group's step (then `scale`), -15..15:
                                   // [panel][k / sub_size][32]; null where each sub group is a group
  std::shared_ptr<std::byte> memory;  // all of the above lie in it
};

// Memory for a weight, its fields set, its contents yet to be packed. Throws std::bad_alloc.
PackedWeight make_packed(Arena& arena, Format format, int64_t n, int64_t k, int64_t group_size = 0, int64_t sub_size = 0,
                         bool zero_points = false, bool narrow_scales = false);

// What happens to a finished sum `y` (bias added where there is one), besides rounding to bf16.
enum class Epilogue : int {
  store = 0,         // out = bf16(y)
  store_float = 1,   // out = y, float32
  add_residual = 2,  // out = bf16(bf16(y) + residual); residual and out may be the same memory
  silu_mul = 3,      // out = bf16(bf16(silu(bf16(y))) * bf16(y of `up`)): `weight` is the gate's
};

// One product of a call. Several (q, k and v) share the input rows. Strides are in elements.
struct Product {
  const PackedWeight* weight;
  const PackedWeight* up;          // silu_mul only
  const uint16_t* bias;            // bf16 [n] or null
  const uint16_t* up_bias;
  Epilogue epilogue;
  const uint16_t* residual;        // bf16 [t, n], stride out_stride
  void* out;                       // bf16 or float32 [t, n]
  int64_t out_stride;
};

// Rows of activations: bf16 always, and the quantised form if some weight wants 8-bit rows.
struct QuantizedRows {
  int64_t group_size;              // features per scale; k for int8 weights
  int64_t sub_size;                // features per sum: group_size, or a divisor of it
  int8_t* values;                  // [t, padded k], zeros beyond k
  float* scale;                    // [t, groups]: 1 group if group_size is k, else padded k / group_size
  int32_t* sum;                    // [t, groups * group_size / sub_size]: sums of values
};

struct Rows {
  int64_t t, k;
  const uint16_t* x;               // bf16 [t, k]
  int64_t stride;                  // elements from row to row
  const QuantizedRows* quantized;  // null: the call quantises by itself where its weights need it
};

enum class Probe : int { bf16 = 0, int8 = 1, fp32 = 2 };

struct LinearKernels {
  // Packs a plain weight into `packed`, whose fields and memory are set.
  void (*pack_bf16)(Pool&, const uint16_t* weight_nk, PackedWeight& packed);
  void (*pack_int8)(Pool&, const int8_t* values_nk, const float* scale_n, PackedWeight& packed);
  void (*pack_fp8)(Pool&, const uint8_t* values_nk, const float* scale_n, PackedWeight& packed);
  void (*pack_int4)(Pool&, const uint8_t* nibbles_nk2, const float* scale_ng, const uint8_t* zero_ng,
                    const int8_t* multiplier_ns, PackedWeight& packed);
  // Products of one input, all of one format. P1: an output row's bits depend on its input row and the weights alone.
  void (*linear)(Pool&, const Rows& rows, const Product* products, int num_products);
  // One row at a time into values/scale/sum, as `ops.linear.quantize_rows` defines it.
  void (*quantize_row)(const uint16_t* x_k, int64_t k, int64_t padded_k, int64_t group_size, int64_t sub_size,
                       int8_t* values, float* scale, int32_t* sum);
  // What the set's dot products give at most, and reading memory does. The first returns the multiply-adds it did.
  int64_t (*multiply_in_registers)(Pool&, Probe kind);
  void (*read_memory)(Pool&, const std::byte* data, int64_t bytes);
};

}  // namespace quire
