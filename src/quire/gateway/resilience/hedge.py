"""When a request that has no answer yet is asked a second time, elsewhere. Off unless asked for.

Dean and Barroso, The Tail at Scale (2013): waiting until most answers would have begun keeps the extra work small.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from quire.gateway.resilience.budget import Budget
from quire.gateway.resilience.settings import ResilienceSettings

REMEMBERED = 512
"""First-byte times that the quantile is of."""
ENOUGH = 32
"""Fewer say nothing yet."""
RECOMPUTED_EVERY = 32


@dataclass(slots=True)
class Hedging:
    settings: ResilienceSettings
    budget: Budget = field(init=False)
    _ttfts: deque[float] = field(default_factory=lambda: deque(maxlen=REMEMBERED))
    _num_seen: int = 0
    _quantile: float | None = None

    def __post_init__(self) -> None:
        self.budget = Budget(share=self.settings.hedge_share, burst=self.settings.retry_burst)

    @property
    def enabled(self) -> bool:
        return self.settings.hedge_delay is not None or self.settings.hedge_quantile is not None

    def saw(self, ttft: float) -> None:
        """How long one answer took to begin, in seconds."""
        if self.settings.hedge_quantile is None:
            return
        self._ttfts.append(ttft)
        self._num_seen += 1
        if len(self._ttfts) >= ENOUGH and self._num_seen % RECOMPUTED_EVERY == 0:
            ordered = sorted(self._ttfts)
            self._quantile = ordered[min(int(len(ordered) * self.settings.hedge_quantile), len(ordered) - 1)]

    def delay(self) -> float | None:
        """Seconds to wait before asking again; None: not at all."""
        fixed = self.settings.hedge_delay
        if self.settings.hedge_quantile is None:
            return fixed
        if self._quantile is None:
            return None
        return max(self._quantile, fixed or 0.0)
