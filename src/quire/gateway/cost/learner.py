"""What an endpoint's time is made of, learnt from the requests that were served.

    TTFT = speed x (base + prefill x (tokens queued before + own tokens not cached))
    TPOT = speed x (step + sequence x (others beside it))

The lines are fitted by least squares to what all endpoints showed, each observation divided by its endpoint's speed;
an endpoint has only its speed, a factor for either line. So one that has just come is taken for average hardware, a
few requests tell otherwise, and what chance did to one endpoint's requests does not send the next ones elsewhere.
Evidence fades: a machine that was slow is believed to be average again after a while, tried, and judged anew.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Final

HALF_LIFE: Final = 60.0
"""Seconds after which an observation counts half."""
PRIOR_WEIGHT: Final = 4.0
"""Observations that what was believed before counts for."""
OUTLIER: Final = 8.0
"""An observation of more than so many times what was expected, or less than its reciprocal, counts as that."""
SAME_SPEED: Final = math.log(1.2)
"""Endpoints that differ by less are taken to be equal: the difference is chance, mostly."""


@dataclass(slots=True)
class Line:
    """y = intercept + slope·x, neither below 0, by sums that fade."""

    intercept: float
    slope: float
    n: float = 0.0
    sx: float = 0.0
    sy: float = 0.0
    sxx: float = 0.0
    sxy: float = 0.0
    time: float = 0.0

    def at(self, x: float) -> float:
        return self.intercept + self.slope * x

    def add(self, x: float, y: float, now: float) -> None:
        kept = 0.5 ** ((now - self.time) / HALF_LIFE) if now > self.time else 1.0
        self.time = now
        self.n = self.n * kept + 1.0
        self.sx = self.sx * kept + x
        self.sy = self.sy * kept + y
        self.sxx = self.sxx * kept + x * x
        self.sxy = self.sxy * kept + x * y
        self._fit()

    def _fit(self) -> None:
        """What it was pulls as much as `PRIOR_WEIGHT` observations do, so that it stays where nothing speaks
        against it: a slope, where all x were the same."""
        ridge = PRIOR_WEIGHT * (self.sxx / self.n or 1.0)
        a, b, d = self.n + PRIOR_WEIGHT, self.sx, self.sxx + ridge
        e, f = self.sy + PRIOR_WEIGHT * self.intercept, self.sxy + ridge * self.slope
        determinant = a * d - b * b  # positive: sx² ≤ n·sxx
        intercept, slope = (e * d - b * f) / determinant, (a * f - b * e) / determinant
        if slope < 0:
            intercept, slope = e / a, 0.0
        elif intercept < 0:
            intercept, slope = 0.0, f / d
        self.intercept, self.slope = intercept, slope


@dataclass(slots=True)
class Speed:
    """How many times as long as the line says one endpoint takes: a mean of logarithms, which fades."""

    n: float = 0.0
    total: float = 0.0
    time: float = 0.0

    def _fade(self, now: float) -> None:
        if now > self.time:
            kept = 0.5 ** ((now - self.time) / HALF_LIFE)
            self.n, self.total, self.time = self.n * kept, self.total * kept, now

    def add(self, ratio: float, now: float) -> None:
        self._fade(now)
        self.n += 1.0
        self.total += math.log(ratio)

    def factor(self, now: float) -> float:
        self._fade(now)
        mean = self.total / (self.n + PRIOR_WEIGHT)
        return 1.0 if abs(mean) < SAME_SPEED else math.exp(mean)


@dataclass(slots=True)
class Pace:
    """One endpoint's speeds."""

    prefill: Speed = field(default_factory=Speed)
    decode: Speed = field(default_factory=Speed)


@dataclass(frozen=True, slots=True)
class Costs:
    """Seconds: for a first token apart from the prompt, per prompt token, per decode step, per sequence beside."""

    base: float
    prefill: float
    step: float
    sequence: float


class Learner:
    """The lines of a pool, and the speed of each endpoint by its key."""

    def __init__(self) -> None:
        self._ttft = Line(0.02, 1e-4)
        self._tpot = Line(0.02, 5e-4)
        self._paces: dict[str, Pace] = {}

    def costs(self, key: str, now: float) -> Costs:
        pace = self._paces.get(key)
        prefill, decode = (1.0, 1.0) if pace is None else (pace.prefill.factor(now), pace.decode.factor(now))
        return Costs(
            base=prefill * self._ttft.intercept,
            prefill=prefill * max(self._ttft.slope, 1e-9),
            step=decode * max(self._tpot.intercept, 1e-9),
            sequence=decode * self._tpot.slope,
        )

    def hint(self, prefill: float | None, step: float | None) -> None:
        """What an endpoint says of its paces; believed until something was seen."""
        if prefill and not self._ttft.n:
            self._ttft.slope = prefill
        if step and not self._tpot.n:
            self._tpot.intercept = step

    def saw_first(self, key: str, tokens: float, ttft: float, now: float) -> None:
        """`tokens`: queued before it, and its own that were not cached."""
        _learn(self._ttft, self._paces.setdefault(key, Pace()).prefill, tokens, ttft, now)

    def saw_tokens(self, key: str, beside: float, tpot: float, now: float) -> None:
        """`tpot`: seconds per token of a request with so many others beside it."""
        _learn(self._tpot, self._paces.setdefault(key, Pace()).decode, beside, tpot, now)

    def forget(self, key: str) -> None:
        self._paces.pop(key, None)


def _learn(line: Line, speed: Speed, x: float, y: float, now: float) -> None:
    factor = speed.factor(now)
    expected = max(line.at(x), 1e-9)
    reference = max(y, 1e-9) / factor
    if line.n >= PRIOR_WEIGHT:  # before, nothing is known that it could be compared with
        reference = min(max(reference, expected / OUTLIER), expected * OUTLIER)
        speed.add(reference * factor / expected, now)
    line.add(x, reference, now)
