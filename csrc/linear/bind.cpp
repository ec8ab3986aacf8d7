#include <nanobind/nanobind.h>

#include "backend.hpp"

namespace nb = nanobind;

namespace quire {

void bind_linear(nb::module_&) {}

}  // namespace quire
