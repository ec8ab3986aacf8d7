#include <nanobind/nanobind.h>

#include <cstring>
#include <nanobind/stl/string.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <stdexcept>
#include <string>

#include "address.hpp"
#include "backend.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace quire {
namespace {

bool all_bf16(const float* values, int64_t count) {
  uint32_t rest = 0;
  for (int64_t i = 0; i < count; ++i) {
    uint32_t bits;
    std::memcpy(&bits, values + i, sizeof bits);
    rest |= bits;
  }
  return (rest & 0xffffu) == 0;
}

PackedWeight pack_int4(Backend& backend, uintptr_t nibbles, uintptr_t scale, uintptr_t zero, uintptr_t multiplier,
                       int64_t n, int64_t k, int64_t group_size, int64_t sub_size) {
  const bool narrow = all_bf16(at<const float>(scale), n * (k / group_size));
  PackedWeight packed = make_packed(backend.arena, Format::int4, n, k, group_size, sub_size, zero != 0, narrow);
  backend.linear.pack_int4(backend.pool, at<const uint8_t>(nibbles), at<const float>(scale), at<const uint8_t>(zero),
                           at<const int8_t>(multiplier), packed);
  return packed;
}

// The Python object of a product keeps the weights alive that it points to.
Product make_product(const PackedWeight& weight, uintptr_t out, int64_t out_stride, Epilogue epilogue, uintptr_t bias,
                     uintptr_t residual, const PackedWeight* up, uintptr_t up_bias) {
  return {&weight, up, at<const uint16_t>(bias), at<const uint16_t>(up_bias), epilogue, at<const uint16_t>(residual),
          at<void>(out), out_stride};
}

template <class Body>
double seconds_of(const Body& body) {
  const auto begin = std::chrono::steady_clock::now();
  body();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

double peak(Backend& backend, const std::string& kind, int repeats) {
  const Probe probe = kind == "bf16"   ? Probe::bf16
                      : kind == "int8" ? Probe::int8
                      : kind == "fp32" ? Probe::fp32
                                       : throw std::invalid_argument("kind is bf16, int8 or fp32, not " + kind);
  double best = 0;
  for (int i = 0; i < repeats; ++i) {
    int64_t products = 0;
    const double seconds = seconds_of([&] { products = backend.linear.multiply_in_registers(backend.pool, probe); });
    best = std::max(best, 2.0 * static_cast<double>(products) / seconds);
  }
  return best;
}

double read_bandwidth(Backend& backend, int64_t bytes, int repeats) {
  const Memory memory = allocate(bytes);
  std::memset(memory.get(), 1, static_cast<std::size_t>(bytes));
  double best = 0;
  for (int i = 0; i < repeats; ++i) {
    const double seconds = seconds_of([&] { backend.linear.read_memory(backend.pool, memory.get(), bytes); });
    best = std::max(best, static_cast<double>(bytes) / seconds);
  }
  return best;
}

}  // namespace

void bind_linear(nb::module_& m) {
  const nb::call_guard<nb::gil_scoped_release> without_gil;
  nb::enum_<Epilogue>(m, "Epilogue", "What happens to a product's sums, besides bias and rounding.")
      .value("STORE", Epilogue::store)
      .value("STORE_FLOAT", Epilogue::store_float)
      .value("ADD_RESIDUAL", Epilogue::add_residual)
      .value("SILU_MUL", Epilogue::silu_mul);
  nb::class_<PackedWeight>(m, "PackedWeight", "A linear layer's weight in the kernels' layout.")
      .def_ro("n", &PackedWeight::n, "Output features.")
      .def_ro("k", &PackedWeight::k, "Input features.")
      .def_ro("nbytes", &PackedWeight::nbytes, "Memory it takes, scales included.")
      .def_prop_ro("row_form", [](const PackedWeight& self) {
        return nb::make_tuple(static_cast<int>(self.format), self.group_size, self.sub_size);
      }, "Equal for weights that take the same form of a row.")
      .def_prop_ro("format", [](const PackedWeight& self) {
        constexpr const char* kNames[] = {"bf16", "int8", "int4", "fp8"};
        return kNames[static_cast<int>(self.format)];
      })
      .def_prop_ro("address", [](const PackedWeight& self) { return reinterpret_cast<uintptr_t>(self.data); },
                   "Where its `nbytes` bytes lie.")
      .def_prop_ro("layout", [](const PackedWeight& self) {
        return nb::make_tuple(static_cast<int>(self.format), self.n, self.k, self.group_size, self.sub_size,
                              self.zero_scale != nullptr, self.narrow_scale != nullptr);
      }, "What `unfilled_weight` makes another one of, for the same bytes.");
  nb::class_<Product>(m, "Product", "One product of a call; addresses of tensors, 0 for none; strides in elements.")
      .def(nb::new_(&make_product), "weight"_a, "out"_a, "out_stride"_a, "epilogue"_a = Epilogue::store, "bias"_a = 0,
           "residual"_a = 0, "up"_a = nb::none(), "up_bias"_a = 0, nb::keep_alive<0, 1>(), nb::keep_alive<0, 7>());

  m.def("pack_bf16", [](Backend& backend, uintptr_t weight, int64_t n, int64_t k) {
    PackedWeight packed = make_packed(backend.arena, Format::bf16, n, k);
    backend.linear.pack_bf16(backend.pool, at<const uint16_t>(weight), packed);
    return packed;
  }, "backend"_a, "weight"_a, "n"_a, "k"_a, without_gil, "Of a dense [n, k] bf16 tensor.");
  m.def("pack_int8", [](Backend& backend, uintptr_t values, uintptr_t scale, int64_t n, int64_t k) {
    PackedWeight packed = make_packed(backend.arena, Format::int8, n, k);
    backend.linear.pack_int8(backend.pool, at<const int8_t>(values), at<const float>(scale), packed);
    return packed;
  }, "backend"_a, "values"_a, "scale"_a, "n"_a, "k"_a, without_gil, "Of a dense [n, k] int8 tensor and [n] scales.");
  m.def("pack_fp8", [](Backend& backend, uintptr_t values, uintptr_t scale, int64_t n, int64_t k) {
    PackedWeight packed = make_packed(backend.arena, Format::fp8, n, k);
    backend.linear.pack_fp8(backend.pool, at<const uint8_t>(values), at<const float>(scale), packed);
    return packed;
  }, "backend"_a, "values"_a, "scale"_a, "n"_a, "k"_a, without_gil, "Of a dense [n, k] e4m3 tensor and [n] scales.");
  m.def("pack_int4", &pack_int4, "backend"_a, "nibbles"_a, "scale"_a, "zero"_a, "multiplier"_a, "n"_a, "k"_a,
        "group_size"_a, "sub_size"_a, without_gil,
        "Of a dense [n, k / 2] tensor of nibbles, [n, g] scales, zeros (0: all are 8), [n, k / sub_size] multipliers or 0.");

  m.def("unfilled_weight", [](Backend& backend, int format, int64_t n, int64_t k, int64_t group_size, int64_t sub_size,
                              bool zero_points, bool narrow_scales) {
    return make_packed(backend.arena, static_cast<Format>(format), n, k, group_size, sub_size, zero_points,
                       narrow_scales);
  }, "backend"_a, "format"_a, "n"_a, "k"_a, "group_size"_a, "sub_size"_a, "zero_points"_a,
     "narrow_scales"_a,
     "Memory for a weight of a `layout`; whoever asks fills it.");

  m.def("linear", [](Backend& backend, uintptr_t x, int64_t t, int64_t k, int64_t stride, const nb::args& products) {
    constexpr std::size_t kMost = 8;
    if (products.size() > kMost) throw nb::value_error("a call has at most 8 products");
    Product list[kMost];
    for (std::size_t i = 0; i < products.size(); ++i) list[i] = nb::cast<Product&>(products[i]);
    const Rows rows{t, k, at<const uint16_t>(x), stride, nullptr};
    nb::gil_scoped_release release;
    backend.linear.linear(backend.pool, rows, list, static_cast<int>(products.size()));
  }, "backend"_a, "x"_a, "t"_a, "k"_a, "stride"_a, "products"_a, "Products of bf16 [t, k] rows, all of one format.");
  m.def("quantize_rows", [](Backend& backend, uintptr_t x, int64_t t, int64_t k, int64_t padded_k, int64_t group_size,
                            int64_t sub_size, uintptr_t values, uintptr_t scale, uintptr_t sum) {
    const int64_t groups = group_size >= k ? 1 : padded_k / group_size, subs = groups * (group_size / sub_size);
    for (int64_t row = 0; row < t; ++row) {
      backend.linear.quantize_row(at<const uint16_t>(x) + row * k, k, padded_k, group_size, sub_size,
                                  at<int8_t>(values) + row * padded_k, at<float>(scale) + row * groups,
                                  at<int32_t>(sum) + row * subs);
    }
  }, "backend"_a, "x"_a, "t"_a, "k"_a, "padded_k"_a, "group_size"_a, "sub_size"_a, "values"_a, "scale"_a, "sum"_a, without_gil,
     "Dense bf16 [t, k] to int8 [t, padded_k], scales and sums.");
  m.def("peak", &peak, "backend"_a, "kind"_a, "repeats"_a = 10, without_gil,
        "Operations a second (two per multiply-add) of the set's dot products in registers: bf16, int8 or fp32.");
  m.def("read_bandwidth", &read_bandwidth, "backend"_a, "nbytes"_a, "repeats"_a = 5, without_gil,
        "Bytes a second that the threads read from a buffer of `nbytes`, a multiple of 1 MiB.");
}

}  // namespace quire
