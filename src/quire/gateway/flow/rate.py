"""How fast requests are let go, for telling callers when to come back."""

from __future__ import annotations

import math
from typing import Final

HALF_LIFE: Final = 10.0
"""Seconds after which a dispatch counts half."""
SHORTEST: Final = 1.0
LONGEST: Final = 60.0


class DispatchRate:
    def __init__(self, now: float) -> None:
        self._started = now
        self._time = now
        self._count = 0.0

    def add(self, now: float) -> None:
        self._count = self._decayed(now) + 1.0
        self._time = now

    def per_second(self, now: float) -> float:
        """Decayed dispatches over decayed time: right from the beginning on."""
        age = max(now - self._started, 1.0)
        seconds = HALF_LIFE / math.log(2) * (1.0 - math.exp2(-age / HALF_LIFE))
        return self._decayed(now) / seconds

    def retry_after(self, ahead: int, now: float) -> float:
        """Whole seconds until `ahead` requests are gone at this rate, from 1 to 60."""
        rate = self.per_second(now)
        if rate * LONGEST <= ahead:
            return LONGEST
        return float(min(max(math.ceil(ahead / rate), SHORTEST), LONGEST)) if ahead else SHORTEST

    def _decayed(self, now: float) -> float:
        return self._count * math.exp2(-max(now - self._time, 0.0) / HALF_LIFE)
