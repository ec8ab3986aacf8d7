#include <unistd.h>

#include <cstdio>
#include <vector>

#include "blocks/blocks.hpp"
#include "check/check.hpp"

namespace quire::check {

// Blocks of random sizes to a file and back, and once more with one byte of the file changed.
void check_blocks(Backend& backend, Random& random) {
  std::vector<uint64_t> sizes(static_cast<std::size_t>(random.integer(1, 20)));
  uint64_t total = 1;  // and a byte that is in no block
  for (auto& size : sizes) total += size = static_cast<uint64_t>(random.integer(1, 5000));
  std::vector<uint8_t> from(total), to(total);
  for (auto& byte : from) byte = static_cast<uint8_t>(random.integer(0, 255));
  std::vector<Block> blocks;
  uint64_t at = 0;
  for (const uint64_t size : sizes) {
    blocks.push_back({at, reinterpret_cast<uintptr_t>(from.data() + at), size, 0});
    at += size;
  }
  const auto count = static_cast<int64_t>(blocks.size());
  set_checksums(backend.pool, blocks.data(), count);
  for (auto& block : blocks) block.address = reinterpret_cast<uintptr_t>(to.data() + block.offset);
  std::FILE* const file = std::tmpfile();
  const auto bytes = static_cast<ssize_t>(total);
  expect(file != nullptr && pwrite(fileno(file), from.data(), total, 0) == bytes, "a file is written", "blocks");
  expect(read_blocks(backend.pool, fileno(file), blocks.data(), count), "blocks are read", "blocks");
  to.back() = from.back();
  expect(from == to, "blocks come back", "blocks");
  const uint8_t other = from.front() ^ 1;
  expect(pwrite(fileno(file), &other, 1, 0) == 1, "a file is written", "blocks");
  expect(!read_blocks(backend.pool, fileno(file), blocks.data(), count), "damage is noticed", "blocks");
  std::fclose(file);
}

}  // namespace quire::check
