"""What a number of the KV cache takes: known before anything is loaded, and without torch."""

from __future__ import annotations

_ELEMENT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1, "fp8": 1}
_SCALE_BYTES = 4
QUANTIZED = ("int8", "fp8")


def resolve_kv_dtype(asked: str, dtype: str) -> str:
    """The cache's dtype: `asked` is `EngineConfig.kv_cache_dtype`, `dtype` the model's."""
    return {"auto": dtype, "bf16": "bfloat16"}.get(asked, asked)


def kv_block_bytes(kv_dtype: str, *, block_size: int, head_dim: int) -> int:
    """Bytes of one head's keys, or of its values, in one block. An odd head dim is padded to an even one; in 8 bits
    each token has a float32 scale."""
    scales = block_size * _SCALE_BYTES if kv_dtype in QUANTIZED else 0
    return block_size * (head_dim + head_dim % 2) * _ELEMENT_BYTES[kv_dtype] + scales
