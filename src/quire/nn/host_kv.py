"""The host's side of swapping: room for blocks of a KV cache, and the way there and back.

Legend: n blocks, l layers, p planes, h KV heads, b bytes of a block, k blocks of one copy.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from quire.core.errors import NotEnoughMemory
from quire.nn.kv import KVCache, untouched_zeros
from quire.ops.moving import to_device

Pairs = Sequence[tuple[int, int]]

_COPY_BYTES = 64 << 20
"""Blocks are copied in pieces of this size: what is on its way takes no more memory."""


class HostKV:
    """`num_blocks` blocks of `kv`, each of them in one piece: `[n, l, p, h, b]` bytes for every shape that layers have.

    Beside a GPU the memory is pinned and copies run on a stream of their own: a step waits for what it swaps in, and
    for nothing else. Raises `NotEnoughMemory`.
    """

    def __init__(self, kv: KVCache, num_blocks: int) -> None:
        self._kv = kv
        self._is_cuda = kv.data.device.type == "cuda"
        self._stream: Any = torch.cuda.Stream() if self._is_cuda else None  # type: ignore[no-untyped-call]
        self._blocks = {shape: self._room(tensor, num_blocks) for shape, tensor in kv.tensors.items()}

    def swap_out(self, pairs: Pairs) -> None:
        """Copies (block of the cache, block here)."""
        for shape, tensor in self._kv.tensors.items():
            host = self._blocks[shape]
            for sources, destinations in _pieces(pairs, host):
                gathered = tensor.index_select(3, to_device(sources, tensor.device)).movedim(3, 0)
                if self._stream is None:
                    host.index_copy_(0, destinations, gathered)
                    continue
                packed = gathered.contiguous()
                self._stream.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(self._stream):
                    for place, block in enumerate(destinations.tolist()):
                        host[block].copy_(packed[place], non_blocking=True)
                packed.record_stream(self._stream)

    def swap_in(self, pairs: Pairs) -> None:
        """Copies (block here, block of the cache)."""
        for shape, tensor in self._kv.tensors.items():
            host = self._blocks[shape]
            for sources, destinations in _pieces(pairs, host):
                if self._stream is None:
                    packed = host.index_select(0, sources)
                else:
                    with torch.cuda.stream(self._stream):
                        packed = torch.empty((len(sources), *host.shape[1:]), dtype=host.dtype, device=tensor.device)
                        for place, block in enumerate(sources.tolist()):
                            packed[place].copy_(host[block], non_blocking=True)
                    torch.cuda.current_stream().wait_stream(self._stream)
                    packed.record_stream(torch.cuda.current_stream())
                tensor.index_copy_(3, to_device(destinations, tensor.device), packed.movedim(0, 3))

    def _room(self, tensor: Tensor, num_blocks: int) -> Tensor:
        layers, planes, heads, _, block_bytes = tensor.shape
        shape = (num_blocks, layers, planes, heads, block_bytes)
        if not self._is_cuda:
            return untouched_zeros(shape)
        try:
            return torch.empty(shape, dtype=torch.uint8, pin_memory=True)
        except RuntimeError as error:
            raise NotEnoughMemory(
                f"{math.prod(shape) / 2**30:.2f} GiB of host memory cannot be pinned: {str(error).splitlines()[0]}",
                param="swap_space",
                remedy="Lower swap_space, or raise the limit on locked memory (ulimit -l).",
            ) from error


def _pieces(pairs: Pairs, host: Tensor) -> list[tuple[Tensor, Tensor]]:
    """(sources, destinations), int64 on the host."""
    at_once = max(1, _COPY_BYTES * len(host) // max(1, host.nbytes))
    found = []
    for first in range(0, len(pairs), at_once):
        sources, destinations = zip(*pairs[first : first + at_once], strict=True)
        found.append((torch.tensor(sources), torch.tensor(destinations)))
    return found
