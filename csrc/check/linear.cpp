#include "check/check.hpp"

namespace quire::check {
namespace {

struct Weight {
  PackedWeight packed;
  std::vector<float> values;  // [n, k], what the packed form stands for
};

Weight random_weight(Backend& backend, Random& random, Format format, int64_t n, int64_t k, bool parts) {
  const auto size = static_cast<std::size_t>(n * k);
  const int64_t group = format != Format::int4 ? 0 : parts ? 64 : 32, sub = group == 0 ? 0 : 32;
  Weight weight{make_packed(backend.arena, format, n, k, group, sub, group != 0 && !parts), std::vector<float>(size)};
  if (format == Format::bf16) {
    const auto plain = random_bf16(random, n * k, 0.1f);
    for (std::size_t i = 0; i < size; ++i) weight.values[i] = from_bf16(plain[i]);
    backend.linear.pack_bf16(backend.pool, plain.data(), weight.packed);
    return weight;
  }
  const int64_t groups = group ? k / group : 1;
  std::vector<float> scale(static_cast<std::size_t>(n * groups));
  for (auto& one : scale) one = 0.001f + 0.001f * static_cast<float>(random.integer(0, 3));
  if (format == Format::int4) {
    std::vector<uint8_t> nibbles(size / 2), zero(static_cast<std::size_t>(n * groups));
    for (auto& two : nibbles) two = static_cast<uint8_t>(random.integer(0, 255));
    for (auto& one : zero) one = static_cast<uint8_t>(parts ? 8 : random.integer(0, 15));
    std::vector<int8_t> multiplier(size / static_cast<std::size_t>(sub), 1);
    for (auto& one : multiplier) one = static_cast<int8_t>(parts ? random.integer(-15, 15) : 1);
    for (std::size_t i = 0; i < size; ++i) {
      const int value = i % 2 ? nibbles[i / 2] >> 4 : nibbles[i / 2] & 15;
      const std::size_t of = i / static_cast<std::size_t>(group);
      weight.values[i] = static_cast<float>((value - zero[of]) * multiplier[i / static_cast<std::size_t>(sub)]) * scale[of];
    }
    backend.linear.pack_int4(backend.pool, nibbles.data(), scale.data(), zero.data(), multiplier.data(), weight.packed);
    return weight;
  }
  std::vector<int8_t> bytes(size);
  for (std::size_t i = 0; i < size; ++i) {
    // For fp8: +-2^-3 times 1..1.875, of which the lowest three bits are the fraction.
    const auto low = random.integer(0, 7), sign = random.integer(0, 1);
    const bool eight = format == Format::int8;
    bytes[i] = static_cast<int8_t>(eight ? random.integer(-127, 127) : (sign << 7) | (4 << 3) | low);
    const float fraction = (1.0f + static_cast<float>(low) / 8.0f) * (sign ? -0.125f : 0.125f);
    weight.values[i] = (eight ? static_cast<float>(bytes[i]) : fraction) * scale[i / static_cast<std::size_t>(k)];
  }
  if (format == Format::int8) {
    backend.linear.pack_int8(backend.pool, bytes.data(), scale.data(), weight.packed);
  } else {
    backend.linear.pack_fp8(backend.pool, reinterpret_cast<const uint8_t*>(bytes.data()), scale.data(), weight.packed);
  }
  return weight;
}

void check_format(Backend& backend, Random& random, Format format, bool parts) {
  const int64_t t = random.integer(1, 70), n = random.integer(1, 150);
  const int64_t k = format == Format::int4 ? (parts ? 64 : 32) * random.integer(1, 5) : random.integer(1, 200);
  const Weight gate = random_weight(backend, random, format, n, k, parts);
  const Weight up = random_weight(backend, random, format, n, k, parts);
  const auto x = random_bf16(random, t * k), bias = random_bf16(random, n);
  std::vector<uint16_t> out(static_cast<std::size_t>(t * n)), gated(out.size());
  std::vector<float> wide(out.size());
  const Rows rows{t, k, x.data(), k, nullptr};
  const Product products[] = {
      {&gate.packed, nullptr, bias.data(), nullptr, Epilogue::store, nullptr, out.data(), n},
      {&up.packed, nullptr, nullptr, nullptr, Epilogue::store_float, nullptr, wide.data(), n}};
  backend.linear.linear(backend.pool, rows, products, 2);
  const Product both{&gate.packed, &up.packed, nullptr, nullptr, Epilogue::silu_mul, nullptr, gated.data(), n};
  backend.linear.linear(backend.pool, rows, &both, 1);
  const int64_t row = random.integer(0, t - 1), column = random.integer(0, n - 1);
  double one = from_bf16(bias[static_cast<std::size_t>(column)]), other = 0, size = 0;
  for (int64_t i = 0; i < k; ++i) {
    const auto weight = static_cast<std::size_t>(column * k + i);
    const double value = from_bf16(x[static_cast<std::size_t>(row * k + i)]);
    one += value * gate.values[weight];
    other += value * up.values[weight];
    size += std::fabs(value * gate.values[weight]) + std::fabs(value * up.values[weight]);
  }
  const auto at = static_cast<std::size_t>(row * n + column);
  expect(std::fabs(from_bf16(out[at]) - one) < 0.02 * size + 0.02, "linear", name(backend.isa));
  expect(std::fabs(wide[at] - other) < 0.02 * size + 0.02, "linear, float", name(backend.isa));
}

}  // namespace

void check_linear(Backend& backend, Random& random) {
  for (const Format format : {Format::bf16, Format::int8, Format::int4, Format::fp8}) {
    check_format(backend, random, format, false);
  }
  check_format(backend, random, Format::int4, true);
}

}  // namespace quire::check
