"""Up to which saturation each priority may dispatch."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Literal

from quire.gateway.plugin import Plugin


class UsageLimitPolicy(Plugin):
    @abstractmethod
    def ceilings(self, saturation: float, priorities: Sequence[int]) -> Sequence[float]:
        """One for each of `priorities` (the highest first): it dispatches while the saturation is below. 0 holds it
        whatever the load."""


class StaticLimit(UsageLimitPolicy):
    """`static-usage-limit-policy`: one ceiling for all."""

    def __init__(self, threshold: float = 1.0) -> None:
        self._threshold = threshold

    def ceilings(self, saturation: float, priorities: Sequence[int]) -> Sequence[float]:
        return (self._threshold,) * len(priorities)


class PriorityHoldback(UsageLimitPolicy):
    """`priority-holdback-policy`: from `max_ceiling` for the highest priority down to `min_ceiling` for the lowest, in
    equal steps by rank, or in proportion to the priorities' values."""

    def __init__(self, min_ceiling: float, max_ceiling: float = 1.0, domain: Literal["rank", "value"] = "rank") -> None:
        self._min, self._max, self._domain = min_ceiling, max_ceiling, domain

    def ceilings(self, saturation: float, priorities: Sequence[int]) -> Sequence[float]:
        if len(priorities) < 2:
            return (self._max,) * len(priorities)
        span = self._max - self._min
        if self._domain == "rank":
            return [self._max - index * span / (len(priorities) - 1) for index in range(len(priorities))]
        highest, lowest = priorities[0], priorities[-1]
        return [self._min + (priority - lowest) / (highest - lowest) * span for priority in priorities]


class ExplicitHoldback(UsageLimitPolicy):
    """`priority-holdback-policy` with `domain: explicit`: ceilings by priority, 0 for those not named."""

    def __init__(self, ceilings: Mapping[int, float]) -> None:
        self._ceilings = dict(ceilings)

    def ceilings(self, saturation: float, priorities: Sequence[int]) -> Sequence[float]:
        return [self._ceilings.get(priority, 0.0) for priority in priorities]


class SoftReflectiveCeiling(UsageLimitPolicy):
    """`soft-reflective-ceiling-policy`: the highest of N priorities is never held back. The i-th is open below
    1 - i·saturation/(N-1), and from there on only in one call of round(saturation / (1 - saturation))."""

    def __init__(self) -> None:
        self._calls: list[int] = []

    def ceilings(self, saturation: float, priorities: Sequence[int]) -> Sequence[float]:
        count = len(priorities)
        self._calls.extend([0] * (count - len(self._calls)))
        return [1.0 if index == 0 else self._ceiling(saturation, index, count) for index in range(count)]

    def _ceiling(self, saturation: float, index: int, count: int) -> float:
        if saturation < 1.0 - index * saturation / (count - 1):
            return 1.0
        if saturation >= 1.0:
            return 0.0
        self._calls[index] += 1
        period = max(1, round(saturation / (1.0 - saturation + 1e-9)))
        return 1.0 if self._calls[index] % period == 0 else 0.0
