"""The KV cache's memory.

Legend: l layers, p planes, h KV heads, n blocks, b bytes of a block.
"""

from __future__ import annotations

import math
import mmap
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress

import torch
from torch import Tensor

from quire.core.errors import NotEnoughMemory


class KVCache:
    """Keys and values of all layers, `[l, p, h, n, b]` bytes, allocated once. Which block is whose is not known here,
    nor what a block's bytes mean: that is the attention kernel's affair (`AttentionKernel.block_bytes`). `num_planes`:
    2 where keys lie apart from values, 1 where a token's row is both.

    Layers that share block tables are a group, and a block is of one group: `places` names each layer's group, and its
    index among that group's layers. Then l is the number of layers of a group. Without `places`, all layers are one.

    `shapes`: (h, b) of each layer, where they differ. Then each shape has a tensor of its own, and a block is its place
    in all of them; `data` is that of the first layer.

    Heads come before blocks, so that a kernel finds one head's blocks side by side. On a CPU, memory is
    reserved rather than taken: a page costs nothing until a block in it is first written. Raises `NotEnoughMemory` when
    not even that much can be reserved.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        num_kv_heads: int,
        num_blocks: int,
        block_size: int,
        block_bytes: int,
        num_planes: int = 2,
        shapes: Sequence[tuple[int, int]] | None = None,
        device: torch.device | str = "cpu",
        places: Sequence[tuple[int, int]] | None = None,
    ) -> None:
        if places is None:
            places = [(0, index) for index in range(num_layers)]
        assert len(places) == num_layers
        self.group_of_layer = tuple(group for group, _ in places)
        self.num_groups = 1 + max(self.group_of_layer)
        self._index_in_group = tuple(index for _, index in places)
        self.num_blocks = num_blocks
        self.block_size = block_size
        # Zeros: attention multiplies unused slots by a weight of zero, so they have to be finite.
        shapes = [(num_kv_heads, block_bytes)] * num_layers if shapes is None else shapes
        self._places, rows = self._places_of(shapes)
        self.tensors = {
            shape: _zeros((count, num_planes, shape[0], num_blocks, shape[1]), torch.device(device))
            for shape, count in rows.items()
        }
        self.data = self.tensors[shapes[0]]

    def _places_of(
        self, shapes: Sequence[tuple[int, int]]
    ) -> tuple[list[tuple[tuple[int, int], int]], Mapping[tuple[int, int], int]]:
        """Each layer's shape and its index in the tensor of that shape; and how many layers each tensor has."""
        if len(set(shapes)) == 1:
            places = [(shapes[0], index) for index in self._index_in_group]
            return places, {shapes[0]: 1 + max(self._index_in_group)}
        assert self.num_groups == 1, "layers of different shapes are one group"
        return [(shape, shapes[:layer].count(shape)) for layer, shape in enumerate(shapes)], Counter(shapes)

    def layer(self, index: int) -> Tensor:
        """One layer's `[p, h, n, b]`, in which its group's blocks are its own."""
        shape, place = self._places[index]
        return self.tensors[shape][place]


def _zeros(shape: tuple[int, ...], device: torch.device) -> Tensor:
    if device.type == "cpu":
        return untouched_zeros(shape)
    try:
        return torch.zeros(shape, dtype=torch.uint8, device=device)
    except torch.OutOfMemoryError as error:
        raise NotEnoughMemory(
            f"A KV cache of {math.prod(shape) / 2**30:.2f} GiB does not fit on {device}: {str(error).splitlines()[0]}",
            param="memory_utilization",
            remedy="Lower memory_utilization or kv_cache_memory; another process may hold the GPU's memory.",
        ) from error


def untouched_zeros(shape: tuple[int, ...]) -> Tensor:
    """Zeros in anonymous memory that the kernel hands out page by page, as it is written. The tensor keeps the map."""
    num_bytes = math.prod(shape)
    try:
        memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, OverflowError) as error:
        raise NotEnoughMemory(
            f"A KV cache of {num_bytes / 2**30:.2f} GiB cannot be reserved: {error}.",
            param="kv_cache_memory",
            remedy="Lower kv_cache_memory, num_kv_blocks or swap_space.",
        ) from error
    # A block's page lies far from the same block's page in the next head. In huge pages, the first token would
    # take 2 MiB per layer and head.
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        with suppress(OSError):  # a kernel without huge pages
            memory.madvise(mmap.MADV_NOHUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8).view(shape)
