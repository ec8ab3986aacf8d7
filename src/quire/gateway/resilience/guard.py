"""Decides which endpoints can be chosen, by what requests met there and by looking at their health.

The only writer of `Endpoint.available`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import structlog

from quire.gateway.endpoint import Clock, Endpoint, Pool
from quire.gateway.plugin import Conclusion, Observer
from quire.gateway.request import InferenceRequest, Outcome
from quire.gateway.resilience.breaker import Breaker, State
from quire.gateway.resilience.settings import ResilienceSettings

BROKEN_STATUSES = frozenset({502, 503, 504})
"""500 is not among them: one request may be what the engine fails at, and must not eject it."""
BROKEN_ERRORS = frozenset({"connect", "reset", "timeout", "garbage"})


@dataclass(slots=True)
class Condition:
    breaker: Breaker
    failed_looks: int = 0
    healthy: bool = True

    def answers(self) -> None:
        """Whoever answers requests is alive, however slow its /health may be beside them."""
        self.failed_looks, self.healthy = 0, True


@dataclass(slots=True, kw_only=True)
class Guard(Observer):
    pool: Pool
    clock: Clock
    settings: ResilienceSettings = field(default_factory=ResilienceSettings)
    name: str = "resilience"
    _conditions: dict[str, Condition] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.pool.watch(self._arrived, self._left)

    def breaker(self, endpoint: Endpoint) -> Breaker | None:
        condition = self._conditions.get(endpoint.key)
        return None if condition is None else condition.breaker

    # --- what requests meet -------------------------------------------------------------------------------------

    def sent(self, request: InferenceRequest, endpoint: Endpoint, choice: Conclusion) -> None:
        if (breaker := self.breaker(endpoint)) is not None:
            breaker.probe()
            self._decide(endpoint)

    def first_byte(self, request: InferenceRequest, endpoint: Endpoint, ttft: float) -> None:
        condition = self._conditions.get(endpoint.key)
        if condition is None:
            return
        condition.answers()
        if condition.breaker.state is State.HALF_OPEN:  # an answer may be long: this is enough to know
            condition.breaker.succeeded(self.clock())
        self._decide(endpoint)

    def finished(self, request: InferenceRequest, endpoint: Endpoint, outcome: Outcome) -> None:
        breaker = self.breaker(endpoint)
        if breaker is None:
            return
        now = self.clock()
        if outcome.error in BROKEN_ERRORS or (not outcome.error and outcome.status in BROKEN_STATUSES):
            if breaker.failed(now) and (breaker.state is State.HALF_OPEN or self._may_eject()):
                breaker.open(now)
                reason = outcome.error or f"status {outcome.status}"
                structlog.get_logger().warning(
                    "endpoint_ejected", endpoint=endpoint.key, reason=reason, seconds=breaker.reopens_at - now
                )
        elif outcome.ok:
            breaker.succeeded(now)
        else:
            breaker.undecided()
        self._decide(endpoint)

    def _may_eject(self) -> bool:
        """One more, without ejecting more than the share that may be."""
        ejected = sum(condition.breaker.state is not State.CLOSED for condition in self._conditions.values())
        return ejected + 1 <= self.settings.max_ejected_share * len(self._conditions)

    # --- what looks tell ----------------------------------------------------------------------------------------

    def looked(self, endpoint: Endpoint, *, healthy: bool) -> None:
        """The result of one look at the endpoint's health. A single bad one changes nothing."""
        condition = self._conditions.get(endpoint.key)
        if condition is None:
            return
        condition.failed_looks = 0 if healthy else condition.failed_looks + 1
        now_healthy = healthy or (condition.healthy and condition.failed_looks < self.settings.unhealthy_after)
        if now_healthy != condition.healthy:
            condition.healthy = now_healthy
            structlog.get_logger().warning("endpoint_health", endpoint=endpoint.key, healthy=now_healthy)
        self._decide(endpoint)

    def step(self) -> None:
        """Time has passed: ejected endpoints may be due for a probe. Called several times a second."""
        now = self.clock()
        for endpoint in self.pool.all:
            breaker = self.breaker(endpoint)
            if breaker is not None and breaker.state is State.OPEN:
                breaker.step(now)
                self._decide(endpoint)

    def _decide(self, endpoint: Endpoint) -> None:
        condition = self._conditions[endpoint.key]
        endpoint.available = condition.healthy and condition.breaker.lets_through

    def _arrived(self, endpoint: Endpoint) -> None:
        self._conditions[endpoint.key] = Condition(Breaker(self.settings))

    def _left(self, endpoint: Endpoint) -> None:
        self._conditions.pop(endpoint.key, None)
