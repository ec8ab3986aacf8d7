#include "attention/attention.hpp"

namespace quire {

int64_t kv_block_bytes(KvFormat format, int64_t block_size, int64_t head_dim) {
  const int64_t elements = block_size * (head_dim + head_dim % 2);
  constexpr int64_t kScale = sizeof(float);
  return format == KvFormat::bf16 ? elements * 2 : elements + block_size * kScale;
}

}  // namespace quire
