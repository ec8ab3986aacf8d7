#include "stack/stack.hpp"

#include <algorithm>
#include <cstring>

namespace quire {
namespace {

// How a weight wants its input rows quantised: features per scale and per sum; 0: not at all.
struct Wanted {
  int64_t group = 0, sub = 0;
  bool operator==(const Wanted&) const = default;
};

Wanted wanted(const PackedWeight& weight) {
  if (weight.format == Format::int8) return {weight.k, weight.k};
  return weight.format == Format::int4 ? Wanted{weight.group_size, weight.sub_size} : Wanted{};
}

int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

Product store_to(const Linear& linear, uint16_t* out, int64_t stride) {
  return {linear.weight, nullptr, linear.bias, nullptr, Epilogue::store, nullptr, out, stride};
}

Product add_to(const Linear& linear, uint16_t* residual, int64_t stride) {
  return {linear.weight, nullptr, linear.bias, nullptr, Epilogue::add_residual, residual, residual, stride};
}

bool same_input(const Product& one, const Product& other) {
  return one.weight->format == other.weight->format && wanted(*one.weight) == wanted(*other.weight);
}

}  // namespace

void Stack::reserve(int64_t t) {
  if (t <= reserved_) return;
  const int64_t padded = round_up(shape_.hidden, 64);
  const int64_t qkv = (shape_.num_heads + 2 * shape_.num_kv_heads) * shape_.head_dim;
  residual_.resize(t * shape_.hidden);
  normed_.resize(t * shape_.hidden);
  qkv_.resize(t * qkv);
  attended_.resize(t * shape_.num_heads * shape_.head_dim);
  inner_.resize(t * shape_.inner);
  step_cos_.resize(t * shape_.rope_half);
  step_sin_.resize(t * shape_.rope_half);
  quantized_.resize(t * padded);
  quantized_scale_.resize(t * (padded / 32));
  quantized_sum_.resize(t * (padded / 32));
  reserved_ = t;
}

void Stack::forward(const StackStep& step) {
  reserve(step.t);
  backend_.rows.embedding(backend_.pool, step.token_ids, embedding_, residual_.data(), step.t, shape_.hidden);
  for (int64_t row = 0; row < step.t; ++row) {
    const auto bytes = static_cast<std::size_t>(shape_.rope_half) * sizeof(float);
    const int64_t from = step.positions[row] * shape_.rope_half, to = row * shape_.rope_half;
    std::memcpy(step_cos_.data() + to, cos_ + from, bytes);
    std::memcpy(step_sin_.data() + to, sin_ + from, bytes);
  }
  KvLayer kv = step.kv;
  for (std::size_t index = 0; index < layers_.size(); ++index) {
    attention_block(layers_[index], step, kv);
    // Behind the last layer's attention, only the wanted rows matter.
    const bool last = index + 1 == layers_.size();
    if (last) keep_rows(step);
    output_and_mlp(layers_[index], last ? step.s : step.t);
    kv.keys += step.layer_bytes;
    kv.values += step.layer_bytes;
  }
  if (step.s == 0) return;
  backend_.rows.norm(backend_.pool, {.x = residual_.data(), .x_stride = shape_.hidden, .residual = nullptr,
                                     .sum = nullptr, .weight = norm_, .bias = nullptr, .centered = false,
                                     .eps = shape_.eps, .weight_offset = 0, .t = step.s, .n = shape_.hidden,
                                     .out = step.out, .out_stride = shape_.hidden, .quantized = nullptr});
}

void Stack::attention_block(const StackLayer& layer, const StackStep& step, const KvLayer& kv) {
  const int64_t d = shape_.head_dim, q_size = shape_.num_heads * d, kv_size = shape_.num_kv_heads * d;
  const int64_t stride = q_size + 2 * kv_size;
  uint16_t* q = qkv_.data();
  uint16_t* k = q + q_size;
  uint16_t* v = k + kv_size;
  const Product products[] = {store_to(layer.q, q, stride), store_to(layer.k, k, stride), store_to(layer.v, v, stride)};
  normed_linears(layer.attention_norm, step.t, products, 3);
  RopeCall turn{.x = q, .stride = stride, .num_heads = shape_.num_heads, .head_dim = d, .norm_weight = layer.q_norm,
                .eps = shape_.eps, .weight_offset = 0, .cos = step_cos_.data(), .sin = step_sin_.data(),
                .half = shape_.rope_half, .t = step.t};
  RopeCall turns[] = {turn, turn};
  turns[1].x = k;
  turns[1].num_heads = shape_.num_kv_heads;
  turns[1].norm_weight = layer.k_norm;
  backend_.rows.rope(backend_.pool, turns, 2);
  backend_.attention.write_kv(backend_.pool, kv, k, stride, v, stride, step.slots, step.t);
  backend_.attention.attention(backend_.pool, {.q = q, .q_stride = stride, .num_heads = shape_.num_heads, .kv = kv,
                                               .requests = step.requests, .options = shape_.attention,
                                               .out = attended_.data(), .out_stride = q_size});
}

void Stack::keep_rows(const StackStep& step) {
  const auto gather = [&](const Buffer<uint16_t>& values, int64_t width) {
    for (int64_t row = 0; row < step.s; ++row) {
      std::memmove(values.data() + row * width, values.data() + step.rows[row] * width,
                   static_cast<std::size_t>(width) * sizeof(uint16_t));
    }
  };
  gather(residual_, shape_.hidden);
  gather(attended_, shape_.num_heads * shape_.head_dim);
}

void Stack::output_and_mlp(const StackLayer& layer, int64_t t) {
  if (t == 0) return;
  const int64_t q_size = shape_.num_heads * shape_.head_dim;
  const Product output = add_to(layer.o, residual_.data(), shape_.hidden);
  backend_.linear.linear(backend_.pool, {t, q_size, attended_.data(), q_size, nullptr}, &output, 1);
  Product gated = store_to(layer.gate, inner_.data(), shape_.inner);
  gated.up = layer.up.weight;
  gated.up_bias = layer.up.bias;
  gated.epilogue = Epilogue::silu_mul;
  normed_linears(layer.mlp_norm, t, &gated, 1);
  const Product down = add_to(layer.down, residual_.data(), shape_.hidden);
  backend_.linear.linear(backend_.pool, {t, shape_.inner, inner_.data(), shape_.inner, nullptr}, &down, 1);
}

// The norm of the residual stream, in the form that the products' weights want, and the products of it.
void Stack::normed_linears(const uint16_t* norm, int64_t t, const Product* products, int num_products) {
  const auto [group, sub] = wanted(*products[0].weight);
  const bool alike = std::all_of(products, products + num_products, [&](const Product& p) { return same_input(p, products[0]); });
  const bool quantize = alike && group != 0;
  const QuantizedRows quantized{group, sub, quantized_.data(), quantized_scale_.data(), quantized_sum_.data()};
  backend_.rows.norm(backend_.pool, {.x = residual_.data(), .x_stride = shape_.hidden, .residual = nullptr,
                                     .sum = nullptr, .weight = norm, .bias = nullptr, .centered = false,
                                     .eps = shape_.eps, .weight_offset = 0, .t = t, .n = shape_.hidden,
                                     .out = quantize ? nullptr : normed_.data(), .out_stride = shape_.hidden,
                                     .quantized = quantize ? &quantized : nullptr});
  const Rows rows{t, shape_.hidden, normed_.data(), shape_.hidden, quantize ? &quantized : nullptr};
  if (alike) {
    backend_.linear.linear(backend_.pool, rows, products, num_products);
    return;
  }
  for (int index = 0; index < num_products; ++index) backend_.linear.linear(backend_.pool, rows, products + index, 1);
}

}  // namespace quire
