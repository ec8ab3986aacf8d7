"""What endpoints say of themselves, for as long as it is news.

A page that was not read for a while says nothing about now: its endpoint counts as the mean of those whose pages are
fresh, so that it neither draws what comes because it was idle when it fell silent, nor is shunned for it. Where nobody
is fresh all count alike.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from quire.gateway.endpoint import Clock, Endpoint, EndpointMetrics
from quire.gateway.plugin import Services

STALENESS: Final = "metrics_staleness"
"""Under this name the gateway shares the seconds after which what an endpoint said counts no more."""
DEFAULT_STALENESS: Final = 5.0


def staleness_for(scrape_interval: float) -> float:
    """Seconds, where pages are read so often: a reading may fail, or be late, before it counts."""
    return max(DEFAULT_STALENESS, 3.0 * scrape_interval)


def staleness_of(services: Services) -> float:
    """Seconds, as this gateway has them."""
    seconds = services.shared.get(STALENESS, DEFAULT_STALENESS)
    assert isinstance(seconds, float)
    return seconds


@dataclass(frozen=True, slots=True)
class Reports:
    clock: Clock
    staleness: float = DEFAULT_STALENESS

    @classmethod
    def of(cls, services: Services) -> Reports:
        return cls(services.clock, staleness_of(services))

    def fresh(self, endpoints: Sequence[Endpoint]) -> Sequence[EndpointMetrics | None]:
        """What each says; None of one whose page was never read, or too long ago."""
        since = self.clock() - self.staleness
        return [None if one.metrics is None or one.metrics.time < since else one.metrics for one in endpoints]

    def numbers(self, endpoints: Sequence[Endpoint], of: Callable[[EndpointMetrics], float]) -> Sequence[float]:
        """One for each."""
        return fill([None if metrics is None else of(metrics) for metrics in self.fresh(endpoints)])


def fill(numbers: Sequence[float | None]) -> Sequence[float]:
    """The mean of those that are known, in place of those that are not; 0 where none is."""
    known = [number for number in numbers if number is not None]
    if len(known) == len(numbers):
        return known
    mean = sum(known) / len(known) if known else 0.0
    return [mean if number is None else number for number in numbers]
