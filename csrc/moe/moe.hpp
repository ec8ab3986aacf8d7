// A sparse feed-forward block: each row goes through the experts that its router finds likeliest.
// Legend: t rows, e features, n experts, i features inside an expert.
#pragma once

#include <cstdint>

#include "linear/linear.hpp"
#include "pool.hpp"

namespace quire {

struct Expert {
  const PackedWeight* gate;      // [i, e]
  const PackedWeight* up;        // [i, e]
  const PackedWeight* down;      // [e, i]
};

struct MoeWeights {
  const PackedWeight* router;    // [n, e], bf16
  const Expert* experts;         // [n], all of one format
  int64_t num_experts, top_k;
  bool renormalize;              // the chosen experts' probabilities are made to add up to 1
};

// Memory between the products of a call, kept from call to call. One engine has one.
class MoeMemory {
 public:
  // At least so many bytes, whose contents are of no account. Throws std::bad_alloc.
  std::byte* reserve(int64_t bytes);

 private:
  Memory memory_{nullptr, nullptr};
  int64_t size_ = 0;
};

struct MoeCall {
  const MoeWeights* weights;
  int64_t t;
  const uint16_t* x;             // bf16 [t, e]
  int64_t stride;                // elements from row to row
  const uint16_t* residual;      // bf16 [t, e] dense, or null: out = bf16(bf16(sum) + residual)
  uint16_t* out;                 // bf16 [t, e]; may be `residual`, if dense
  int64_t out_stride;
  MoeMemory* memory;
};

// P1: an output row's bits depend on its input row and the weights alone: its experts are added up by rising number.
struct MoeKernels {
  void (*moe)(Pool&, const MoeCall& call);
};

}  // namespace quire
