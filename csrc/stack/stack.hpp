// All layers of a standard decoder in one call: no Python between the norm of the first layer and the last norm.
//
// Every step calls the same kernels that the ops call one by one, and rounds where they round, so that both ways give
// the same bits. Legend: t tokens of the step, s rows that are wanted, e hidden size, h query heads, g KV heads,
// d head dim, i inner size of the feed-forward block.
#pragma once

#include <cstdint>
#include <vector>

#include "backend.hpp"
#include "memory.hpp"

namespace quire {

struct StackShape {
  int64_t hidden, inner, num_heads, num_kv_heads, head_dim, rope_half;
  float eps;
  AttentionOptions attention;
};

struct Linear {
  const PackedWeight* weight = nullptr;
  const uint16_t* bias = nullptr;
};

// Norm weights are bf16. Null q_norm and k_norm: heads are not normed.
struct StackLayer {
  const uint16_t* attention_norm;
  Linear q, k, v, o;
  const uint16_t* q_norm;
  const uint16_t* k_norm;
  const uint16_t* mlp_norm;
  Linear gate, up, down;
};

struct StackStep {
  int64_t t, s;
  const int64_t* token_ids;   // [t]
  const int64_t* positions;   // [t]
  const int64_t* slots;       // [t]
  const int64_t* rows;        // [s], rising
  PagedRequests requests;
  KvLayer kv;                 // of the first layer; the others follow at layer_bytes
  int64_t layer_bytes;
  uint16_t* out;              // [s, e]: normed hidden states of `rows`
};

class Stack {
 public:
  Stack(Backend& backend, const StackShape& shape, const uint16_t* embedding, const uint16_t* norm, const float* cos,
        const float* sin)
      : backend_(backend), shape_(shape), embedding_(embedding), norm_(norm), cos_(cos), sin_(sin) {}

  void add_layer(const StackLayer& layer) { layers_.push_back(layer); }
  int64_t num_layers() const { return static_cast<int64_t>(layers_.size()); }

  // Writes K and V of the step's tokens, and the wanted rows' hidden states. One call at a time.
  void forward(const StackStep& step);

 private:
  void reserve(int64_t t);
  void attention_block(const StackLayer& layer, const StackStep& step, const KvLayer& kv);
  void output_and_mlp(const StackLayer& layer, int64_t t);
  void normed_linears(const uint16_t* norm, int64_t t, const Product* products, int num_products);
  void keep_rows(const StackStep& step);

  Backend& backend_;
  StackShape shape_;
  const uint16_t* embedding_;
  const uint16_t* norm_;
  const float* cos_;
  const float* sin_;
  std::vector<StackLayer> layers_;

  // Activations, grown to the largest step seen.
  int64_t reserved_ = 0;
  Buffer<uint16_t> residual_, normed_, qkv_, attended_, inner_;
  Buffer<float> step_cos_, step_sin_;
  Buffer<int8_t> quantized_;
  Buffer<float> quantized_scale_;
  Buffer<int32_t> quantized_sum_;
};

}  // namespace quire
