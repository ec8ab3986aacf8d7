// Truncation of a row's distribution and the draw from it, over one thread's scratch. How: top of kernels.cpp.
#pragma once

#include "sampling/edit.hpp"
#include "sampling/sampling.hpp"
#include "simd.hpp"

namespace quire::QUIRE_ISA {
namespace {

constexpr int64_t kBlock = 256;  // of a sum; `_SUM_BLOCK` in the definition
constexpr int kSumLanes = 16;
constexpr int kBucketShift = 18;
constexpr int64_t kNumBuckets = 8192;
constexpr int32_t kOne = 0x3f800000;      // bits of 1.0f
constexpr int32_t kFarRank = 0x07000000;  // of weights below 2^-14 of the likeliest token's

// The tokens that are still there, in a thread's scratch; arrays are padded with zeros to whole blocks.
struct Candidates {
  float* weights;
  float* depths;     // (x - max) / T; kept only for typical_p
  int32_t* ids;      // unless `all`
  int64_t n;
  bool all;          // index is id
  bool with_depths;
  double* sums;      // by block, cumulative
  double* buckets;
  uint64_t* keys;    // of the bucket to sort: rank, index
};

// e^x for x <= 0, as `ops.choosing.exp` has it: nothing fused.
F exp_unfused(F x) {
  const F lowest = set(-88.0f);
  const I too_low = x < lowest;
  const F clipped = select(too_low, lowest, x);
  const I n = round_to_int(clipped * set(1.44269504088896341f));
  const F turns = to_float(n);
  F rest = turns * set(-0.693359375f) + clipped;
  rest = rest + turns * set(2.12194440e-4f);
  F p = set(1.9875691500e-4f);
  p = p * rest + set(1.3981999507e-3f);
  p = p * rest + set(8.3334519073e-3f);
  p = p * rest + set(4.1665795894e-2f);
  p = p * rest + set(1.6666665459e-1f);
  p = p * rest + set(5.0000001201e-1f);
  p = p * (rest * rest) + (rest + set(1.0f));
  return select(too_low, F{}, p * reinterpret_cast<F>((n + 127) << 23));
}

// Sum of 256 numbers `term(i)`: 16 lanes row by row, then halved.
template <class Term>
double block_sum(const Term& term) {
  double lanes[kSumLanes] = {};
  for (int64_t row = 0; row < kBlock; row += kSumLanes) {
    for (int lane = 0; lane < kSumLanes; ++lane) lanes[lane] += term(row + lane);
  }
  for (int width = kSumLanes / 2; width > 0; width /= 2) {
    for (int lane = 0; lane < width; ++lane) lanes[lane] += lanes[lane + width];
  }
  return lanes[0];
}

// Cumulative sums of blocks into `sums`; returns the last.
template <class Term>
double block_sums(int64_t n, double* sums, const Term& term) {
  double total = 0;
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    total += block_sum([&](int64_t i) { return term(begin + i); });
    if (sums != nullptr) sums[begin / kBlock] = total;
  }
  return total;
}

double weight_of_all(const Candidates& c) {
  return block_sums(c.n, c.sums, [&](int64_t i) { return static_cast<double>(c.weights[i]); });
}

void pad(Candidates& c) {
  for (int64_t i = c.n; i % kBlock != 0; ++i) {
    c.weights[i] = 0;
    if (c.with_depths) c.depths[i] = 0;
  }
}

void weigh(const float* x, int64_t v, float most, double temperature, Candidates& c) {
  const F top = set(most), divisor = set(static_cast<float>(temperature));
  for (int64_t i = 0; i < v; i += kLanes) {
    const int64_t count = v - i < kLanes ? v - i : kLanes;
    F depth = (count == kLanes ? load(x + i) : load_part(x + i, count)) - top;
    if (temperature != 1.0) depth = depth / divisor;
    if (c.with_depths) store(c.depths + i, depth);
    store(c.weights + i, exp_unfused(depth));
  }
  c.n = v;
  c.all = true;
  pad(c);
}

// Kept are ranks below `last`, and of rank `last` the first `ties`.
struct Cut {
  int32_t last;
  int64_t ties;
};

template <class Ranks>
void keep(Candidates& c, const Ranks& ranks, Cut cut) {
  const I last = set(cut.last);
  int64_t kept = 0;
  for (int64_t i = 0; i < c.n; i += kLanes) {
    const I rank = ranks(i);
    if (!any(rank <= last)) continue;
    int32_t lanes[kLanes];
    store(lanes, rank);
    for (int64_t j = i; j < i + kLanes && j < c.n; ++j) {
      if (lanes[j - i] > cut.last || (lanes[j - i] == cut.last && cut.ties-- <= 0)) continue;
      c.weights[kept] = c.weights[j];
      if (c.with_depths) c.depths[kept] = c.depths[j];
      c.ids[kept] = c.all ? static_cast<int32_t>(j) : c.ids[j];
      ++kept;
    }
  }
  c.n = kept;
  c.all = false;
  pad(c);
}

// Adds the candidates with ranks in [from, to) to their buckets: their weights, or ones.
template <class Ranks>
void fill_buckets(Candidates& c, const Ranks& ranks, int32_t from, int32_t to, bool counted) {
  for (int64_t i = 0; i < c.n; i += kLanes) {
    const I rank = ranks(i);
    if (!any((rank >= set(from)) & (rank < set(to)))) continue;
    int32_t lanes[kLanes];
    store(lanes, rank);
    for (int64_t j = i; j < i + kLanes && j < c.n; ++j) {
      const int32_t r = lanes[j - i];
      if (r >= from && r < to) c.buckets[r >> kBucketShift] += counted ? 1.0 : static_cast<double>(c.weights[j]);
    }
  }
}

// Where to cut so that the lowest ranks together weigh `goal` (or, counted, are so many). False: all are needed.
template <class Ranks>
bool find_cut(Candidates& c, const Ranks& ranks, double goal, bool counted, int32_t far, Cut& cut) {
  std::memset(c.buckets, 0, kNumBuckets * sizeof(double));
  fill_buckets(c, ranks, 0, far, counted);
  double before = 0, upto = 0;
  int64_t edge = 0;
  const auto walk = [&](int64_t end) {
    for (; edge < end; ++edge) {
      before = upto;
      upto += c.buckets[edge];
      if (upto >= goal) return true;
    }
    return false;
  };
  if (!walk(far >> kBucketShift)) {
    fill_buckets(c, ranks, far, INT32_MAX, counted);
    if (!walk(kNumBuckets)) return false;
  }
  int64_t num_keys = 0;
  const I wanted = set(static_cast<int32_t>(edge));
  for (int64_t i = 0; i < c.n; i += kLanes) {
    const I rank = ranks(i);
    if (!any((rank >> kBucketShift) == wanted)) continue;
    int32_t lanes[kLanes];
    store(lanes, rank);
    for (int64_t j = i; j < i + kLanes && j < c.n; ++j) {
      if (lanes[j - i] >> kBucketShift != edge) continue;
      c.keys[num_keys++] = static_cast<uint64_t>(lanes[j - i]) << 32 | static_cast<uint64_t>(j);
    }
  }
  sort_keys(c.keys, num_keys);
  cut = {-1, 0};
  double inside = 0;
  for (int64_t k = 0; k < num_keys && before + inside < goal; ++k) {
    const auto rank = static_cast<int32_t>(c.keys[k] >> 32);
    cut = {rank, rank == cut.last ? cut.ties + 1 : 1};
    inside += counted ? 1.0 : static_cast<double>(c.weights[c.keys[k] & 0xffffffffu]);
  }
  return true;
}

void truncate(const SampleRow& row, Candidates& c) {
  const auto by_weight = [&](int64_t i) { return set(kOne) - reinterpret_cast<I>(load(c.weights + i)); };
  if (row.min_p > 0.0) {
    const auto least = static_cast<float>(row.min_p);
    int32_t bits;
    std::memcpy(&bits, &least, sizeof bits);
    keep(c, by_weight, {kOne - bits, c.n});
  }
  Cut cut{};
  if (row.top_k > 0 && row.top_k < c.n) {
    if (find_cut(c, by_weight, static_cast<double>(row.top_k), true, kFarRank, cut)) keep(c, by_weight, cut);
  }
  if (row.top_p < 1.0) {
    if (find_cut(c, by_weight, row.top_p * weight_of_all(c), false, kFarRank, cut)) keep(c, by_weight, cut);
  }
  if (row.typical_p >= 1.0) return;
  keep(c, by_weight, {kOne - 1, c.n});  // what has any weight
  const double whole = weight_of_all(c);
  const double depth = block_sums(c.n, nullptr, [&](int64_t i) {
    return static_cast<double>(c.weights[i]) * static_cast<double>(c.depths[i]);
  });
  const F mean = set(static_cast<float>(depth / whole));
  const auto by_surprise = [&](int64_t i) { return reinterpret_cast<I>(abs(load(c.depths + i) - mean)); };
  if (find_cut(c, by_surprise, row.typical_p * whole, false, 0, cut)) keep(c, by_surprise, cut);
}

// The token where the cumulative weight passes `drawn` of the whole.
int64_t invert(const Candidates& c, double drawn) {
  const double whole = weight_of_all(c), goal = drawn * whole;
  int64_t block = 0;
  while (c.sums[block] <= goal && c.sums[block] < whole) ++block;
  const double before = block > 0 ? c.sums[block - 1] : 0.0;
  const int64_t end = (block + 1) * kBlock < c.n ? (block + 1) * kBlock : c.n;
  int64_t chosen = block * kBlock;
  double inside = 0;
  for (int64_t i = block * kBlock; i < end; ++i) {
    if (c.weights[i] == 0) continue;
    chosen = i;  // the last one with weight, should the goal by rounding lie past it
    inside += static_cast<double>(c.weights[i]);
    if (before + inside > goal) break;
  }
  return c.all ? chosen : c.ids[chosen];
}

}  // namespace
}  // namespace quire::QUIRE_ISA
