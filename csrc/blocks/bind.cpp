#include <nanobind/nanobind.h>

#include "address.hpp"
#include "backend.hpp"
#include "blocks/blocks.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace quire {

void bind_blocks(nb::module_& m) {
  const nb::call_guard<nb::gil_scoped_release> without_gil;
  m.def("set_checksums", [](Backend& backend, uintptr_t blocks, int64_t count) {
    set_checksums(backend.pool, at<Block>(blocks), count);
  }, "backend"_a, "blocks"_a, "count"_a, without_gil,
     "Of `count` blocks: four 64-bit words each, offset in the file, address, bytes, checksum (XXH64).");
  m.def("read_blocks", [](Backend& backend, int file, uintptr_t blocks, int64_t count) {
    return read_blocks(backend.pool, file, at<const Block>(blocks), count);
  }, "backend"_a, "file"_a, "blocks"_a, "count"_a, without_gil,
     "Fills the blocks' memory from an open file; False if one cannot be read or has another checksum.");
}

}  // namespace quire
