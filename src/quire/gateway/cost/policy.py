"""`expected-cost-scorer`: an endpoint's cost is the seconds that a request is expected to take there, and those that
the requests which are there already lose by it.

    queued     prompt tokens to be computed before it
    prefill    its own prompt tokens that are not cached there, by the credit of the tier that holds them
    decode     its output tokens, each a step of the batch that it joins
    others     its prefill, and what it adds to each step, for everyone who is there

The last is what keeps a loaded pool from falling over: looking at its own wait alone a request flees from the queue
before its cached prefix to compute the prefix elsewhere, where it pushes out another one, whose next request flees too.
On an idle pool nobody loses by it, and the wait alone counts. The prices are learnt (`learner`); there are no weights.

What this gateway has sent counts at once, so that a burst does not pile up on who looked idle a moment ago; of what an
endpoint reports only the part that is not ours is added. A prefix sent somewhere counts as there at once too: those
that follow wait for it where that is cheaper than computing it again. Costs that are the same within a tenth, not
counting what all of them have in common, are equal: estimates are no better. Between equals it goes to who had the
fewest tokens to compute of late, so that all caches fill alike.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final, overload

from quire.gateway.cost.model import CostModel, Estimate, expected_cached
from quire.gateway.endpoint import Endpoint
from quire.gateway.plugin import Conclusion, Observer, Scorer, Services
from quire.gateway.request import InferenceRequest, Outcome

__all__ = ["ExpectedCost", "expected_cached"]

ALIKE: Final = 0.1
LEAST_GAP: Final = 0.001
"""Seconds that nobody notices."""
BETWEEN_EQUALS: Final = 1e-3
"""The most that the scores of equals differ by."""


class ExpectedCost(Scorer, Observer):
    def __init__(self, services: Services) -> None:
        self.name = "expected-cost-scorer"
        self._model = CostModel(services)
        self._estimates: Sequence[Estimate] | None = None

    def score(self, request: InferenceRequest, candidates: Sequence[Endpoint]) -> Sequence[float]:
        estimates = self._model.estimate(request, candidates)
        for endpoint, estimate in zip(candidates, estimates, strict=True):
            request.predictions[endpoint.key] = estimate.prediction
        self._estimates = estimates
        return scores(estimates)

    def details(self) -> Sequence[object] | None:
        return None if self._estimates is None else Details(self._estimates)

    def sent(self, request: InferenceRequest, endpoint: Endpoint, choice: Conclusion) -> None:
        self._model.sent(self.name, request, endpoint)

    def first_byte(self, request: InferenceRequest, endpoint: Endpoint, ttft: float) -> None:
        self._model.first_byte(self.name, request, endpoint)

    def finished(self, request: InferenceRequest, endpoint: Endpoint, outcome: Outcome) -> None:
        self._model.finished(self.name, request, endpoint, outcome)


def scores(estimates: Sequence[Estimate]) -> Sequence[float]:
    """Nearly 1 for the least cost and those alike, else the least's share of the cost."""
    least = min(estimate.cost for estimate in estimates)
    common = min(estimate.decode for estimate in estimates)
    alike = least + max(ALIKE * (least - common), LEAST_GAP)
    most = max(1.0, *(estimate.given for estimate in estimates))
    return [
        1.0 - BETWEEN_EQUALS * estimate.given / most
        if estimate.cost <= alike
        else (1.0 - 2 * BETWEEN_EQUALS) * least / estimate.cost
        for estimate in estimates
    ]


class Details(Sequence[Mapping[str, float]]):
    """What each cost is made of. Made when somebody looks: every request has some, and few are asked about."""

    def __init__(self, estimates: Sequence[Estimate]) -> None:
        self._estimates = estimates

    def __len__(self) -> int:
        return len(self._estimates)

    @overload
    def __getitem__(self, index: int) -> Mapping[str, float]: ...

    @overload
    def __getitem__(self, index: slice) -> Details: ...

    def __getitem__(self, index: int | slice) -> Mapping[str, float] | Details:
        if isinstance(index, slice):
            return Details(self._estimates[index])
        return _detail(self._estimates[index])


def _detail(estimate: Estimate) -> dict[str, float]:
    return {
        "cost": estimate.cost,
        "cached_tokens": round(estimate.cached_tokens),
        "queued_seconds": estimate.queued,
        "prefill_seconds": estimate.prefill,
        "decode_seconds": estimate.decode,
        "others_seconds": estimate.others,
        "predicted_ttft": estimate.prediction.ttft,
        "predicted_tpot": estimate.prediction.tpot,
    }
