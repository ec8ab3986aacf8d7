"""Admitters: who is turned away before anything is queued. Definitions: llm-d-router, …/requestcontrol/admitter."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

from quire.core.errors import ConfigError
from quire.gateway.endpoint import Endpoint, EndpointMetrics
from quire.gateway.errors import Saturated
from quire.gateway.plugin import Admitter, Parameters
from quire.gateway.plugins.reports import Reports
from quire.gateway.request import InferenceRequest

RETRY_AFTER = 2.0
COLD = 0.02


class ProbabilisticParameters(Parameters, frozen=True):
    queue_depth_threshold: float = 5.0
    kv_cache_util_threshold: float = 0.8
    power: float = 5.0
    k: float = 300.0


class Probabilistic(Admitter):
    """`probabilistic-admitter`: requests of negative priority are turned away with probability min(k·s^power, 1), s
    being the mean saturation of the endpoints whose metrics are fresh; where nobody's are, s is 1."""

    def __init__(self, parameters: ProbabilisticParameters, rng: random.Random, reports: Reports) -> None:
        self._reports = reports
        for name in ("queue_depth_threshold", "kv_cache_util_threshold", "power", "k"):
            if not 0 < getattr(parameters, name) < math.inf:
                raise ConfigError(
                    f"probabilistic-admitter: {name} is {getattr(parameters, name)}.",
                    param="plugins",
                    remedy="It is above 0, and finite.",
                )
        self._parameters = parameters
        self._rng = rng

    def admit(self, request: InferenceRequest, endpoints: Sequence[Endpoint]) -> None:
        if request.priority >= 0 or not endpoints:
            return
        known = [self._saturation(metrics) for metrics in self._reports.fresh(endpoints) if metrics is not None]
        if self._rng.random() < self._share(sum(known) / len(known) if known else 1.0):
            raise Saturated(
                f"Requests of priority {request.priority} are turned away while the endpoints are busy.",
                remedy="Try again later.",
                retry_after=RETRY_AFTER,
            )

    def _share(self, saturation: float) -> float:
        """By logarithms: the power of a large number may be none."""
        if saturation <= 0:
            return 0.0
        exponent = math.log(self._parameters.k) + self._parameters.power * math.log(saturation)
        return math.exp(min(exponent, 0.0))

    def _saturation(self, metrics: EndpointMetrics) -> float:
        queue = metrics.waiting / self._parameters.queue_depth_threshold
        return max(queue, metrics.kv_usage / self._parameters.kv_cache_util_threshold)


class LatencySloParameters(Parameters, frozen=True):
    latency_prediction_info_producer_name: str = ""


class LatencySlo(Admitter):
    """`latency-slo-admitter`: requests of negative priority with objectives are turned away if nobody is predicted to
    meet them, nobody is idle, and nobody so cold (below 2% of its KV cache) that predictions mean little. Of whom
    nothing fresh is known tells neither; where that is everybody, nobody is turned away."""

    after_producers = True

    def __init__(self, reports: Reports) -> None:
        self._reports = reports

    def admit(self, request: InferenceRequest, endpoints: Sequence[Endpoint]) -> None:
        ttft, tpot = request.slo_ttft, request.slo_tpot
        if request.priority >= 0 or not request.predictions or (ttft is None and tpot is None):
            return
        for predicted in request.predictions.values():
            if (ttft is None or predicted.ttft <= ttft) and (tpot is None or predicted.tpot <= tpot):
                return
        known = [metrics for metrics in self._reports.fresh(endpoints) if metrics is not None]
        if not known or any(metrics.running == 0 or metrics.kv_usage < COLD for metrics in known):
            return
        raise Saturated(
            "No endpoint is expected to answer within the objectives of this request.",
            remedy="Try again later, or ask for less.",
            retry_after=RETRY_AFTER,
        )
