"""Tokens on their way from the device to the host."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class Reading(Protocol):
    def wait(self) -> list[int]:
        """The numbers, when they are here."""
        ...


class Readback:
    """Starts copies that are waited for later, in the order in which they were started. The buffers are used in turn:
    no more than `in_flight` may be unread."""

    def __init__(self, count: int, device: torch.device, in_flight: int) -> None:
        self._is_cuda = device.type == "cuda"
        self._buffers = [torch.zeros(count, dtype=torch.int64, pin_memory=self._is_cuda) for _ in range(in_flight + 1)]
        self._next = 0

    def start(self, numbers_s: Tensor) -> Reading:
        buffer = self._buffers[self._next][: len(numbers_s)]
        self._next = (self._next + 1) % len(self._buffers)
        buffer.copy_(numbers_s, non_blocking=True)
        event = None
        if self._is_cuda:
            event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
            event.record()
        return _Copy(buffer, event)


class _Copy:
    def __init__(self, buffer: Tensor, event: torch.cuda.Event | None) -> None:
        self._buffer = buffer
        self._event = event

    def wait(self) -> list[int]:
        if self._event is not None:
            self._event.synchronize()
        numbers: list[int] = self._buffer.tolist()
        return numbers
