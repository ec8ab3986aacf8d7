"""What waits, as it is shown to those outside."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class LaneSnapshot:
    """What waits for one model in one priority band."""

    model: str
    priority: int
    requests: int
    has_endpoints: bool
    saturation: float
    """Of the model's endpoints, when last looked at; 0 before."""
    oldest: float
    """Seconds that the oldest of the model has waited."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FlowSnapshot:
    waiting: int
    size: int
    inside: int
    """Requests that were let go and are not over."""
    dispatch_rate: float
    """A second."""
    lanes: Sequence[LaneSnapshot]

    def by_model(self) -> Mapping[str, int]:
        """Requests that wait."""
        models: Counter[str] = Counter()
        for lane in self.lanes:
            models[lane.model] += lane.requests
        return models

    def by_priority(self) -> Mapping[int, int]:
        priorities: Counter[int] = Counter()
        for lane in self.lanes:
            priorities[lane.priority] += lane.requests
        return priorities
