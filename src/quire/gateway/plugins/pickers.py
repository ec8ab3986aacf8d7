"""Pickers: from scores to an order. Definitions: llm-d-router, …/scheduling/picker."""

from __future__ import annotations

import random
from collections.abc import Sequence

from quire.gateway.endpoint import Endpoint
from quire.gateway.plugin import Parameters, Picker
from quire.gateway.request import InferenceRequest


class PickerParameters(Parameters, frozen=True):
    max_num_of_endpoints: int = 1
    """How many are named to Envoy, which tries the next when one fails. quire's own proxy asks anew instead."""


class Cut(Picker):
    """At most so many."""

    def __init__(self, most: int, rng: random.Random) -> None:
        self._most = max(most, 1)
        self._rng = rng


class MaxScore(Cut):
    """`max-score-picker`: by score; chance decides between equals."""

    def pick(
        self, request: InferenceRequest, candidates: Sequence[Endpoint], totals: Sequence[float]
    ) -> Sequence[Endpoint]:
        if self._most == 1:
            best = max(totals)
            ties = [candidates[index] for index, total in enumerate(totals) if total == best]
            return [ties[0] if len(ties) == 1 else self._rng.choice(ties)]
        order = sorted(range(len(candidates)), key=lambda index: (-totals[index], self._rng.random()))
        return [candidates[index] for index in order[: self._most]]


class RandomPick(Cut):
    """`random-picker`"""

    def pick(
        self, request: InferenceRequest, candidates: Sequence[Endpoint], totals: Sequence[float]
    ) -> Sequence[Endpoint]:
        return self._rng.sample(candidates, min(self._most, len(candidates)))


class WeightedRandom(Cut):
    """`weighted-random-picker`: as often as its score says (A-Res, Efraimidis and Spirakis 2006)."""

    def pick(
        self, request: InferenceRequest, candidates: Sequence[Endpoint], totals: Sequence[float]
    ) -> Sequence[Endpoint]:
        weights = [max(total, 0.0) for total in totals]
        if not any(weights):
            weights = [1.0] * len(totals)
        keys = [self._rng.random() ** (1.0 / weight) if weight else -1.0 for weight in weights]
        order = sorted(range(len(candidates)), key=lambda index: -keys[index])
        return [candidates[index] for index in order[: self._most]]


class RoundRobin(Picker):
    """`round-robin-picker` (quire's own): each in turn, whatever the scores."""

    def __init__(self) -> None:
        self._next = 0

    def pick(
        self, request: InferenceRequest, candidates: Sequence[Endpoint], totals: Sequence[float]
    ) -> Sequence[Endpoint]:
        self._next += 1
        return [candidates[self._next % len(candidates)]]
