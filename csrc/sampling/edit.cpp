#include "sampling/edit.hpp"

#include <algorithm>
#include <cstring>
#include <limits>
#include <vector>

namespace quire {
namespace {

constexpr float kNever = -std::numeric_limits<float>::infinity();

// Runs `body(id, index)` for the ids of a span that the vocabulary has.
template <class Body>
void for_ids(const SampleCall& call, const Span& span, const Body& body) {
  for (int64_t i = 0; i < span.count; ++i) {
    const int64_t id = call.ids[span.begin + i];
    if (id >= 0 && id < call.v) body(id, i);
  }
}

void clear(uint64_t* marks, int64_t v) {
  std::memset(marks, 0, static_cast<std::size_t>(v + 63) / 64 * sizeof(uint64_t));
}

// Marks an id and says whether it was marked before.
bool mark(uint64_t* marks, int64_t id) {
  const uint64_t bit = uint64_t{1} << (id % 64);
  const bool before = (marks[id / 64] & bit) != 0;
  marks[id / 64] |= bit;
  return before;
}

void allow_only(const SampleCall& call, const Span& allowed, float* logits, uint64_t* marks) {
  clear(marks, call.v);
  for_ids(call, allowed, [&](int64_t id, int64_t) { mark(marks, id); });
  for (int64_t id = 0; id < call.v; ++id) {
    if ((marks[id / 64] >> (id % 64) & 1) == 0) logits[id] = kNever;
  }
}

// Each id once, however often it came.
void penalise_repetition(const SampleCall& call, const SampleRow& row, float* logits, uint64_t* marks) {
  clear(marks, call.v);
  const auto penalty = static_cast<float>(row.repetition_penalty);
  for_ids(call, row.history, [&](int64_t id, int64_t) {
    if (mark(marks, id)) return;
    logits[id] = logits[id] > 0 ? logits[id] / penalty : logits[id] * penalty;
  });
}

// By how often an id came in the output: counted by sorting, of `ids` no copy larger than the output.
void penalise_frequency(const SampleCall& call, const SampleRow& row, float* logits) {
  const Span output{row.history.begin + row.num_prompt, row.history.count - row.num_prompt};
  std::vector<int64_t> sorted;
  sorted.reserve(static_cast<std::size_t>(std::max<int64_t>(0, output.count)));
  for_ids(call, output, [&](int64_t id, int64_t) { sorted.push_back(id); });
  std::sort(sorted.begin(), sorted.end());
  const auto frequency = static_cast<float>(row.frequency_penalty), presence = static_cast<float>(row.presence_penalty);
  for (auto first = sorted.begin(); first != sorted.end();) {
    const auto last = std::upper_bound(first, sorted.end(), *first);
    const float times = frequency * static_cast<float>(last - first);
    logits[*first] -= times + presence;
    first = last;
  }
}

uint64_t mix(uint64_t value) {
  value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9u;
  value = (value ^ (value >> 27)) * 0x94D049BB133111EBu;
  return value ^ (value >> 31);
}

}  // namespace

void edit_logits(const SampleCall& call, const SampleRow& row, float* logits_v, uint64_t* marks) {
  if (row.allowed.count >= 0) allow_only(call, row.allowed, logits_v, marks);
  for_ids(call, row.forbidden, [&](int64_t id, int64_t) { logits_v[id] = kNever; });
  for_ids(call, row.biased, [&](int64_t id, int64_t i) {
    logits_v[id] += static_cast<float>(call.biases[row.first_bias + i]);
  });
  if (row.repetition_penalty != 1.0) penalise_repetition(call, row, logits_v, marks);
  if (row.frequency_penalty != 0.0 || row.presence_penalty != 0.0) penalise_frequency(call, row, logits_v);
}

double uniform(int64_t seed, int64_t position) {
  constexpr uint64_t kStep = 0x9E3779B97F4A7C15u;
  const uint64_t key = mix(static_cast<uint64_t>(seed) + kStep);
  const uint64_t bits = mix(key + (static_cast<uint64_t>(position) + 1) * kStep) >> 11;
  return static_cast<double>(bits) * 0x1.0p-53;
}

void sort_keys(uint64_t* keys, int64_t n) { std::sort(keys, keys + n); }

}  // namespace quire
