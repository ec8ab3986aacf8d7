// From logits to tokens: `ops/sampling.py` defines what these compute, bit for bit, on every instruction set.
#pragma once

#include <cstdint>

#include "pool.hpp"

namespace quire {

// A run of entries in one of a call's arrays.
struct Span {
  int64_t begin, count;
};

// One row's parameters, as Python packs them (`ops/cpu/sampling.py`): 8 bytes each, in this order.
struct SampleRow {
  double temperature;          // below 1e-5: greedy
  double min_p, top_p, typical_p;
  double repetition_penalty, frequency_penalty, presence_penalty;
  int64_t top_k;               // 0: all
  int64_t seed, position;
  int64_t num_top;             // alternatives to report; -1: no log-probabilities at all
  int64_t changed;             // 0: none of what follows applies
  Span allowed, forbidden;     // of `ids`; allowed.count -1: all are
  Span biased;                 // of `ids`
  int64_t first_bias;          // of `biases`
  Span history;                // of `ids`: prompt and output, if a penalty wants to know
  int64_t num_prompt;
};

enum class SampleStatus : int64_t { sampled = 0, not_finite = 1, nothing_left = 2 };

// What a row gave; the alternatives are in the call's arrays, `max_top` per row.
struct SampleResult {
  int64_t token_id;
  int64_t status;
  int64_t rank;                // 1 is the likeliest; 0: not asked for
  double logprob;
};

struct SampleCall {
  const float* logits;         // [s, v]
  int64_t stride;              // elements from row to row
  int64_t s, v;
  const SampleRow* rows;       // [s]
  const int64_t* ids;          // token ids of all rows; those outside of the vocabulary are passed over
  const double* biases;
  int64_t max_top;             // at least every row's num_top
  SampleResult* results;       // [s]
  int64_t* top_ids;            // [s, max_top]
  float* top_logprobs;         // [s, max_top]
};

// Log-probabilities of given tokens, one a row; `rows` is not looked at, and `max_top` is how many alternatives.
struct SamplingKernels {
  void (*sample)(Pool&, const SampleCall& call);
  void (*token_logprobs)(Pool&, const SampleCall& call, const int64_t* token_ids);
};

}  // namespace quire
