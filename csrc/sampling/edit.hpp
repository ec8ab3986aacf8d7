// What happens to a row of logits before it is looked at, one token id at a time. Compiled once: it is not worth vectors.
#pragma once

#include <cstdint>

#include "sampling/sampling.hpp"

namespace quire {

// Applies a row's allowed and forbidden tokens, biases and penalties in place. `marks` has room for v bits.
void edit_logits(const SampleCall& call, const SampleRow& row, float* logits_v, uint64_t* marks);

// A number in [0, 1) by counter: `ops/randomness.py`.
double uniform(int64_t seed, int64_t position);

// Sorts keys upwards.
void sort_keys(uint64_t* keys, int64_t n);

}  // namespace quire
