"""Scorers that look at how busy an endpoint is, by what it reported and by what this gateway has open there.

Definitions: llm-d-router, pkg/epp/framework/plugins/scheduling/scorer. For those that compare reports, an endpoint
whose metrics are not fresh counts as the mean of the others (`reports`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from quire.gateway.endpoint import Endpoint, EndpointMetrics
from quire.gateway.plugin import Parameters, Scorer
from quire.gateway.plugins.reports import Reports, fill
from quire.gateway.request import InferenceRequest


def _between(values: Sequence[float]) -> Sequence[float]:
    """The least is 1, the most 0; all alike are 1."""
    least, most = min(values), max(values)
    if most == least:
        return [1.0] * len(values)
    return [(most - value) / (most - least) for value in values]


class QueueScorer(Scorer):
    """`queue-scorer`"""

    def __init__(self, reports: Reports) -> None:
        self._reports = reports

    def score(self, request: InferenceRequest, candidates: Sequence[Endpoint]) -> Sequence[float]:
        return _between(self._reports.numbers(candidates, lambda metrics: metrics.waiting))


class RunningRequestsScorer(Scorer):
    """`running-requests-size-scorer`"""

    def __init__(self, reports: Reports) -> None:
        self._reports = reports

    def score(self, request: InferenceRequest, candidates: Sequence[Endpoint]) -> Sequence[float]:
        return _between(self._reports.numbers(candidates, lambda metrics: metrics.running))


class KvCacheUtilizationScorer(Scorer):
    """`kv-cache-utilization-scorer`"""

    def __init__(self, reports: Reports) -> None:
        self._reports = reports

    def score(self, request: InferenceRequest, candidates: Sequence[Endpoint]) -> Sequence[float]:
        return [1.0 - used for used in self._reports.numbers(candidates, lambda metrics: min(metrics.kv_usage, 1.0))]


class LoadAwareParameters(Parameters, frozen=True):
    threshold: int = 128


class LoadAwareScorer(Scorer):
    """`load-aware-scorer`: half the score for an empty queue, falling to nothing at `threshold` waiting requests."""

    def __init__(self, threshold: int, reports: Reports) -> None:
        self._threshold = threshold if threshold > 0 else LoadAwareParameters().threshold
        self._reports = reports

    def score(self, request: InferenceRequest, candidates: Sequence[Endpoint]) -> Sequence[float]:
        waiting = self._reports.numbers(candidates, lambda metrics: metrics.waiting)
        return [0.5 * (1.0 - min(number, self._threshold) / self._threshold) for number in waiting]


class ActiveRequestParameters(Parameters, frozen=True):
    WITHOUT_EFFECT: ClassVar[Mapping[str, str]] = {"requestTimeout": "open requests are counted until they are over"}
    idle_threshold: int = 0
    max_busy_score: float = 1.0
    in_flight_load_producer_name: str = ""


class ActiveRequestScorer(Scorer):
    """`active-request-scorer`: by the requests that this gateway has open there. At most `idle_threshold` of them is
    idle, 1; the others share [0, `max_busy_score`] by the most there are."""

    def __init__(self, idle_threshold: int, max_busy_score: float) -> None:
        self._idle = idle_threshold
        self._most_busy = min(max(max_busy_score, 0.0), 1.0)

    def score(self, request: InferenceRequest, candidates: Sequence[Endpoint]) -> Sequence[float]:
        counts = [one.load.requests for one in candidates]
        most = max(counts)
        return [1.0 if n <= self._idle else self._most_busy * (most - n) / most for n in counts]


class TokenLoadParameters(Parameters, frozen=True):
    queue_threshold_tokens: int = 4_194_304
    in_flight_load_producer_name: str = ""


class TokenLoadScorer(Scorer):
    """`token-load-scorer`: by the tokens that this gateway has open there."""

    def __init__(self, threshold: int) -> None:
        self._threshold = threshold if threshold > 0 else TokenLoadParameters().queue_threshold_tokens

    def score(self, request: InferenceRequest, candidates: Sequence[Endpoint]) -> Sequence[float]:
        return [1.0 - min(one.load.tokens, self._threshold) / self._threshold for one in candidates]


class LoraAffinityScorer(Scorer):
    """`lora-affinity-scorer`: the adapter runs there 1, there is room for it 0.8, it waits there 0.6, else 0."""

    def __init__(self, reports: Reports) -> None:
        self._reports = reports

    def score(self, request: InferenceRequest, candidates: Sequence[Endpoint]) -> Sequence[float]:
        adapter = request.target_model
        known = self._reports.fresh(candidates)
        return fill([None if metrics is None else self._one(adapter, metrics) for metrics in known])

    @staticmethod
    def _one(adapter: str, metrics: EndpointMetrics) -> float:
        if adapter in metrics.active_adapters:
            return 1.0
        if len(metrics.active_adapters) + len(metrics.waiting_adapters) < metrics.max_lora:
            return 0.8
        return 0.6 if adapter in metrics.waiting_adapters else 0.0
