"""`predicted-latency-producer`: what TTFT and TPOT to expect at each endpoint, learnt online.

The same lines as the default policy's (`cost.learner`), for configurations that score or filter by latency. There are
no sidecars, and each endpoint has its own line: hardware may differ.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from quire.gateway.cost.model import CostModel
from quire.gateway.endpoint import Endpoint
from quire.gateway.plugin import Conclusion, Observer, Parameters, Producer, Services
from quire.gateway.request import InferenceRequest, Outcome


class LatencyParameters(Parameters, frozen=True):
    """llm-d's predictor has settings of its sidecars."""

    WITHOUT_EFFECT: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys(("samplingMean", "maxSampledTokens"), "every answer is learnt from"),
        "sloBufferFactor": "objectives are compared with what is predicted as they are",
        "streamingMode": "the time to the first byte is what is learnt, of streams and others",
        "predictor": "there are no sidecars: what is expected is learnt here",
    }


class PredictedLatency(Producer, Observer):
    def __init__(self, services: Services) -> None:
        self.name = "predicted-latency-producer"
        self._model = CostModel(services)

    def produce(self, request: InferenceRequest, endpoints: Sequence[Endpoint]) -> None:
        for endpoint, estimate in zip(endpoints, self._model.estimate(request, endpoints), strict=True):
            request.predictions[endpoint.key] = estimate.prediction

    def sent(self, request: InferenceRequest, endpoint: Endpoint, choice: Conclusion) -> None:
        self._model.sent(self.name, request, endpoint)

    def first_byte(self, request: InferenceRequest, endpoint: Endpoint, ttft: float) -> None:
        self._model.first_byte(self.name, request, endpoint)

    def finished(self, request: InferenceRequest, endpoint: Endpoint, outcome: Outcome) -> None:
        self._model.finished(self.name, request, endpoint, outcome)
