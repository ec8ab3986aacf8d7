"""Weights on their way from a mapped file to a GPU.

The driver would copy pageable memory itself, through one small buffer and with one thread. Here several threads fill
one pinned buffer while the last one travels.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

BUFFER_BYTES = 32 << 20
NUM_BUFFERS = 3
MAX_THREADS = 8
_AT_ONCE = 1 << 20
"""Bytes that are not worth a buffer of their own."""


class Upload:
    """To `device`, by `threads` threads at most. What it returns may be used at once, on the current stream."""

    def __init__(self, device: torch.device, threads: int, *, buffer_bytes: int = BUFFER_BYTES) -> None:
        self._device = device
        self._is_cuda = device.type == "cuda"
        self._threads = max(1, min(threads, MAX_THREADS))
        self._pool = ThreadPoolExecutor(self._threads, "quire-upload")
        self._stream: Any = torch.cuda.Stream(device) if self._is_cuda else None  # type: ignore[no-untyped-call]
        self._buffers = [
            torch.empty(buffer_bytes, dtype=torch.uint8, pin_memory=self._is_cuda) for _ in range(NUM_BUFFERS)
        ]
        self._sent: list[Any] = [None] * NUM_BUFFERS
        """When the copy out of each buffer is done."""
        self._next = 0

    def __call__(self, tensor: Tensor) -> Tensor:
        """A copy on the device, dense. Raises torch.OutOfMemoryError."""
        if tensor.nbytes <= _AT_ONCE and self._is_cuda:
            return tensor.to(self._device)
        dense = tensor.contiguous()
        out = torch.empty(dense.shape, dtype=dense.dtype, device=self._device)
        source: NDArray[np.uint8] = dense.reshape(-1).view(torch.uint8).numpy()
        target = out.view(-1).view(torch.uint8)
        if self._is_cuda:
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
        size = len(self._buffers[0])
        for first in range(0, len(source), size):
            self._send(source[first : first + size], target[first : first + size])
        if self._is_cuda:
            out.record_stream(self._stream)
            torch.cuda.current_stream(self._device).wait_stream(self._stream)
        return out

    def close(self) -> None:
        """Waits for what is under way, and gives the buffers back."""
        if self._is_cuda:
            self._stream.synchronize()
        self._pool.shutdown()
        self._buffers.clear()

    def _send(self, source: NDArray[np.uint8], target: Tensor) -> None:
        number = self._next
        self._next = (number + 1) % NUM_BUFFERS
        if self._sent[number] is not None:
            self._sent[number].synchronize()
        buffer = self._buffers[number][: len(source)]
        self._fill(buffer.numpy(), source)
        if not self._is_cuda:
            target.copy_(buffer)
            return
        with torch.cuda.stream(self._stream):
            target.copy_(buffer, non_blocking=True)
            event: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()
        self._sent[number] = event

    def _fill(self, buffer: NDArray[np.uint8], source: NDArray[np.uint8]) -> None:
        """numpy copies without the interpreter's lock, so the threads do go side by side; pages that are not in memory
        are read from the disk by as many."""
        part = -(-len(source) // self._threads)
        parts: Sequence[slice] = [slice(first, first + part) for first in range(0, len(source), part)]
        done = wait([self._pool.submit(np.copyto, buffer[piece], source[piece]) for piece in parts]).done
        for future in done:
            future.result()
