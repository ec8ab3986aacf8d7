"""Whether a batch is the next one: the numbers of one publisher's stream, which begin anew when its engine does."""

from __future__ import annotations

import math
from enum import Enum


class Turn(Enum):
    """What a batch is, by its number and the time that it tells."""

    NEXT = "next"
    FIRST = "first"
    """The first that is heard, and not the stream's first."""
    REPEATED = "repeated"
    GAP = "gap"
    RESTARTED = "restarted"
    """A number that has been, on a batch that is newer: another engine counts now."""


class BatchSequence:
    """The last batch that was taken in; `number` is None before the first."""

    def __init__(self) -> None:
        self.number: int | None = None
        self._ts = -math.inf
        self._fingerprint = 0

    def judge(self, number: int, ts: float) -> Turn:
        if self.number is None:
            return Turn.NEXT if number == 0 else Turn.FIRST
        if number == self.number + 1:
            return Turn.NEXT
        if number > self.number:
            return Turn.GAP
        return Turn.RESTARTED if ts > self._ts else Turn.REPEATED

    def take(self, number: int, ts: float, payload: bytes) -> None:
        self.number = number
        self._ts = ts if math.isfinite(ts) else -math.inf
        self._fingerprint = hash(payload)

    def is_last(self, number: int, payload: bytes) -> bool:
        """Whether this is the batch that was taken in last: then its engine is the same."""
        return number == self.number and hash(payload) == self._fingerprint

    def forget(self) -> None:
        self.number = None
        self._ts = -math.inf
