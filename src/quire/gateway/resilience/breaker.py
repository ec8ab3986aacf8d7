"""A circuit breaker for one endpoint: closed → open after failures → half open after a while → closed or open again.

Pure: it is told what happened and when. Whether it may open is asked of the caller, who knows how many others have.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from enum import Enum

from quire.gateway.resilience.settings import ResilienceSettings

SLICES = 10
"""Of the window; failures leave it a slice at a time."""


class State(Enum):
    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"
    """One request is let through, to see."""


@dataclass(slots=True)
class Slice:
    began: float
    ok: int = 0
    failed: int = 0


@dataclass(slots=True)
class Breaker:
    settings: ResilienceSettings
    state: State = State.CLOSED
    probing: bool = False
    """Half open, and the one request is out."""
    reopens_at: float = 0.0
    _in_a_row: int = 0
    _openings: int = 0
    """In a row, without a window of quiet between."""
    _closed_at: float = float("-inf")
    _slices: deque[Slice] = field(default_factory=deque)

    @property
    def lets_through(self) -> bool:
        return self.state is State.CLOSED or (self.state is State.HALF_OPEN and not self.probing)

    def succeeded(self, now: float) -> None:
        self._slice(now).ok += 1
        self._in_a_row = 0
        if self.state is State.HALF_OPEN:
            self.state, self.probing = State.CLOSED, False
            self._closed_at = now
            self._slices.clear()

    def failed(self, now: float) -> bool:
        """Whether it should open now: call `open` if it may."""
        self._slice(now).failed += 1
        self._in_a_row += 1
        if self.state is State.HALF_OPEN:
            return True
        if self.state is State.OPEN:
            return False
        attempts = sum(part.ok + part.failed for part in self._slices)
        too_many = attempts >= self.settings.min_attempts and self._failed_share() > self.settings.failure_share
        return too_many or self._in_a_row >= self.settings.consecutive_failures

    def open(self, now: float) -> None:
        settings = self.settings
        if self.state is State.CLOSED and now - self._closed_at > settings.window:
            self._openings = 0
        seconds = min(settings.ejection * 2.0 ** min(self._openings, 30), settings.max_ejection)
        self._openings += 1
        self.state, self.probing = State.OPEN, False
        self.reopens_at = now + seconds
        self._in_a_row = 0
        self._slices.clear()

    def step(self, now: float) -> None:
        """Time has passed."""
        if self.state is State.OPEN and now >= self.reopens_at:
            self.state, self.probing = State.HALF_OPEN, False

    def probe(self) -> None:
        """A request goes out; if half open it is the one."""
        self.probing = self.state is State.HALF_OPEN

    def undecided(self) -> None:
        """The probe ended without telling anything: its client went away."""
        self.probing = False

    def _slice(self, now: float) -> Slice:
        while self._slices and self._slices[0].began <= now - self.settings.window:
            self._slices.popleft()
        if not self._slices or self._slices[-1].began <= now - self.settings.window / SLICES:
            self._slices.append(Slice(now))
        return self._slices[-1]

    def _failed_share(self) -> float:
        failed = sum(part.failed for part in self._slices)
        return failed / max(failed + sum(part.ok for part in self._slices), 1)
