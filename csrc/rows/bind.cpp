#include <nanobind/nanobind.h>

#include "backend.hpp"

namespace nb = nanobind;

namespace quire {

void bind_rows(nb::module_&) {}

}  // namespace quire
