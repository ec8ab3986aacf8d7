"""The memory that bodies take which have to be whole before they go on."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Holding:
    """Bytes of all requests, and of answers that are not streamed."""

    most: int
    now: int = 0


@dataclass(slots=True)
class Share:
    """What one body has of it."""

    holding: Holding
    size: int = 0

    def take(self, size: int) -> bool:
        """Whether there is room for `size` bytes more; if so they count until `release`."""
        if self.holding.now + size > self.holding.most:
            return False
        self.holding.now += size
        self.size += size
        return True

    def release(self) -> None:
        self.holding.now -= self.size
        self.size = 0
