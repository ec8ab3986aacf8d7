"""What an endpoint's time is made of, learnt from the requests that it served.

    TTFT = base + prefill x (tokens queued before + own tokens not cached)
    TPOT = step + sequence x (others beside it)

Each is a line fitted by weighted least squares whose evidence fades with time, so that a machine that changes is
believed again after a while. All endpoints' evidence together is the prior of each: one that has just come is taken for
average hardware, and a few requests tell otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

HALF_LIFE: Final = 60.0
"""Seconds after which an observation counts half."""
PRIOR_WEIGHT: Final = 4.0
"""Observations that the average of all endpoints counts for."""
OUTLIER: Final = 8.0
"""An observation of more than so many times what was expected counts as that."""


@dataclass(slots=True)
class Line:
    """y = intercept + slope·x, both at least 0, by sums that fade."""

    intercept: float
    slope: float
    """Until something was seen."""
    n: float = 0.0
    sx: float = 0.0
    sy: float = 0.0
    sxx: float = 0.0
    sxy: float = 0.0
    time: float = 0.0

    def fade(self, now: float) -> None:
        if now > self.time:
            kept = 0.5 ** ((now - self.time) / HALF_LIFE)
            self.n, self.sx, self.sy = self.n * kept, self.sx * kept, self.sy * kept
            self.sxx, self.sxy = self.sxx * kept, self.sxy * kept
        self.time = now

    def add(self, x: float, y: float, now: float) -> None:
        self.fade(now)
        self.n += 1.0
        self.sx += x
        self.sy += y
        self.sxx += x * x
        self.sxy += x * y

    def fit(self, prior: tuple[float, float]) -> tuple[float, float]:
        """Intercept and slope, pulled to those of `prior` (a ridge of `PRIOR_WEIGHT` observations)."""
        n, sx, sy, sxx, sxy = self.n, self.sx, self.sy, self.sxx, self.sxy
        mean_square = sxx / n if n else 0.0
        ridge_slope = PRIOR_WEIGHT * (mean_square or 1.0)
        a = n + PRIOR_WEIGHT
        d = sxx + ridge_slope
        right = (sy + PRIOR_WEIGHT * prior[0], sxy + ridge_slope * prior[1])
        determinant = a * d - sx * sx
        if determinant <= 0:
            return prior
        intercept = (right[0] * d - sx * right[1]) / determinant
        slope = (a * right[1] - sx * right[0]) / determinant
        if slope < 0:
            return max(right[0] / a, 0.0), 0.0
        if intercept < 0:
            return 0.0, max(right[1] / d, 0.0)
        return intercept, slope


@dataclass(slots=True)
class Pace:
    """One endpoint's, or all endpoints' together."""

    ttft: Line = field(default_factory=lambda: Line(0.02, 5e-4))
    tpot: Line = field(default_factory=lambda: Line(0.02, 5e-4))


@dataclass(frozen=True, slots=True)
class Costs:
    """Seconds: for a first token apart from the prompt, per prompt token, per decode step, per sequence beside."""

    base: float
    prefill: float
    step: float
    sequence: float


class Learner:
    """Paces by endpoint key, and of all."""

    def __init__(self) -> None:
        self._all = Pace()
        self._paces: dict[str, Pace] = {}

    def costs(self, key: str, now: float) -> Costs:
        pace = self._paces.get(key)
        base, prefill = _fit(None if pace is None else pace.ttft, self._all.ttft, now)
        step, sequence = _fit(None if pace is None else pace.tpot, self._all.tpot, now)
        return Costs(base, max(prefill, 1e-9), max(step, 1e-9), sequence)

    def saw_first(self, key: str, tokens: int, ttft: float, now: float) -> None:
        """`tokens`: queued before it, and its own that were not cached."""
        costs = self.costs(key, now)
        pace = self._paces.setdefault(key, Pace())
        _add((pace.ttft, self._all.ttft), (tokens, ttft), costs.base + costs.prefill * tokens, now)

    def saw_tokens(self, key: str, beside: int, tpot: float, now: float) -> None:
        """`tpot`: seconds per token of a request with so many others beside it."""
        costs = self.costs(key, now)
        pace = self._paces.setdefault(key, Pace())
        _add((pace.tpot, self._all.tpot), (beside, tpot), costs.step + costs.sequence * beside, now)

    def forget(self, key: str) -> None:
        self._paces.pop(key, None)


def _add(lines: tuple[Line, Line], seen: tuple[float, float], expected: float, now: float) -> None:
    x, y = seen
    for line in lines:
        line.add(x, min(y, OUTLIER * expected) if line.n >= PRIOR_WEIGHT else y, now)


def _fit(own: Line | None, shared: Line, now: float) -> tuple[float, float]:
    shared.fade(now)
    prior = shared.fit((shared.intercept, shared.slope)) if shared.n >= 1 else (shared.intercept, shared.slope)
    if own is None:
        return prior
    own.fade(now)
    return own.fit(prior)
