#include "blocks/blocks.hpp"

#include <unistd.h>

#include <atomic>
#include <bit>
#include <cerrno>
#include <cstring>

namespace quire {
namespace {

constexpr uint64_t kPrime1 = 0x9E3779B185EBCA87, kPrime2 = 0xC2B2AE3D27D4EB4F, kPrime3 = 0x165667B19E3779F9,
                   kPrime4 = 0x85EBCA77C2B2AE63, kPrime5 = 0x27D4EB2F165667C5;

template <class Word>
uint64_t load(const std::byte* data) {
  Word word;
  std::memcpy(&word, data, sizeof word);
  return word;
}

uint64_t mixed(uint64_t sum, uint64_t word) { return std::rotl(sum + word * kPrime2, 31) * kPrime1; }

const std::byte* memory_of(const Block& block) { return reinterpret_cast<const std::byte*>(block.address); }

bool read_block(int file, const Block& block) {
  for (uint64_t done = 0; done < block.bytes;) {
    void* const to = reinterpret_cast<std::byte*>(block.address) + done;
    const ssize_t got = pread(file, to, block.bytes - done, static_cast<off_t>(block.offset + done));
    if (got < 0 && errno == EINTR) continue;
    if (got <= 0) return false;
    done += static_cast<uint64_t>(got);
  }
  return checksum(memory_of(block), block.bytes) == block.checksum;
}

}  // namespace

uint64_t checksum(const std::byte* data, uint64_t bytes) {
  const std::byte* const end = data + bytes;
  uint64_t sum = kPrime5;
  if (bytes >= 32) {
    uint64_t lanes[4] = {kPrime1 + kPrime2, kPrime2, 0, 0 - kPrime1};
    for (; end - data >= 32; data += 32) {
      for (int lane = 0; lane < 4; ++lane) lanes[lane] = mixed(lanes[lane], load<uint64_t>(data + 8 * lane));
    }
    sum = std::rotl(lanes[0], 1) + std::rotl(lanes[1], 7) + std::rotl(lanes[2], 12) + std::rotl(lanes[3], 18);
    for (const uint64_t lane : lanes) sum = (sum ^ mixed(0, lane)) * kPrime1 + kPrime4;
  }
  sum += bytes;
  for (; end - data >= 8; data += 8) {
    sum = std::rotl(sum ^ mixed(0, load<uint64_t>(data)), 27) * kPrime1 + kPrime4;
  }
  if (end - data >= 4) {
    sum = std::rotl(sum ^ load<uint32_t>(data) * kPrime1, 23) * kPrime2 + kPrime3;
    data += 4;
  }
  for (; data < end; ++data) sum = std::rotl(sum ^ load<uint8_t>(data) * kPrime5, 11) * kPrime1;
  sum = (sum ^ (sum >> 33)) * kPrime2;
  sum = (sum ^ (sum >> 29)) * kPrime3;
  return sum ^ (sum >> 32);
}

void set_checksums(Pool& pool, Block* blocks, int64_t count) {
  const auto task = [](const void* context, int64_t index, int) {
    Block& block = static_cast<Block* const*>(context)[0][index];
    block.checksum = checksum(memory_of(block), block.bytes);
  };
  pool.run(count, task, &blocks);
}

bool read_blocks(Pool& pool, int file, const Block* blocks, int64_t count) {
  struct Call {
    int file;
    const Block* blocks;
    mutable std::atomic<bool> good{true};
  };
  const Call call{file, blocks};
  const auto task = [](const void* context, int64_t index, int) {
    const Call& call = *static_cast<const Call*>(context);
    if (call.good.load(std::memory_order_relaxed) && !read_block(call.file, call.blocks[index])) call.good.store(false);
  };
  pool.run(count, task, &call);
  return call.good.load();
}

}  // namespace quire
