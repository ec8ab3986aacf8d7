"""Keeping work that repeats within a share of the time, however dear it becomes."""

from __future__ import annotations

from math import inf
from typing import Final

SHARE: Final = 0.1
"""Of the time, that the work may take."""
LONGEST: Final = 1.0
"""Seconds without it, at most: what seems to have taken long may have been held up by other things."""


class Pace:
    def __init__(self, share: float = SHARE) -> None:
        self._rest = 1.0 / share - 1.0
        self._not_before = -inf

    def worked(self, seconds: float, now: float) -> None:
        """It was done just now, and took so long."""
        self._not_before = now + min(seconds * self._rest, LONGEST)

    def delay(self, now: float) -> float:
        """Seconds until it may be done again; 0 if it may be done now."""
        return max(self._not_before - now, 0.0)

    def may(self, now: float) -> bool:
        return now >= self._not_before
