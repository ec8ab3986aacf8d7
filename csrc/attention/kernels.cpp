// Attention, and writing to the cache, for one instruction set.
//
// Rows: the query heads of one KV head, of several neighbouring tokens of a request (of one, in a decode), at most
// kMaxRows: a row tile. Keys: tiles of kTile tokens from position 0 on, in segments of kSegment. A row tile takes the
// tiles of a segment in order, each by kSubRows rows at a time: scores, softmax, weighted values (products.hpp,
// softmax.hpp); a segment starts from nothing, and segments are merged in order. All these borders are fixed, so a row's
// result is the same in whichever row tile it stands, and with few row tiles each segment can be a task of its own.
#include "attention/attention.hpp"

#include <cstdlib>
#include <new>

#include "attention/products.hpp"
#include "attention/softmax.hpp"
#include "attention/write.hpp"
#include "simd.hpp"

namespace quire::QUIRE_ISA {
namespace {

constexpr int64_t kMaxRows = 128;
constexpr int64_t kSegment = 8 * kTile;
constexpr int64_t kTasksPerThread = 4;
constexpr int64_t kMostPartialBytes = 64 << 20;

// Memory for one call, aligned to cache lines.
template <class T>
struct Array {
  explicit Array(int64_t size)
      : data(static_cast<T*>(std::aligned_alloc(64, static_cast<std::size_t>(round_up(size * sizeof(T) + 1, 64))))) {
    if (data == nullptr) throw std::bad_alloc();
  }
  ~Array() { std::free(data); }
  Array(const Array&) = delete;
  Array& operator=(const Array&) = delete;

  T* data;
};

struct RowTile {
  int64_t request, first_token, first_position, tokens;
  int64_t first_segment, num_segments;
  int64_t first_partial;  // segment states of this tile's first head, if segments are tasks
};

// A range of positions that a row, or all rows of a tile, may see.
struct Range {
  int64_t begin, end;
};

// What the tasks of a call share.
class Problem {
 public:
  explicit Problem(const AttentionCall& call)
      : call_(call), d_(round_up(call.kv.head_dim, 2)), dk_(TileBuffer::padded_keys(d_)),
        dv_(TileBuffer::padded_values(d_)), group_(call.num_heads / call.kv.num_heads),
        tile_tokens_(group_ < kMaxRows ? kMaxRows / group_ : 1),
        max_rows_(round_up(tile_tokens_ * group_, kSubRows)), rule_(call.options, call.kv.format != KvFormat::bf16) {}

  void run(Pool& pool) const;

 private:
  // One task's memory.
  struct Scratch {
    bf16* q;          // [max_rows][dk]
    RowState segment;
    RowState sums;
    float* scores;    // [kSubRows][kTile]
    bf16* weights;    // [kSubRows][kTile]
    TileBuffer buffer;
  };

  int64_t state_floats() const { return max_rows_ * (1 + kLanes + dv_); }
  RowState state_at(float* memory) const {
    return {memory, memory + max_rows_, memory + max_rows_ * (1 + kLanes)};
  }
  std::size_t scratch_bytes() const;
  Scratch scratch_at(std::byte* memory) const;

  int64_t count_tiles() const;
  int64_t cut_tiles(RowTile* tiles) const;
  Range visible(int64_t position) const {
    const int64_t window = call_.options.window;
    return {window > 0 && position >= window ? position - window + 1 : 0, position + 1};
  }
  // The first row sees the earliest key, the last row the latest.
  Range visible(const RowTile& tile, int64_t first_row, int64_t end_row) const {
    return {visible(tile.first_position + first_row / group_).begin,
            visible(tile.first_position + (end_row - 1) / group_).end};
  }

  void load_queries(const RowTile& tile, int64_t head, bf16* q) const;
  void run_segment(const RowTile& tile, int64_t head, int64_t segment, const Scratch& scratch,
                   const RowState& state) const;
  void run_sub_rows(const RowTile& tile, int64_t head, int64_t first_row, int64_t end_row, int64_t start,
                    const KeyTile& keys, const KeySource& source, const Scratch& scratch, const RowState& state) const;
  void merge(const RowTile& tile, int64_t segment, const RowState& sums, const RowState& later) const;
  void finish(const RowTile& tile, int64_t head, const RowState& sums) const;
  void run_whole(const RowTile& tile, int64_t head, const Scratch& scratch) const;
  void run_in_parts(Pool& pool, const RowTile* tiles, int64_t num_tiles, int64_t num_partials) const;

  const AttentionCall& call_;
  int64_t d_, dk_, dv_, group_, tile_tokens_, max_rows_;
  ScoreRule rule_;
};

std::size_t Problem::scratch_bytes() const {
  const int64_t halves = max_rows_ * dk_ + kSubRows * kTile + kTile * (dk_ + dv_);
  const int64_t floats = 2 * state_floats() + kSubRows * kTile + 2 * kTile;
  return static_cast<std::size_t>(halves * 2 + floats * 4 + 16 * 64);
}

Problem::Scratch Problem::scratch_at(std::byte* memory) const {
  const auto take = [&]<class T>(T*& to, int64_t count) {
    to = reinterpret_cast<T*>(memory);
    memory += round_up(count * static_cast<int64_t>(sizeof(T)), 64);
  };
  Scratch scratch{};
  scratch.buffer.dk = dk_;
  scratch.buffer.dv = dv_;
  float *segment = nullptr, *sums = nullptr;
  take(scratch.q, max_rows_ * dk_);
  take(segment, state_floats());
  take(sums, state_floats());
  take(scratch.scores, kSubRows * kTile);
  take(scratch.weights, kSubRows * kTile);
  take(scratch.buffer.keys, kTile * dk_);
  take(scratch.buffer.values, kTile * dv_);
  take(scratch.buffer.scales, 2 * kTile);
  scratch.segment = state_at(segment);
  scratch.sums = state_at(sums);
  scratch.buffer.clear_padding(d_);
  return scratch;
}

int64_t Problem::count_tiles() const {
  int64_t count = 0;
  for (int64_t request = 0; request < call_.requests.r; ++request) {
    const int64_t tokens = call_.requests.query_start[request + 1] - call_.requests.query_start[request];
    count += (tokens + tile_tokens_ - 1) / tile_tokens_;
  }
  return count;
}

// Fills `tiles`, each request's last one, which has most keys, first. Returns how many segments they have in all.
int64_t Problem::cut_tiles(RowTile* tiles) const {
  int64_t num_segments = 0;
  const PagedRequests& requests = call_.requests;
  for (int64_t request = 0; request < requests.r; ++request) {
    const int64_t begin = requests.query_start[request], end = requests.query_start[request + 1];
    const int64_t first_position = requests.context_lens[request] - (end - begin);
    for (int64_t cut = (end - begin - 1) / tile_tokens_; cut >= 0 && begin < end; --cut) {
      RowTile tile{};
      tile.request = request;
      tile.first_token = begin + cut * tile_tokens_;
      tile.first_position = first_position + cut * tile_tokens_;
      tile.tokens = at_most(end - tile.first_token, tile_tokens_);
      const Range range = visible(tile, 0, tile.tokens * group_);
      tile.first_segment = range.begin / kSegment;
      tile.num_segments = (range.end - 1) / kSegment + 1 - tile.first_segment;
      tile.first_partial = num_segments * call_.kv.num_heads;
      num_segments += tile.num_segments;
      *tiles++ = tile;
    }
  }
  return num_segments;
}

void Problem::load_queries(const RowTile& tile, int64_t head, bf16* q) const {
  const int64_t rows = tile.tokens * group_, head_dim = call_.kv.head_dim;
  const auto bytes = static_cast<std::size_t>(head_dim) * sizeof(bf16);
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t token = tile.first_token + row / group_;
    bf16* to = q + row * dk_;
    std::memcpy(to, call_.q + token * call_.q_stride + (head * group_ + row % group_) * head_dim, bytes);
    std::memset(to + head_dim, 0, static_cast<std::size_t>(dk_ - head_dim) * sizeof(bf16));
  }
  const int64_t padded = round_up(rows, kRowStep);
  std::memset(q + rows * dk_, 0, static_cast<std::size_t>((padded - rows) * dk_) * sizeof(bf16));
}

void Problem::run_segment(const RowTile& tile, int64_t head, int64_t segment, const Scratch& scratch,
                          const RowState& state) const {
  const int64_t rows = tile.tokens * group_, padded = round_up(rows, kRowStep);
  for (int64_t row = 0; row < rows; ++row) state.largest[row] = kNothing;
  std::memset(state.total, 0, static_cast<std::size_t>(rows * kLanes) * sizeof(float));
  std::memset(state.weighted, 0, static_cast<std::size_t>(padded * dv_) * sizeof(float));
  const KeySource source(call_.kv, call_.requests, tile.request, head);
  const Range range = visible(tile, 0, rows);
  const int64_t seen = range.begin / kTile * kTile, begin = segment * kSegment;
  const int64_t first = seen > begin ? seen : begin, end = at_most(range.end, begin + kSegment);
  for (int64_t g = 0; g < kTile / kScoreGroup; ++g) source.prefetch(first + g * kScoreGroup);
  for (int64_t start = first; start < end; start += kTile) {
    const int64_t num_groups = round_up(at_most(end - start, kTile), kScoreGroup) / kScoreGroup;
    const KeyTile keys = scratch.buffer.load(source, start, num_groups);
    for (int64_t row = 0; row < rows; row += kSubRows) {
      run_sub_rows(tile, head, row, at_most(row + kSubRows, rows), start, keys, source, scratch, state);
    }
  }
}

void Problem::run_sub_rows(const RowTile& tile, int64_t head, int64_t first_row, int64_t end_row, int64_t start,
                           const KeyTile& keys, const KeySource& source, const Scratch& scratch,
                           const RowState& state) const {
  const Range range = visible(tile, first_row, end_row);
  if (range.end <= start || range.begin >= start + kTile) return;
  const int64_t rows = end_row - first_row, used = at_most(range.end - start, kTile);
  const int64_t num_groups = round_up(used, kScoreGroup) / kScoreGroup;
  const int64_t count = round_up(used, kValueGroup);
  const auto prefetch = [&](int64_t group) {
    if (first_row == 0) source.prefetch(start + kTile + group * kScoreGroup);
  };
  for (int64_t g = 0; g < num_groups; g += 2) {
    prefetch(g / 2);
    score_groups(scratch.q + first_row * dk_, rows, dk_, keys, g, g + 1 < num_groups, scratch.scores);
  }
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t at = first_row + row, position = tile.first_position + at / group_;
    const Range sees = visible(position);
    const int64_t low = sees.begin > start ? sees.begin - start : 0, high = at_most(sees.end - start, kTile);
    float* scores = scratch.scores + row * kTile;
    if (!rule_.plain) {
      const float slope = call_.options.slopes == nullptr ? 0.0f : call_.options.slopes[head * group_ + at % group_];
      rule_.adjust(scores, num_groups * kScoreGroup, keys.key_scale, slope, start - position);
    }
    row_softmax(scores, scratch.weights + row * kTile, low, high, count, rule_.factor, keys.value_scale,
                state.largest + at, state.total + at * kLanes, state.weighted + at * dv_, dv_);
  }
  for (int64_t first = 0; first < dv_; first += 32) {
    if (first < kTile) prefetch(kTile / kScoreGroup / 2 + first / 32);
    weigh_dimensions(scratch.weights, rows, count / kValueGroup, keys, first, state.weighted + first_row * dv_, dv_);
  }
}

void Problem::merge(const RowTile& tile, int64_t segment, const RowState& sums, const RowState& later) const {
  const int64_t begin = segment * kSegment;
  for (int64_t row = 0; row < tile.tokens * group_; ++row) {
    const Range sees = visible(tile.first_position + row / group_);
    if (sees.end <= begin || sees.begin >= begin + kSegment) continue;
    if (sees.begin >= begin) {  // its first
      sums.largest[row] = later.largest[row];
      std::memcpy(sums.total + row * kLanes, later.total + row * kLanes, kLanes * sizeof(float));
      std::memcpy(sums.weighted + row * dv_, later.weighted + row * dv_, static_cast<std::size_t>(dv_) * sizeof(float));
    } else {
      merge_row(sums.largest[row], sums.total + row * kLanes, sums.weighted + row * dv_, later.largest[row],
                later.total + row * kLanes, later.weighted + row * dv_, rule_.factor, dv_);
    }
  }
}

void Problem::finish(const RowTile& tile, int64_t head, const RowState& sums) const {
  const int64_t head_dim = call_.kv.head_dim;
  for (int64_t row = 0; row < tile.tokens * group_; ++row) {
    const int64_t token = tile.first_token + row / group_, h = head * group_ + row % group_;
    const float* sink = call_.options.sinks == nullptr ? nullptr : call_.options.sinks + h;
    finish_row(sums.largest[row], sums.total + row * kLanes, sums.weighted + row * dv_, rule_.factor, sink,
               call_.out + token * call_.out_stride + h * head_dim, head_dim);
  }
}

void Problem::run_whole(const RowTile& tile, int64_t head, const Scratch& scratch) const {
  load_queries(tile, head, scratch.q);
  if (tile.num_segments == 1) {
    run_segment(tile, head, tile.first_segment, scratch, scratch.sums);
  } else {
    for (int64_t n = 0; n < tile.num_segments; ++n) {
      run_segment(tile, head, tile.first_segment + n, scratch, scratch.segment);
      merge(tile, tile.first_segment + n, scratch.sums, scratch.segment);
    }
  }
  finish(tile, head, scratch.sums);
}

void Problem::run_in_parts(Pool& pool, const RowTile* tiles, int64_t num_tiles, int64_t num_segments) const {
  const int64_t heads = call_.kv.num_heads;
  const Array<float> partials(num_segments * heads * state_floats());
  const auto partial = [&](const RowTile& tile, int64_t head, int64_t n) {
    return state_at(partials.data + (tile.first_partial + head * tile.num_segments + n) * state_floats());
  };
  parallel_for(pool, num_segments * heads, scratch_bytes(), [&](int64_t task, int thread) {
    const RowTile* tile = tiles;
    while (task >= tile->first_partial + tile->num_segments * heads) ++tile;
    const int64_t within = task - tile->first_partial, head = within / tile->num_segments;
    [[maybe_unused]] const Tiles registers;
    const Scratch scratch = scratch_at(pool.scratch(thread));
    load_queries(*tile, head, scratch.q);
    const int64_t n = within % tile->num_segments;
    run_segment(*tile, head, tile->first_segment + n, scratch, partial(*tile, head, n));
  });
  parallel_for(pool, num_tiles * heads, scratch_bytes(), [&](int64_t task, int thread) {
    const RowTile& tile = tiles[task / heads];
    const int64_t head = task % heads;
    const RowState sums = scratch_at(pool.scratch(thread)).sums;
    for (int64_t n = 0; n < tile.num_segments; ++n) merge(tile, tile.first_segment + n, sums, partial(tile, head, n));
    finish(tile, head, sums);
  });
}

void Problem::run(Pool& pool) const {
  const int64_t num_tiles = count_tiles(), heads = call_.kv.num_heads;
  const Array<RowTile> tiles(num_tiles);
  const int64_t num_segments = cut_tiles(tiles.data);
  const bool few = num_tiles * heads < kTasksPerThread * pool.threads() && num_segments > num_tiles;
  if (few && pool.threads() > 1 && num_segments * heads * state_floats() * 4 <= kMostPartialBytes) {
    run_in_parts(pool, tiles.data, num_tiles, num_segments);
    return;
  }
  // Head by head: what one row tile leaves of a head's keys in the caches, the next one finds.
  parallel_for(pool, num_tiles * heads, scratch_bytes(), [&](int64_t task, int thread) {
    [[maybe_unused]] const Tiles registers;
    run_whole(tiles.data[task % num_tiles], task / num_tiles, scratch_at(pool.scratch(thread)));
  });
}

void attention(Pool& pool, const AttentionCall& call) { Problem(call).run(pool); }

}  // namespace

extern const AttentionKernels attention_kernels;
const AttentionKernels attention_kernels = {write_kv, attention};

}  // namespace quire::QUIRE_ISA
