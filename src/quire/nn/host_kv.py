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
"""Blocks are copied in pieces of this size."""
_BUFFERS = 2
"""On the GPU: what is on its way takes no more memory."""
_PINNED_BYTES = 1 << 30
"""That are allocated in one piece."""


class HostKV:
    """`num_blocks` blocks of `kv`, each of them in one piece: `[n, l, p, h, b]` bytes for every shape that layers have.

    Beside a GPU the memory is pinned and copies run on a stream of their own, by way of two buffers that are used in
    turn: a step waits for what it swaps in, and where more is on its way than they hold, for a buffer. Raises
    `NotEnoughMemory`.
    """

    def __init__(self, kv: KVCache, num_blocks: int) -> None:
        self._kv = kv
        self._is_cuda = kv.data.device.type == "cuda"
        self._blocks = {shape: self._room(tensor, num_blocks) for shape, tensor in kv.tensors.items()}
        self._stream: Any = None
        if self._is_cuda:
            self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            size = max(rooms[0][:1].nbytes * _at_once(rooms[0]) for rooms in self._blocks.values())
            self._buffers = [torch.empty(size, dtype=torch.uint8, device=kv.data.device) for _ in range(_BUFFERS)]
            self._used: list[Any] = [None] * _BUFFERS
            """What was last done with each buffer, an event."""
            self._next = 0

    def swap_out(self, pairs: Pairs) -> None:
        """Copies (block of the cache, block here)."""
        for shape, tensor in self._kv.tensors.items():
            rooms = self._blocks[shape]
            for sources, destinations in _pieces(pairs, _at_once(rooms[0])):
                gathered = _wide(tensor).index_select(3, to_device(sources, tensor.device)).movedim(3, 0)
                if self._stream is None:
                    _wide(rooms[0]).index_copy_(0, destinations, gathered)
                    continue
                number, packed = self._buffer(len(sources), rooms[0], torch.cuda.current_stream())
                _wide(packed).copy_(gathered)
                self._stream.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(self._stream):
                    for place, block in enumerate(destinations.tolist()):
                        _at(rooms, block).copy_(packed[place], non_blocking=True)
                    self._used[number].record()

    def swap_in(self, pairs: Pairs) -> None:
        """Copies (block here, block of the cache)."""
        for shape, tensor in self._kv.tensors.items():
            rooms = self._blocks[shape]
            for sources, destinations in _pieces(pairs, _at_once(rooms[0])):
                if self._stream is None:
                    packed = rooms[0].index_select(0, sources)
                else:
                    number, packed = self._buffer(len(sources), rooms[0], self._stream)
                    with torch.cuda.stream(self._stream):
                        for place, block in enumerate(sources.tolist()):
                            packed[place].copy_(_at(rooms, block), non_blocking=True)
                    torch.cuda.current_stream().wait_stream(self._stream)
                places = to_device(destinations, tensor.device)
                _wide(tensor).index_copy_(3, places, _wide(packed).movedim(0, 3))
                if self._stream is not None:
                    self._used[number].record()

    def _buffer(self, count: int, room: Tensor, stream: Any) -> tuple[int, Tensor]:
        """A buffer's number, and room for so many blocks in it, which `stream` may write to."""
        number = self._next
        self._next = (number + 1) % _BUFFERS
        if self._used[number] is not None:
            stream.wait_event(self._used[number])
        self._used[number] = torch.cuda.Event()  # type: ignore[no-untyped-call]
        shape = (count, *room.shape[1:])
        return number, self._buffers[number][: math.prod(shape)].view(shape)

    def _room(self, tensor: Tensor, num_blocks: int) -> list[Tensor]:
        """Of pinned memory in pieces: torch rounds each up to a power of 2."""
        layers, planes, heads, _, block_bytes = tensor.shape
        shape = (num_blocks, layers, planes, heads, block_bytes)
        if not self._is_cuda:
            return [untouched_zeros(shape)]
        in_one = max(1, _PINNED_BYTES // math.prod(shape[1:]))
        try:
            return [
                torch.empty((min(in_one, num_blocks - first), *shape[1:]), dtype=torch.uint8, pin_memory=True)
                for first in range(0, num_blocks, in_one)
            ]
        except RuntimeError as error:
            raise NotEnoughMemory(
                f"{math.prod(shape) / 2**30:.2f} GiB of host memory cannot be pinned: {str(error).splitlines()[0]}",
                param="swap_space",
                remedy="Lower swap_space, or raise the limit on locked memory (ulimit -l).",
            ) from error


def _at(rooms: Sequence[Tensor], block: int) -> Tensor:
    """All but the last of the rooms have as many blocks as the first."""
    return rooms[block // len(rooms[0])][block % len(rooms[0])]


def _wide(blocks: Tensor) -> Tensor:
    """The same bytes as numbers of 8 bytes where blocks are whole ones: torch copies number by number."""
    return blocks.view(torch.int64) if blocks.shape[-1] % 8 == 0 else blocks


def _at_once(room: Tensor) -> int:
    """Blocks of one copy."""
    return max(1, _COPY_BYTES // max(1, room[:1].nbytes))


def _pieces(pairs: Pairs, at_once: int) -> list[tuple[Tensor, Tensor]]:
    """(sources, destinations), int64 on the host."""
    found = []
    for first in range(0, len(pairs), at_once):
        sources, destinations = zip(*pairs[first : first + at_once], strict=True)
        found.append((torch.tensor(sources), torch.tensor(destinations)))
    return found
