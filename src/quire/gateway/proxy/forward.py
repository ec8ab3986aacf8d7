"""A request's way: choose → sent → first byte → passed on → finished; elsewhere while the client has nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from quire.gateway.director import Attempt, Director
from quire.gateway.endpoint import Endpoint
from quire.gateway.errors import Dropped, UpstreamError
from quire.gateway.proxy.call import Call
from quire.gateway.proxy.connections import Connections
from quire.gateway.proxy.settings import ProxySettings
from quire.gateway.proxy.upstream import Connection, Waits
from quire.gateway.proxy.usage import Usage
from quire.gateway.request import InferenceRequest, Outcome
from quire.gateway.resilience.budget import Budget
from quire.gateway.schedule import Choice
from quire.gateway.traffic.shadow import Mirror

BUSY_OR_BROKEN: Final = frozenset({429, 502, 503, 504})
"""Answers of one endpoint that another may not give."""


@dataclass(slots=True)
class Try:
    """One attempt at one endpoint. Counted from its making; `close` counts it off, once."""

    director: Director
    request: InferenceRequest
    attempt: Attempt
    answer: Connection | None = None
    usage: Usage = field(default_factory=Usage)
    error: str = "cancelled"
    """Until it is known better: whoever is interrupted on the way was cancelled."""
    closed: bool = False

    @property
    def endpoint(self) -> Endpoint:
        return self.attempt.endpoint

    def close(self, connections: Connections) -> None:
        if self.closed:
            return
        self.closed = True
        answer, status = self.answer, None
        if answer is not None:
            status = answer.status or None
            if answer.complete:
                connections.release(self.endpoint, answer)
            else:
                answer.abort()
        outcome = Outcome(
            status=status,
            error=self.error,
            first_byte=self.attempt.first_byte,
            finished=self.director.clock(),
            output_tokens=self.usage.output_tokens,
            cached_tokens=self.usage.cached_tokens,
        )
        self.director.finished(self.request, self.attempt, outcome)


@dataclass(slots=True, kw_only=True)
class Forwarder:
    director: Director
    connections: Connections
    settings: ProxySettings
    retries: Budget
    mirror: Callable[[Call], Mirror | None] = lambda _call: None
    """Starts a copy of the call elsewhere, where the traffic policy wants one."""

    async def forward(self, call: Call) -> None:
        """Answer the call from an endpoint. Raises `Dropped`, and `UpstreamError` when no endpoint answered."""
        choice: Choice | None = await self.director.choose(call.request)
        self.retries.earn()
        tried: frozenset[str] = frozenset()
        mirror = self.mirror(call)
        served = False
        try:
            while choice is not None:
                current = self._start(call, choice, mirror)
                tried |= {current.endpoint.key}
                try:
                    answer = await self._begin(call, current, choice)
                    choice = self._elsewhere(call, tried) if answer.status in BUSY_OR_BROKEN else None
                    if choice is None:
                        await call.deliver(answer, current.endpoint, current.usage, self.settings.max_buffered_answer)
                    current.error = ""
                    served = choice is None and answer.status < 400
                except UpstreamError as error:
                    current.error = error.kind
                    choice = self._elsewhere(call, tried) if _may_repeat(call, current, error) else None
                    if choice is None:
                        raise
                finally:
                    current.close(self.connections)
        finally:
            self.director.abandon(call.request)
            if mirror is not None:
                mirror.end(served)

    def _start(self, call: Call, choice: Choice, mirror: Mirror | None) -> Try:
        attempt = self.director.sent(call.request, choice.endpoint, choice)
        return Try(self.director, call.request, attempt, usage=Usage(None if mirror is None else mirror.feed))

    async def _begin(self, call: Call, current: Try, choice: Choice) -> Connection:
        """Send the request, and wait for the first byte of an answer."""
        fresh = not call.repeatable
        while True:
            answer = current.answer = await self.connections.acquire(current.endpoint, fresh=fresh)
            message = call.message(current.endpoint, choice.conclusion)
            answer.send(message, self._waits(call), head_only=call.scope["method"] == "HEAD")
            try:
                await answer.begin()
            except UpstreamError:
                if answer.reused and answer.untouched and not fresh:
                    fresh = True  # it was closed while it lay idle, which says nothing of the endpoint
                    continue
                raise
            if answer.status < 400:
                self.director.first_byte(call.request, current.attempt)
            return answer

    def _elsewhere(self, call: Call, tried: frozenset[str]) -> Choice | None:
        """Another endpoint for a call whose attempt failed; None when there is none, or it has been enough."""
        if not call.repeatable or len(tried) > self.settings.max_retries or not self.retries.spend():
            return None
        try:
            return self.director.choose_again(call.request, tried)
        except Dropped:
            return None

    def _waits(self, call: Call) -> Waits:
        left = max(call.deadline - self.director.clock(), 0.0)
        return Waits(first_byte=self.settings.first_byte_timeout, idle=self.settings.idle_timeout, total=left)


def _may_repeat(call: Call, current: Try, error: UpstreamError) -> bool:
    """Before the first byte of its answer, an endpoint that broke or could not be reached is no reason to fail the
    request; one that let its time pass is, for the time is gone."""
    if call.started or current.attempt.first_byte is not None:
        return False
    return error.kind in ("connect", "connections", "reset", "garbage")
