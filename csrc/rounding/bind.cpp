#include <nanobind/nanobind.h>

#include "address.hpp"
#include "backend.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace quire {

void bind_rounding(nb::module_& m) {
  using Release = nb::call_guard<nb::gil_scoped_release>;
  m.def("round_int8", [](Backend& backend, uintptr_t weight, int64_t n, int64_t k, uintptr_t values, uintptr_t scale) {
    backend.rounding.int8(backend.pool, at<const uint16_t>(weight), n, k, at<int8_t>(values), at<float>(scale));
  }, "backend"_a, nb::kw_only(), "weight"_a, "n"_a, "k"_a, "values"_a, "scale"_a, Release());
  m.def("round_fp8", [](Backend& backend, uintptr_t weight, int64_t n, int64_t k, uintptr_t values, uintptr_t scale) {
    backend.rounding.fp8(backend.pool, at<const uint16_t>(weight), n, k, at<uint8_t>(values), at<float>(scale));
  }, "backend"_a, nb::kw_only(), "weight"_a, "n"_a, "k"_a, "values"_a, "scale"_a, Release());
  m.def("round_int4", [](Backend& backend, uintptr_t weight, int64_t n, int64_t k, int64_t group_size, int64_t span,
                         uintptr_t nibbles, uintptr_t scale) {
    backend.rounding.int4(backend.pool, at<const uint16_t>(weight), n, k, group_size, span, at<uint8_t>(nibbles),
                          at<float>(scale));
  }, "backend"_a, nb::kw_only(), "weight"_a, "n"_a, "k"_a, "group_size"_a, "span"_a, "nibbles"_a, "scale"_a, Release());
}

}  // namespace quire
