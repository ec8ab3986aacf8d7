// A row of logits is one task (several rows of a small vocabulary): what it needs more than once stays in its cache.
//   greedy    one pass: the maximum chunk by chunk, then its place in the first chunk that has it
//   draw      weights = exp((x - max) / T) into scratch; every truncation looks for the last token that survives and
//             then moves the survivors together; at the end, sums by blocks of 256 and a walk through one block
//   last      tokens by rank (bits of a float, lower first) fall into buckets of a thirty-second of a power of two; buckets
//             are added up until the goal is reached, and only that one is sorted. What can hardly matter, far below
//             the likeliest token, is put into buckets only if the goal was not reached without it.
// Nothing is fused and sums have one order, so that every instruction set, and the definition, give the same tokens.
#include "sampling/sampling.hpp"

#include <math.h>

#include "sampling/candidates.hpp"
#include "sampling/edit.hpp"
#include "simd.hpp"

namespace quire::QUIRE_ISA {
namespace {

constexpr int64_t kChunk = 4096;
constexpr int64_t kTaskLogits = 65536;
constexpr double kGreedyBelow = 1e-5;

// The largest of n numbers, the lowest id that has it; NaN if there is a NaN.
struct Best {
  int64_t id;
  float value;
};
Best best_of(const float* x, int64_t n) {
  Best best{0, -INFINITY};
  int64_t chunk_of_best = 0;
  I nan{};
  for (int64_t begin = 0; begin < n; begin += kChunk) {
    const int64_t end = begin + kChunk < n ? begin + kChunk : n;
    F a = set(-INFINITY), b = a;
    int64_t i = begin;
    for (; i + 2 * kLanes <= end; i += 2 * kLanes) {
      const F first = load(x + i), second = load(x + i + kLanes);
      nan |= (first != first) | (second != second);
      a = max(first, a);
      b = max(second, b);
    }
    float most = largest(max(a, b));
    for (; i < end; ++i) {
      if (x[i] != x[i]) nan |= set(-1);
      if (x[i] > most) most = x[i];
    }
    if (most > best.value) {
      best.value = most;
      chunk_of_best = begin;
    }
  }
  if (any(nan)) return {0, NAN};
  for (best.id = chunk_of_best; best.id < n && x[best.id] != best.value;) ++best.id;
  return best;
}

// Alternatives: a short list, best first, that few numbers get into.
int64_t top_of(const float* x, int64_t v, int64_t num, int64_t* ids, float* values) {
  int64_t n = 0;
  const auto consider = [&](int64_t id) {
    if (n == num && !(x[id] > values[n - 1])) return;
    int64_t place = n < num ? n++ : n - 1;
    for (; place > 0 && x[id] > values[place - 1]; --place) {
      ids[place] = ids[place - 1];
      values[place] = values[place - 1];
    }
    ids[place] = id;
    values[place] = x[id];
  };
  if (num <= 0) return 0;
  int64_t i = 0;
  for (; i < v && n < num; ++i) consider(i);
  for (; i + kLanes <= v; i += kLanes) {
    if (!any(load(x + i) > set(values[n - 1]))) continue;
    for (int64_t id = i; id < i + kLanes; ++id) consider(id);
  }
  for (; i < v; ++i) consider(i);
  return n;
}

void tell_logprobs(const SampleCall& call, int64_t s, float most, int64_t num_top) {
  const float* x = call.logits + s * call.stride;
  SampleResult& result = call.results[s];
  double total = 0;
  float weights[kBlock];
  for (int64_t begin = 0; begin < call.v; begin += kBlock) {
    const int64_t n = call.v - begin < kBlock ? call.v - begin : kBlock;
    if (n < kBlock) std::memset(weights, 0, sizeof weights);
    for (int64_t i = 0; i < n; i += kLanes) {
      const int64_t count = n - i < kLanes ? n - i : kLanes;
      store_part(weights + i, exp_unfused(load_part(x + begin + i, count) - set(most)), count);
    }
    total += block_sum([&](int64_t i) { return static_cast<double>(weights[i]); });
  }
  const double log_of_sum = ::log(total);
  const auto logprob = [&](float logit) {
    return static_cast<float>(static_cast<double>(logit) - static_cast<double>(most) - log_of_sum);
  };
  const float own = x[result.token_id];
  int64_t above = 0, i = 0;
  I above_by_lane{};
  for (; i + kLanes <= call.v; i += kLanes) above_by_lane -= load(x + i) > set(own);
  for (; i < call.v; ++i) above += x[i] > own ? 1 : 0;
  int32_t lanes[kLanes];
  store(lanes, above_by_lane);
  for (const int32_t lane : lanes) above += lane;
  result.rank = above + 1;
  result.logprob = static_cast<double>(logprob(own));
  float* values = call.top_logprobs + s * call.max_top;
  const int64_t n = top_of(x, call.v, num_top, call.top_ids + s * call.max_top, values);
  for (int64_t place = 0; place < n; ++place) values[place] = logprob(values[place]);
}

// What a thread needs besides the logits, in one piece of memory.
struct Workspace {
  Candidates candidates;
  float* changed;
  uint64_t* marks;
};

std::size_t lay_out(std::byte* memory, int64_t v, Workspace& space) {
  const auto padded = static_cast<std::size_t>((v + kBlock - 1) / kBlock * kBlock);
  std::size_t used = 0;
  const auto take = [&](std::size_t bytes) {
    std::byte* place = memory + used;
    used += (bytes + 63) / 64 * 64;
    return place;
  };
  Candidates& c = space.candidates;
  c.weights = reinterpret_cast<float*>(take(padded * sizeof(float)));
  c.depths = reinterpret_cast<float*>(take(padded * sizeof(float)));
  c.ids = reinterpret_cast<int32_t*>(take(padded * sizeof(int32_t)));
  c.sums = reinterpret_cast<double*>(take(padded / kBlock * sizeof(double)));
  c.buckets = reinterpret_cast<double*>(take(kNumBuckets * sizeof(double)));
  c.keys = reinterpret_cast<uint64_t*>(take(padded * sizeof(uint64_t)));
  space.changed = reinterpret_cast<float*>(take(padded * sizeof(float)));
  space.marks = reinterpret_cast<uint64_t*>(take(padded / 8));
  return used;
}

void sample_row(const SampleCall& call, int64_t s, Workspace& space) {
  const SampleRow& row = call.rows[s];
  const float* raw = call.logits + s * call.stride;
  SampleResult& result = call.results[s];
  result = {0, static_cast<int64_t>(SampleStatus::sampled), 0, 0.0};
  const Best likeliest = best_of(raw, call.v);
  if (!__builtin_isfinite(likeliest.value)) {
    result.status = static_cast<int64_t>(SampleStatus::not_finite);
    return;
  }
  const float* x = raw;
  Best best = likeliest;
  if (row.changed != 0) {
    std::memcpy(space.changed, raw, static_cast<std::size_t>(call.v) * sizeof(float));
    edit_logits(call, row, space.changed, space.marks);
    x = space.changed;
    best = best_of(x, call.v);
    if (!__builtin_isfinite(best.value)) {
      result.status = static_cast<int64_t>(SampleStatus::nothing_left);
      return;
    }
  }
  result.token_id = best.id;
  if (row.temperature >= kGreedyBelow) {
    space.candidates.with_depths = row.typical_p < 1.0;
    weigh(x, call.v, best.value, row.temperature, space.candidates);
    truncate(row, space.candidates);
    result.token_id = invert(space.candidates, uniform(row.seed, row.position));
  }
  if (row.num_top >= 0) tell_logprobs(call, s, likeliest.value, row.num_top);
}

template <class Body>
void for_rows(Pool& pool, const SampleCall& call, std::size_t scratch_bytes, const Body& body) {
  const int64_t rows = kTaskLogits / (call.v + 1) + 1;
  parallel_for(pool, (call.s + rows - 1) / rows, scratch_bytes, [&](int64_t task, int thread) {
    for (int64_t s = task * rows; s < call.s && s < (task + 1) * rows; ++s) body(s, thread);
  });
}

void sample(Pool& pool, const SampleCall& call) {
  bool plain = true;
  for (int64_t s = 0; s < call.s; ++s) {
    plain = plain && call.rows[s].changed == 0 && call.rows[s].temperature < kGreedyBelow;
  }
  Workspace sizes;
  const std::size_t bytes = plain ? 0 : lay_out(nullptr, call.v, sizes);
  for_rows(pool, call, bytes, [&](int64_t s, int thread) {
    Workspace space{};
    if (!plain) lay_out(pool.scratch(thread), call.v, space);
    sample_row(call, s, space);
  });
}

void token_logprobs(Pool& pool, const SampleCall& call, const int64_t* token_ids) {
  for_rows(pool, call, 0, [&](int64_t s, int) {
    SampleResult& result = call.results[s];
    result = {token_ids[s], static_cast<int64_t>(SampleStatus::sampled), 0, 0.0};
    const Best best = best_of(call.logits + s * call.stride, call.v);
    if (__builtin_isfinite(best.value)) {
      tell_logprobs(call, s, best.value, call.max_top);
    } else {
      result.status = static_cast<int64_t>(SampleStatus::not_finite);
    }
  });
}

}  // namespace

extern const SamplingKernels sampling_kernels;
const SamplingKernels sampling_kernels = {sample, token_logprobs};

}  // namespace quire::QUIRE_ISA
