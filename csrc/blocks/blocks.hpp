// Blocks of a file with a checksum each, read into memory and verified by all threads: how packed weights come back from
// the disk. A block is read and summed while it is in the cache of the core that read it.
#pragma once

#include <cstddef>
#include <cstdint>

#include "pool.hpp"

namespace quire {

struct Block {
  uint64_t offset;    // in the file
  uint64_t address;   // in memory
  uint64_t bytes;
  uint64_t checksum;
};

// XXH64 with seed 0, by its specification: https://github.com/Cyan4973/xxHash/blob/dev/doc/xxhash_spec.md
uint64_t checksum(const std::byte* data, uint64_t bytes);

void set_checksums(Pool& pool, Block* blocks, int64_t count);

// Fills the blocks' memory. False as soon as one cannot be read, is cut off or has another checksum; the memory of the
// others is then not to be relied on.
bool read_blocks(Pool& pool, int file, const Block* blocks, int64_t count);

}  // namespace quire
