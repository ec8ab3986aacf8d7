"""`expected-cost-scorer`: an endpoint's cost is the seconds that a request is expected to take there, and to take from
others there.

    queued     prompt tokens not cached that are to be computed before it, and what waits besides
    prefill    its own prompt tokens that are not cached there, by the credit of the tier that holds them; half as much
               again, since what is computed twice keeps others waiting; and once or twice again where prompts are found
               in caches as a rule, since what is put into a full one drives out what others would have found
    decode     its output tokens, each a step of the batch that it joins, and what it adds to the others' steps; only
               what is more than at the best endpoint, since some decoding there is everywhere

The prices come from `learner`, or from the endpoint where it reports them (quire does). What this gateway has sent
counts at once, so that a burst does not pile up on who looked idle a moment ago; of what the endpoint reports only the
part that is not ours is added. A prefix sent somewhere counts as there at once too: those that follow wait for it
where that is cheaper than computing it again, and go elsewhere when the queue has grown. Costs that differ by less
than a tenth (of the least, or of what the whole prompt would cost) count as equal: estimates are no better than that.
Between equals it goes to who has been given the fewest tokens to compute of late, so that all caches fill alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from quire.gateway.cost.learner import Costs, Learner
from quire.gateway.endpoint import Endpoint
from quire.gateway.plugin import Conclusion, Observer, Scorer, Services
from quire.gateway.request import InferenceRequest, Outcome, Prediction

OTHERS_WAIT: Final = 0.5
"""Of the time for own prompt tokens, what counts for others' waiting."""
DRIVEN_OUT: Final = 1.5
"""Of the same, what counts for what it drives out of the cache, if prompts were always found there."""
ALIKE: Final = 0.1
LEAST_GAP: Final = 0.002
"""Seconds that nobody notices."""
BETWEEN_EQUALS: Final = 1e-3
"""The most that the score of one differs from an equal's."""
GIVEN_HALF_LIFE: Final = 600.0
STALE: Final = 5.0
"""Seconds after which what an endpoint reported counts no more."""
OUTPUT_FORGET: Final = 0.05
DEFAULT_OUTPUT: Final = 128.0
MAX_OPEN: Final = 100_000


class ExpectedCost(Scorer, Observer):
    def __init__(self, services: Services) -> None:
        self._clock = services.clock
        self._learner = Learner()
        self._output = DEFAULT_OUTPUT
        self._uncached = 256.0
        """Mean prompt tokens to be computed per request: what a request of others in a queue is taken to cost."""
        self._details: Sequence[object] | None = None
        self._open: dict[str, tuple[str, int, int, float]] = {}
        """By request id: endpoint, tokens queued before it and its own, others beside it, when it was sent."""
        self._found = 0.0
        """Share of prompts that is found in caches, of late."""
        self._given: dict[str, float] = {}
        """By endpoint: prompt tokens that it was given to compute, of late."""
        self._faded = services.clock()
        services.pool.watch(lambda _: None, self._left)

    # --- scoring ----------------------------------------------------------------------------------------------------

    def score(self, request: InferenceRequest, candidates: Sequence[Endpoint]) -> Sequence[float]:
        now = self._clock()
        output = self._expected_output(request)
        parts = [self._parts(request, endpoint, output, now) for endpoint in candidates]
        least_decode = min(part["decode_seconds"] for part in parts)
        whole = min(part.pop("whole_prompt") for part in parts)
        for endpoint, part in zip(candidates, parts, strict=True):
            part["cost"] = round(part["cost"] + part["decode_seconds"] - least_decode, 6)
            request.predictions[endpoint.key] = Prediction(part["predicted_ttft"], part["predicted_tpot"])
        self._details = parts
        least = min(part["cost"] for part in parts)
        enough = least + max(ALIKE * least, ALIKE * whole, LEAST_GAP)
        given = [self._given.get(endpoint.key, 0.0) for endpoint in candidates]
        most = max(*given, 1.0) if len(given) > 1 else 1.0
        return [
            1.0 - BETWEEN_EQUALS * tokens / most if part["cost"] <= enough else enough / part["cost"] - BETWEEN_EQUALS
            for part, tokens in zip(parts, given, strict=True)
        ]

    def details(self) -> Sequence[object] | None:
        return self._details

    def _parts(self, request: InferenceRequest, endpoint: Endpoint, output: float, now: float) -> dict[str, Any]:
        costs = self._costs(endpoint, now)
        cached = min(_cached(request, endpoint.key), float(request.prompt_tokens))
        own = (request.prompt_tokens - cached) * costs.prefill
        tokens, beside = self._before(endpoint, now)
        queued = tokens * costs.prefill
        step = costs.step + costs.sequence * beside
        decode = output * (step + costs.sequence * beside)
        return {
            "cost": queued + own * (1.0 + OTHERS_WAIT + DRIVEN_OUT * self._found),
            "whole_prompt": request.prompt_tokens * costs.prefill,
            "cached_tokens": round(cached),
            "queued_seconds": round(queued, 6),
            "prefill_seconds": round(own, 6),
            "decode_seconds": round(decode, 6),
            "predicted_ttft": costs.base + queued + own,
            "predicted_tpot": step,
        }

    def _costs(self, endpoint: Endpoint, now: float) -> Costs:
        learnt = self._learner.costs(endpoint.key, now)
        metrics = endpoint.metrics
        if metrics is None or not metrics.prefill_seconds_per_token:
            return learnt
        step = metrics.decode_seconds_per_step or learnt.step
        return Costs(learnt.base, metrics.prefill_seconds_per_token, step, learnt.sequence)

    def _before(self, endpoint: Endpoint, now: float) -> tuple[float, int]:
        """Prompt tokens to be computed before a request that comes now, and requests beside it."""
        load, metrics = endpoint.load, endpoint.metrics
        tokens, beside = float(load.prefill_tokens), load.requests
        if metrics is None or now - metrics.time > STALE:
            return tokens, beside
        others = max(metrics.waiting + metrics.running - load.requests, 0)
        if metrics.waiting_tokens is not None:
            tokens = max(tokens, float(metrics.waiting_tokens))
        else:
            tokens += min(others, metrics.waiting) * self._uncached
        return tokens, beside + others

    def _expected_output(self, request: InferenceRequest) -> float:
        return self._output if request.max_tokens is None else min(self._output, float(request.max_tokens))

    # --- learning ---------------------------------------------------------------------------------------------------

    def sent(self, request: InferenceRequest, endpoint: Endpoint, choice: Conclusion) -> None:
        now = self._clock()
        tokens, beside = self._before(endpoint, now)
        own = max(request.prompt_tokens - round(_cached(request, endpoint.key)), 0)
        self._uncached += OUTPUT_FORGET * (own - self._uncached)
        if request.prompt_tokens:
            self._found += OUTPUT_FORGET * (1.0 - own / request.prompt_tokens - self._found)
        self._give(endpoint.key, own, now)
        if len(self._open) < MAX_OPEN:
            self._open[request.id] = (endpoint.key, round(tokens) + own, beside, now)

    def _give(self, key: str, tokens: int, now: float) -> None:
        if now - self._faded > GIVEN_HALF_LIFE / 16:
            kept = 0.5 ** ((now - self._faded) / GIVEN_HALF_LIFE)
            self._given = {name: given * kept for name, given in self._given.items()}
            self._faded = now
        if key not in self._given:  # who has just come is not to be given everything
            self._given[key] = min(self._given.values(), default=0.0)
        self._given[key] += tokens

    def _left(self, endpoint: Endpoint) -> None:
        self._learner.forget(endpoint.key)
        self._given.pop(endpoint.key, None)

    def first_byte(self, request: InferenceRequest, endpoint: Endpoint, ttft: float) -> None:
        found = self._open.get(request.id)
        if found is not None and request.stream:  # the first byte of any other answer is its last, too
            self._learner.saw_first(endpoint.key, found[1], ttft, self._clock())

    def finished(self, request: InferenceRequest, endpoint: Endpoint, outcome: Outcome) -> None:
        found = self._open.pop(request.id, None)
        output = outcome.output_tokens
        if found is None or not outcome.ok or not output:
            return
        self._output += OUTPUT_FORGET * (output - self._output)
        if request.stream and outcome.first_byte is not None and output > 1:
            tpot = (outcome.finished - outcome.first_byte) / (output - 1)
            self._learner.saw_tokens(endpoint.key, found[2], tpot, self._clock())


def _cached(request: InferenceRequest, key: str) -> float:
    """The most that any producer thinks is there, by credit."""
    return max((found[key].weighted_tokens for found in request.prefix.values() if key in found), default=0.0)


def expected_cached(request: InferenceRequest, endpoint: Endpoint) -> int:
    """Prompt tokens thought to be cached at an endpoint, on any tier; for the director's counting."""
    return max((found[endpoint.key].tokens for found in request.prefix.values() if endpoint.key in found), default=0)
