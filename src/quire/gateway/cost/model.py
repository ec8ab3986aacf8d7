"""What a request is expected to cost at an endpoint, from what was sent there and what came of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from quire.gateway.cost.learner import Costs, Learner
from quire.gateway.cost.queue import PrefillQueue
from quire.gateway.endpoint import Endpoint, EndpointMetrics
from quire.gateway.plugin import Services
from quire.gateway.plugins.reports import staleness_of
from quire.gateway.request import InferenceRequest, Outcome, Prediction, plausible_prompt_tokens

GIVEN_HALF_LIFE: Final = 600.0
FORGET: Final = 0.05
DEFAULT_OUTPUT: Final = 128.0
"""Tokens of an answer, until some were seen."""
OUTPUT_FACTOR: Final = 16.0
OUTPUT_SLACK: Final = 1024.0
"""An answer counts for at most so many times the mean's tokens, and so many more."""
LEAST_SECONDS: Final = 1e-6
DEFAULT_UNCACHED: Final = 256.0
"""Prompt tokens to be computed for a request of others, of whom only the number is known."""


@dataclass(slots=True)
class Open:
    """What this gateway has at one endpoint."""

    queue: PrefillQueue = field(default_factory=PrefillQueue)
    requests: int = 0
    page: EndpointMetrics | None = None
    at_page: int = 0
    """Open requests when the page was read: what it counts of them is ours."""
    given: float = 0.0
    """Prompt tokens that it had to compute, of late."""
    time: float = 0.0
    """When those were counted."""

    def turn(self, page: EndpointMetrics | None) -> None:
        """Called before each change of what is open there, so that what was open when the page was read is known."""
        if self.page is not page:
            self.page, self.at_page = page, self.requests

    def given_at(self, now: float) -> float:
        kept: float = 0.5 ** (max(now - self.time, 0.0) / GIVEN_HALF_LIFE)
        return self.given * kept

    def give(self, tokens: float, now: float) -> None:
        self.given, self.time = self.given_at(now) + tokens, now


@dataclass(slots=True)
class Sent:
    """One request at one endpoint."""

    where: Open
    """As it was when the request was sent: an endpoint that comes back under its name is another one."""
    ticket: int
    before: float
    own: float
    beside: int
    time: float
    first: float | None = None


@dataclass(slots=True)
class Estimate:
    """Seconds, where nothing else is said. One for each candidate of each request."""

    cached_tokens: float
    queued: float
    prefill: float
    decode: float
    others: float
    """What all others who are there lose together."""
    given: float
    """Prompt tokens that it had to compute, of late."""
    prediction: Prediction

    @property
    def cost(self) -> float:
        return self.queued + self.prefill + self.decode + self.others


class CostModel:
    """`name` is the plugin's that feeds it: its notes about a request lie in the request, under this name."""

    def __init__(self, services: Services) -> None:
        self._clock = services.clock
        self._staleness = staleness_of(services)
        self._learner = Learner()
        self._output = DEFAULT_OUTPUT
        self._uncached = DEFAULT_UNCACHED
        self._pool = services.pool
        self._open: dict[str, Open] = {}
        """Of endpoints that the pool has."""
        services.pool.watch(lambda _: None, self._left)

    def _left(self, endpoint: Endpoint) -> None:
        self._learner.forget(endpoint.key)
        self._open.pop(endpoint.key, None)

    # --- estimating -------------------------------------------------------------------------------------------------

    def estimate(self, request: InferenceRequest, endpoints: Sequence[Endpoint]) -> list[Estimate]:
        now, prompt = self._clock(), request.prompt_tokens
        output = self._output if request.max_tokens is None else min(self._output, float(request.max_tokens))
        found = []
        for endpoint in endpoints:
            mine, costs = self._at(endpoint), self._costs(endpoint, now)
            cached = cached_tokens(request, endpoint.key)
            before, beside = self._before(mine, endpoint.metrics, costs, now)
            queued, prefill = before * costs.prefill, (prompt - cached) * costs.prefill
            step = costs.step + costs.sequence * beside
            decode, others = output * step, beside * (prefill + output * costs.sequence)
            prediction = Prediction(costs.base + queued + prefill, step)
            found.append(Estimate(cached, queued, prefill, decode, others, mine.given_at(now), prediction))
        return found

    def _costs(self, endpoint: Endpoint, now: float) -> Costs:
        metrics = endpoint.metrics
        if metrics is not None and (metrics.prefill_seconds_per_token or metrics.decode_seconds_per_step):
            self._learner.hint(metrics.prefill_seconds_per_token, metrics.decode_seconds_per_step)
        return self._learner.costs(endpoint.key, now)

    def _before(self, mine: Open, metrics: EndpointMetrics | None, costs: Costs, now: float) -> tuple[float, int]:
        """Prompt tokens to be computed before a request that comes now, and requests beside it: ours, and of what the
        endpoint reports those that are not."""
        tokens, beside = mine.queue.left(now, costs.prefill), mine.requests
        if metrics is None or now - metrics.time > self._staleness:
            return tokens, beside
        others = max(metrics.waiting + metrics.running - mine.at_page, 0)
        return tokens + min(others, metrics.waiting) * self._uncached, beside + others

    def _at(self, endpoint: Endpoint) -> Open:
        found = self._open.get(endpoint.key)
        if found is None:
            found = Open()
            if self._pool.get(endpoint.key) is endpoint:  # else it has left, and nobody would forget it again
                self._open[endpoint.key] = found
        found.turn(endpoint.metrics)
        return found

    # --- learning ---------------------------------------------------------------------------------------------------

    def sent(self, name: str, request: InferenceRequest, endpoint: Endpoint) -> None:
        now = self._clock()
        mine = self._at(endpoint)
        own = request.prompt_tokens - cached_tokens(request, endpoint.key)
        before, beside = self._before(mine, endpoint.metrics, self._costs(endpoint, now), now)
        ticket = mine.queue.send(own, awaited=request.stream)
        mine.requests += 1
        mine.give(own, now)
        self._uncached += FORGET * (own - self._uncached)
        _notes(name, request)[endpoint.key] = Sent(mine, ticket, before, own, beside, now)

    def first_byte(self, name: str, request: InferenceRequest, endpoint: Endpoint) -> None:
        sent = _notes(name, request).get(endpoint.key)
        if sent is not None:
            sent.first = self._clock()
            sent.where.queue.first(sent.ticket)

    def finished(self, name: str, request: InferenceRequest, endpoint: Endpoint, outcome: Outcome) -> None:
        sent = _notes(name, request).pop(endpoint.key, None)
        if sent is None:
            return
        mine = sent.where
        mine.turn(endpoint.metrics)
        mine.requests = max(mine.requests - 1, 0)
        mine.queue.gone(sent.ticket, sent.own)
        if self._open.get(endpoint.key) is not mine:
            return  # it has left, and what is known of it with it
        if outcome.status == 200 and not outcome.error and outcome.output_tokens and sent.first is not None:
            self._learn(request, endpoint, sent, outcome)

    def _learn(self, request: InferenceRequest, endpoint: Endpoint, sent: Sent, outcome: Outcome) -> None:
        assert sent.first is not None
        now = self._clock()
        output = min(max(float(outcome.output_tokens or 1), 1.0), OUTPUT_FACTOR * self._output + OUTPUT_SLACK)
        self._output += FORGET * (output - self._output)
        own = sent.own
        if outcome.cached_tokens is not None and outcome.prompt_tokens:
            own = max(plausible_prompt_tokens(request, outcome.prompt_tokens) - outcome.cached_tokens, 0.0)
        tokens = sent.before + own
        if not request.stream:
            costs = self._learner.costs(endpoint.key, now)
            expected = costs.base + costs.prefill * tokens + (output - 1) * (costs.step + costs.sequence * sent.beside)
            self._learner.saw_whole(endpoint.key, (now - sent.time) / max(expected, LEAST_SECONDS), now)
            return
        self._learner.saw_first(endpoint.key, tokens, sent.first - sent.time, now)
        if output > 1:
            self._learner.saw_tokens(endpoint.key, sent.beside, (now - sent.first) / (output - 1), now)


def _notes(name: str, request: InferenceRequest) -> dict[str, Sent]:
    notes = request.attributes.get(name)
    if not isinstance(notes, dict):
        notes = request.attributes[name] = {}
    return notes


def cached_tokens(request: InferenceRequest, key: str) -> float:
    """The most that any producer thinks is at the endpoint, by its tier's credit."""
    most = 0.0
    for found in request.prefix.values():
        match = found.get(key)
        if match is not None and match.weighted_tokens > most:
            most = match.weighted_tokens
    return min(most, float(request.prompt_tokens))


def expected_cached(request: InferenceRequest, endpoint: Endpoint) -> int:
    """Prompt tokens thought to be cached at an endpoint, on any tier; for the director's counting."""
    key = endpoint.key
    return max((found[key].tokens for found in request.prefix.values() if key in found), default=0)
