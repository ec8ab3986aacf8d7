"""Choosing by predicted latency: how much of the request's objectives each endpoint is expected to leave.

Definitions: llm-d-router, …/scorer/latency and …/filter/sloheadroomtier. Headroom is the objective less the prediction;
an objective that was not given counts as 0, so that everybody misses it, and the fastest by the least.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Sequence
from typing import Final, Literal

import msgspec

from quire.core.errors import ConfigError
from quire.gateway.endpoint import Endpoint
from quire.gateway.plugin import Filter, Parameters, Scorer
from quire.gateway.plugins.affinity_scorers import NO_MATCH, match_ratio, matches_of
from quire.gateway.plugins.reports import Reports
from quire.gateway.request import InferenceRequest

Headroom = tuple[float, float]
"""Of TTFT and of TPOT, in seconds; negative where the objective is missed."""
ALIKE: Final = 1e-9
GRADES: Final = 100
"""Scores are whole hundredths, as in llm-d."""


def headroom(request: InferenceRequest, endpoint: Endpoint) -> Headroom | None:
    predicted = request.predictions.get(endpoint.key)
    if predicted is None:
        return None
    return (request.slo_ttft or 0.0) - predicted.ttft, (request.slo_tpot or 0.0) - predicted.tpot


class LatencyParameters(Parameters, frozen=True):
    ttft_weight: float = 0.8
    tpot_weight: float = 0.2
    headroom_selection_strategy: Literal["least", "most"] = "least"
    composite_kv_weight: float = msgspec.field(default=1.0, name="compositeKVWeight")
    composite_queue_weight: float = 1.0
    composite_prefix_weight: float = 1.0
    latency_prediction_info_producer_name: str = ""
    prefix_match_info_producer_name: str = ""


class LatencyScorer(Scorer):
    """`latency-scorer`: among those that meet the objectives, or are not predicted, the tightest is best (`least`) or
    the widest (`most`), and the others get 0. If all miss them, those that are idle; else those that miss TPOT alone,
    else TTFT alone, else both; among these who misses by the least. Without any prediction a mean of free KV cache,
    short queue and matched prefix."""

    def __init__(self, parameters: LatencyParameters, reports: Reports) -> None:
        weights = (parameters.ttft_weight, parameters.tpot_weight)
        composite = (
            parameters.composite_kv_weight,
            parameters.composite_queue_weight,
            parameters.composite_prefix_weight,
        )
        if not all(0.0 <= weight < math.inf for weight in (*weights, *composite)):
            raise ConfigError(
                "latency-scorer: a weight is negative or infinite.", param="plugins", remedy="They are 0 or more."
            )
        self._weights = _shares(weights, (1.0, 0.0))
        self._composite = _shares(composite, (1.0, 0.0, 0.0))
        self._reports = reports
        self._most = parameters.headroom_selection_strategy == "most"
        self._prefix_producer = parameters.prefix_match_info_producer_name

    def score(self, request: InferenceRequest, candidates: Sequence[Endpoint]) -> Sequence[float]:
        rooms = [headroom(request, endpoint) for endpoint in candidates]
        if not any(room is not None for room in rooms):
            return self._composite_scores(request, candidates)
        chosen = [index for index, room in enumerate(rooms) if room is None or min(room) >= 0]
        met = bool(chosen)
        if not met:
            chosen = self._least_bad([room for room in rooms if room is not None], candidates)
        graded = self._grade([rooms[index] or (0.0, 0.0) for index in chosen], most=self._most and met)
        scores = dict(zip(chosen, graded, strict=True))
        return [scores.get(index, 0.0) for index in range(len(candidates))]

    @staticmethod
    def _least_bad(rooms: Sequence[Headroom], candidates: Sequence[Endpoint]) -> list[int]:
        """Of rooms that all miss something: the idle, else the mildest kind of miss that there is."""
        idle = [index for index, endpoint in enumerate(candidates) if not endpoint.load.requests]
        if idle:
            return idle
        kinds: tuple[Callable[[Headroom], bool], ...] = (
            lambda room: room[0] >= 0,
            lambda room: room[1] >= 0,
            lambda _room: True,
        )
        kind = next(kind for kind in kinds if any(map(kind, rooms)))
        return [index for index, room in enumerate(rooms) if kind(room)]

    def _grade(self, rooms: Sequence[Headroom], *, most: bool) -> Sequence[float]:
        ttft, ttft_range = _spread(room[0] for room in rooms)
        tpot, tpot_range = _spread(room[1] for room in rooms)
        weights = self._weights
        if ttft_range <= ALIKE < tpot_range:
            weights = (0.0, 1.0)  # what is alike everywhere does not blur what is not
        elif tpot_range <= ALIKE < ttft_range:
            weights = (1.0, 0.0)
        blends = [weights[0] * one + weights[1] * other for one, other in zip(ttft, tpot, strict=True)]
        return [min((int((b if most else 1.0 - b) * GRADES) + 1) / GRADES, 1.0) for b in blends]

    def _composite_scores(self, request: InferenceRequest, candidates: Sequence[Endpoint]) -> Sequence[float]:
        waiting = self._reports.numbers(candidates, lambda metrics: metrics.waiting)
        usage = self._reports.numbers(candidates, lambda metrics: min(metrics.kv_usage, 1.0))
        longest = max(waiting)
        matches = matches_of(request, self._prefix_producer)
        kv, queue, prefix = self._composite
        scores: list[float] = []
        for endpoint, length, used in zip(candidates, waiting, usage, strict=True):
            short = (longest - length) / longest if longest else 1.0
            ratio = match_ratio(request, matches.get(endpoint.key, NO_MATCH))
            scores.append(round(GRADES * (kv * (1.0 - used) + queue * short + prefix * ratio)) / GRADES)
        return scores


def _shares(weights: Sequence[float], otherwise: Sequence[float]) -> Sequence[float]:
    total = sum(weights)
    return [weight / total for weight in weights] if total > 0 else otherwise


def _spread(values: Iterable[float]) -> tuple[Sequence[float], float]:
    """Distances from 0 laid out from 0 (least) to 1 (most), 0.5 where they are alike; and how far apart they are."""
    distances = [abs(value) for value in values]
    least = min(distances)
    extent = max(distances) - least
    if extent <= ALIKE:
        return [0.5] * len(distances), extent
    return [(distance - least) / extent for distance in distances], extent


class HeadroomParameters(Parameters, frozen=True):
    epsilon_explore_neg: float = 0.01
    latency_prediction_info_producer_name: str = ""


class SloHeadroomTier(Filter):
    """`slo-headroom-tier-filter`: those that are predicted to meet the request's objectives, if there are any; rarely
    (`epsilonExploreNeg`) the others, so that what is known of them stays fresh. Who is not predicted is among the
    others; without any prediction all stay."""

    def __init__(self, parameters: HeadroomParameters, rng: random.Random) -> None:
        if not 0.0 <= parameters.epsilon_explore_neg <= 1.0:
            raise ConfigError(
                f"slo-headroom-tier-filter: epsilonExploreNeg is {parameters.epsilon_explore_neg}.",
                param="plugins",
                remedy="It is a probability, from 0 to 1.",
            )
        self._explore = parameters.epsilon_explore_neg
        self._rng = rng

    def filter(self, request: InferenceRequest, candidates: Sequence[Endpoint]) -> Sequence[Endpoint]:
        rooms = [headroom(request, endpoint) for endpoint in candidates]
        meets = [room is not None and min(room) >= 0 for room in rooms]
        if all(meets) or not any(meets):
            return candidates
        wanted = self._rng.random() >= self._explore
        return [endpoint for endpoint, met in zip(candidates, meets, strict=True) if met == wanted]
