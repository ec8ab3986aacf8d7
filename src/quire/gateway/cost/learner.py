"""What an endpoint's time is made of, learnt from the requests that were served.

    TTFT = speed x (base + prefill x (tokens queued before + own tokens not cached))
    TPOT = speed x (step + sequence x (others beside it))

The lines are fitted by least squares to what all endpoints showed, each observation divided by its endpoint's speed;
an endpoint has only its speed, a factor for either line. So one that has just come is taken for average hardware, a
few requests tell otherwise, and what chance did to one endpoint's requests does not send the next ones elsewhere.
The endpoint in the middle has speed 1, so that the lines are its own.
Evidence fades: a machine that was slow is believed to be average again after a while, tried, and judged anew.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

HALF_LIFE: Final = 60.0
"""Seconds after which an observation counts half."""
PRIOR_WEIGHT: Final = 4.0
"""Observations that what was believed before counts for."""
OUTLIER: Final = 8.0
"""An observation of more than so many times what was expected, or less than its reciprocal, counts as that."""
SAME_SPEED: Final = math.log(1.2)
"""Endpoints that differ by less are taken to be equal: the difference is chance, mostly."""
LEAST_SLOPE: Final = 0.1
WHOLE_RATE: Final = 0.05
"""How far one answer of which only the whole is known moves the lines."""
PREFILL_HINTS: Final = (1e-7, 1.0)
"""Seconds per prompt token that an endpoint may say of itself; what lies outside says nothing."""
STEP_HINTS: Final = (1e-5, 10.0)
"""Seconds per decode step, likewise."""
MIDDLE_EVERY: Final = 1.0
"""Seconds between two looks for the endpoint in the middle."""


@dataclass(slots=True)
class Line:
    """y = intercept + slope·x, neither below 0, by sums that fade."""

    intercept: float
    slope: float
    least: float = 0.0
    """Of the mean y to the mean x, what the slope is at least: where x and y have been seen to go together only by
    chance, or not at all, a slope of 0 would say that x costs nothing."""
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

    def scale(self, factor: float) -> None:
        self.intercept *= factor
        self.slope *= factor

    def _fit(self) -> None:
        """What it was pulls as much as `PRIOR_WEIGHT` observations do, so that it stays where nothing speaks
        against it: a slope, where all x were the same."""
        ridge = PRIOR_WEIGHT * (self.sxx / self.n or 1.0)
        a, b, d = self.n + PRIOR_WEIGHT, self.sx, self.sxx + ridge
        e, f = self.sy + PRIOR_WEIGHT * self.intercept, self.sxy + ridge * self.slope
        determinant = a * d - b * b  # positive: sx² ≤ n·sxx
        intercept, slope = (e * d - b * f) / determinant, (a * f - b * e) / determinant
        floor = self.least * self.sy / self.sx if self.sx >= 1.0 else 0.0
        if slope < floor:
            slope = floor
            intercept = max((e - b * slope) / a, 0.0)
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

    def mean(self, now: float) -> float:
        self._fade(now)
        return self.total / (self.n + PRIOR_WEIGHT)


class Speeds:
    """Of all endpoints, by one line."""

    def __init__(self) -> None:
        self._speeds: dict[str, Speed] = {}
        self._middle = 0.0
        self._time = -math.inf

    def factor(self, key: str, now: float) -> float:
        speed = self._speeds.get(key)
        if speed is None:
            return 1.0
        if now >= self._time + MIDDLE_EVERY:
            means = sorted(one.mean(now) for one in self._speeds.values())
            self._middle, self._time = means[(len(means) - 1) // 2], now
        difference = speed.mean(now) - self._middle
        return 1.0 if abs(difference) < SAME_SPEED else math.exp(difference)

    def add(self, key: str, ratio: float, now: float) -> None:
        self._speeds.setdefault(key, Speed()).add(ratio, now)

    def forget(self, key: str) -> None:
        self._speeds.pop(key, None)


@dataclass(slots=True)
class Costs:
    """Seconds: for a first token apart from the prompt, per prompt token, per decode step, per sequence beside."""

    base: float
    prefill: float
    step: float
    sequence: float


class Learner:
    """The lines of a pool, and the speed of each endpoint by its key."""

    def __init__(self) -> None:
        self._ttft = Line(0.02, 1e-4, LEAST_SLOPE)
        self._tpot = Line(0.02, 5e-4)
        self._prefill = Speeds()
        self._decode = Speeds()

    def costs(self, key: str, now: float) -> Costs:
        prefill, decode = self._prefill.factor(key, now), self._decode.factor(key, now)
        return Costs(
            base=prefill * self._ttft.intercept,
            prefill=prefill * max(self._ttft.slope, 1e-9),
            step=decode * max(self._tpot.intercept, 1e-9),
            sequence=decode * self._tpot.slope,
        )

    def hint(self, prefill: float | None, step: float | None) -> None:
        """What an endpoint says of its paces; believed until something was seen, if it can be."""
        if prefill is not None and not self._ttft.n and PREFILL_HINTS[0] <= prefill <= PREFILL_HINTS[1]:
            self._ttft.slope = prefill
        if step is not None and not self._tpot.n and STEP_HINTS[0] <= step <= STEP_HINTS[1]:
            self._tpot.intercept = step

    def saw_first(self, key: str, tokens: float, ttft: float, now: float) -> None:
        """`tokens`: queued before it, and its own that were not cached."""
        _learn(self._ttft, self._prefill, key, (tokens, ttft), now)

    def saw_tokens(self, key: str, beside: float, tpot: float, now: float) -> None:
        """`tpot`: seconds per token of a request with so many others beside it."""
        _learn(self._tpot, self._decode, key, (beside, tpot), now)

    def saw_whole(self, key: str, ratio: float, now: float) -> None:
        """`ratio`: how many times as long as `costs` said an answer took of which only the whole time is known. It
        tells the endpoint's speed; and of the lines, while nothing else does, how high both are, not their shapes."""
        ratio = min(max(ratio, 1.0 / OUTLIER), OUTLIER)
        for line, speeds in ((self._ttft, self._prefill), (self._tpot, self._decode)):
            factor = speeds.factor(key, now)
            speeds.add(key, ratio * factor, now)
            if line.n < PRIOR_WEIGHT:
                line.scale(ratio**WHOLE_RATE)

    def forget(self, key: str) -> None:
        self._prefill.forget(key)
        self._decode.forget(key)


def _learn(line: Line, speeds: Speeds, key: str, seen: tuple[float, float], now: float) -> None:
    x, y = seen
    factor = speeds.factor(key, now)
    expected = max(line.at(x), 1e-9)
    reference = max(y, 1e-9) / factor
    if line.n >= PRIOR_WEIGHT:  # before, nothing is known that it could be compared with
        reference = min(max(reference, expected / OUTLIER), expected * OUTLIER)
        speeds.add(key, reference * factor / expected, now)
    line.add(x, reference, now)
