"""The KV cache's memory.

Legend: l layers, h KV heads, n blocks, s tokens per block, d head dim.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Pairs = Sequence[tuple[int, int]]


class KVCache:
    """Keys and values of all layers, `[l, 2, h, n, s, d]`, allocated once. Which block is whose is not known here.

    Heads come before blocks, so that gathering one head's blocks gives keys laid end to end.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        # Zeros: attention multiplies unused slots by a weight of zero, so they have to be finite.
        self.data = torch.zeros(
            num_layers, 2, num_kv_heads, num_blocks, block_size, head_dim, dtype=dtype, device=device
        )

    @staticmethod
    def bytes_per_block(
        *, num_layers: int, num_kv_heads: int, head_dim: int, block_size: int, dtype: torch.dtype
    ) -> int:
        return num_layers * 2 * num_kv_heads * block_size * head_dim * dtype.itemsize

    def layer(self, index: int) -> Tensor:
        """One layer's `[2, h, n, s, d]`."""
        return self.data[index]

    def copy_blocks(self, pairs: Pairs) -> None:
        """Copies (source, destination) blocks within this cache. No destination may also be a source."""
        _copy(self, self, pairs)

    def swap_out(self, pairs: Pairs, host: KVCache) -> None:
        """Copies (block here, block of `host`)."""
        _copy(self, host, pairs)

    def swap_in(self, pairs: Pairs, host: KVCache) -> None:
        """Copies (block of `host`, block here)."""
        _copy(host, self, pairs)


def _copy(source: KVCache, destination: KVCache, pairs: Pairs) -> None:
    if not pairs:
        return
    sources, destinations = (torch.tensor(blocks, dtype=torch.int64) for blocks in zip(*pairs, strict=True))
    blocks = source.data.index_select(3, sources.to(source.data.device))
    destination.data.index_copy_(3, destinations.to(destination.data.device), blocks.to(destination.data.device))
