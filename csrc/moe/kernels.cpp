// Row by row the router's logits choose experts; then expert by expert its rows are gathered, go through two calls of the
// linear kernels (gate and up joined in one), and are added, weighted, to float32 sums. All threads work on one expert at a
// time: its weights are read once whatever the number of rows, and no thread waits for another's larger expert.
#include "moe/moe.hpp"

#include "rows/for_rows.hpp"
#include "simd.hpp"

namespace quire::QUIRE_ISA {

extern const LinearKernels linear_kernels;

namespace {

constexpr int64_t kRouteElements = 16;  // what choosing costs per expert, in elements of a plain loop

// A row that an expert gets.
struct Share {
  int32_t row;
  float weight;
};

// What lies in a call's memory.
struct Workspace {
  bf16* logits;      // [t, n]
  int32_t* chosen;   // [t, k] experts, likeliest first
  float* weights;    // [t, k]
  int32_t* begin;    // [n + 1]: where an expert's shares begin
  Share* shares;     // [t * k], by expert, then by row
  bf16* gathered;    // [t, e]
  bf16* inner;       // [t, i]
  bf16* outer;       // [t, e]
  float* sums;       // [t, e]
};

Workspace lay_out(const MoeCall& call, int64_t e, int64_t i) {
  const int64_t t = call.t, n = call.weights->num_experts, k = call.weights->top_k;
  Workspace space{};
  std::byte* memory = nullptr;
  int64_t used = 0;
  const auto take = [&](auto*& place, int64_t count) {
    place = reinterpret_cast<decltype(place + 0)>(memory + used);
    used += (count * static_cast<int64_t>(sizeof *place) + 63) / 64 * 64;
  };
  for (const bool counted : {false, true}) {
    if (counted) memory = call.memory->reserve(used);
    used = 0;
    take(space.logits, t * n);
    take(space.chosen, t * k);
    take(space.weights, t * k);
    take(space.begin, n + 1);
    take(space.shares, t * k);
    take(space.gathered, t * e);
    take(space.inner, t * i);
    take(space.outer, t * e);
    take(space.sums, t * e);
  }
  return space;
}

// The k largest logits, of equal ones the lower expert first, and their probabilities among all.
void route(const bf16* logits, const MoeWeights& weights, int32_t* chosen, float* probability) {
  const int64_t n = weights.num_experts, k = weights.top_k;
  int64_t found = 0;
  for (int64_t expert = 0; expert < n; ++expert) {
    const float logit = widen(logits[expert]);
    if (found == k && !(logit > probability[k - 1])) continue;
    int64_t place = found < k ? found++ : k - 1;
    for (; place > 0 && logit > probability[place - 1]; --place) {
      chosen[place] = chosen[place - 1];
      probability[place] = probability[place - 1];
    }
    chosen[place] = static_cast<int32_t>(expert);
    probability[place] = logit;
  }
  const F most = set(probability[0]);
  F total{};
  for_vectors(n, [&](int64_t first, int64_t count) {
    float lanes[kLanes];
    store(lanes, exp(load_part(logits + first, count) - most));
    total += load_part(lanes, count);
  });
  float of_chosen = 0;
  for (int64_t place = 0; place < k; ++place) {
    float lanes[kLanes];
    store(lanes, exp(set(probability[place]) - most));
    probability[place] = lanes[0];
    of_chosen += lanes[0];
  }
  const float whole = weights.renormalize ? of_chosen : sum(total);
  for (int64_t place = 0; place < k; ++place) probability[place] /= whole;
}

// Shares by expert: counts, then places.
void deal(const Workspace& space, int64_t t, int64_t n, int64_t k) {
  std::memset(space.begin, 0, static_cast<std::size_t>(n + 1) * sizeof(int32_t));
  for (int64_t at = 0; at < t * k; ++at) ++space.begin[space.chosen[at] + 1];
  for (int64_t expert = 0; expert < n; ++expert) space.begin[expert + 1] += space.begin[expert];
  for (int64_t at = 0; at < t * k; ++at) {
    space.shares[space.begin[space.chosen[at]]++] = {static_cast<int32_t>(at / k), space.weights[at]};
  }
  for (int64_t expert = n; expert > 0; --expert) space.begin[expert] = space.begin[expert - 1];
  space.begin[0] = 0;
}

void multiply(Pool& pool, const bf16* x, int64_t rows, int64_t k, int64_t stride, const PackedWeight* weight,
              const PackedWeight* up, bf16* out) {
  Product product{};
  product.weight = weight;
  product.up = up;
  product.epilogue = up != nullptr ? Epilogue::silu_mul : Epilogue::store;
  product.out = out;
  product.out_stride = weight->n;
  linear_kernels.linear(pool, {rows, k, x, stride, nullptr}, &product, 1);
}

void run_expert(Pool& pool, const MoeCall& call, const Workspace& space, const Expert& expert, const Share* shares,
                int64_t rows) {
  const int64_t e = expert.gate->k, i = expert.gate->n;
  const bf16* x = call.x;
  int64_t stride = call.stride;
  if (rows < call.t) {
    for_rows(pool, rows, e, 0, [&](int64_t row, int) {
      std::memcpy(space.gathered + row * e, call.x + shares[row].row * call.stride,
                  static_cast<std::size_t>(e) * sizeof(bf16));
    });
    x = space.gathered;
    stride = e;
  }
  multiply(pool, x, rows, e, stride, expert.gate, expert.up, space.inner);
  multiply(pool, space.inner, rows, i, i, expert.down, nullptr, space.outer);
  for_rows(pool, rows, e, 0, [&](int64_t row, int) {
    float* const sums = space.sums + shares[row].row * e;
    const F weight = set(shares[row].weight);
    for_vectors(e, [&](int64_t first, int64_t count) {
      const F share = load_part(space.outer + row * e + first, count) * weight;
      store_part(sums + first, load_part(sums + first, count) + share, count);
    });
  });
}

void moe(Pool& pool, const MoeCall& call) {
  if (call.t == 0) return;
  const MoeWeights& weights = *call.weights;
  const int64_t t = call.t, n = weights.num_experts, k = weights.top_k;
  const int64_t e = weights.router->k, i = weights.experts[0].gate->n;
  const Workspace space = lay_out(call, e, i);
  multiply(pool, call.x, t, e, call.stride, weights.router, nullptr, space.logits);
  for_rows(pool, t, n * kRouteElements + e, 0, [&](int64_t row, int) {
    route(space.logits + row * n, weights, space.chosen + row * k, space.weights + row * k);
    std::memset(space.sums + row * e, 0, static_cast<std::size_t>(e) * sizeof(float));
  });
  deal(space, t, n, k);
  for (int64_t expert = 0; expert < n; ++expert) {
    const int64_t begin = space.begin[expert], rows = space.begin[expert + 1] - begin;
    if (rows > 0) run_expert(pool, call, space, weights.experts[expert], space.shares + begin, rows);
  }
  for_rows(pool, t, e, 0, [&](int64_t row, int) {
    bf16* const out = call.out + row * call.out_stride;
    for_vectors(e, [&](int64_t first, int64_t count) {
      F sums = load_part(space.sums + row * e + first, count);
      if (call.residual != nullptr) sums = through_bf16(sums) + load_part(call.residual + row * e + first, count);
      store_part(out + first, sums, count);
    });
  });
}

}  // namespace

extern const MoeKernels moe_kernels;
const MoeKernels moe_kernels = {moe};

}  // namespace quire::QUIRE_ISA
