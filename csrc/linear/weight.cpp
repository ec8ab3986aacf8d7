#include "linear/linear.hpp"

namespace quire {
namespace {

constexpr int64_t kCacheLine = 64;

int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

}  // namespace

std::shared_ptr<std::byte> Arena::take(int64_t bytes) {
  constexpr int64_t kPiece = int64_t{64} << 20;
  const int64_t wanted = round_up(bytes, kCacheLine);
  if (wanted > size_ - used_) {
    const int64_t size = wanted > kPiece / 2 ? wanted : kPiece;
    Memory memory = allocate(size);
    auto* const release = memory.get_deleter();
    std::shared_ptr<std::byte> piece(memory.release(), release);
    if (size != kPiece) return piece;
    piece_ = std::move(piece);
    used_ = 0;
    size_ = size;
  }
  std::byte* const at = piece_.get() + used_;
  used_ += wanted;
  return {piece_, at};
}

PackedWeight make_packed(Arena& arena, Format format, int64_t n, int64_t k, int64_t group_size, int64_t sub_size,
                         bool zero_points, bool narrow_scales) {
  const int64_t padded_n = round_up(n, kPanel), padded_k = round_up(k, 64);
  const int64_t panels = padded_n * padded_k * bits_of(format) / 8;
  const int64_t scales = format == Format::bf16 ? 0 : format == Format::int4 ? padded_n * (k / group_size) : padded_n;
  const int64_t scale_bytes = scales * (narrow_scales ? 2 : 4);
  const int64_t multipliers = sub_size < group_size ? padded_n * (k / sub_size) : 0;
  const int64_t nbytes = panels + scale_bytes + multipliers + (zero_points ? scales * 4 : 0);
  auto memory = arena.take(nbytes);
  std::byte* const scale = memory.get() + panels;
  return {
      .format = format,
      .n = n,
      .k = k,
      .padded_n = padded_n,
      .padded_k = padded_k,
      .group_size = group_size,
      .sub_size = sub_size,
      .nbytes = nbytes,
      .data = memory.get(),
      .scale = scales == 0 || narrow_scales ? nullptr : reinterpret_cast<float*>(scale),
      .narrow_scale = narrow_scales ? reinterpret_cast<uint16_t*>(scale) : nullptr,
      .zero_scale = zero_points ? reinterpret_cast<float*>(scale + scale_bytes) : nullptr,
      .multiplier = multipliers == 0 ? nullptr : reinterpret_cast<int8_t*>(scale + scale_bytes),
      .memory = std::move(memory),
  };
}

}  // namespace quire
