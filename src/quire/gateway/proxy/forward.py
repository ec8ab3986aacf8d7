"""A request's way: choose → sent → first byte → passed on → finished; elsewhere while the client has nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from quire.core.errors import ModelNotFound
from quire.gateway.director import Director
from quire.gateway.errors import Dropped, UpstreamError
from quire.gateway.proxy.attempt import Try
from quire.gateway.proxy.call import Call
from quire.gateway.proxy.connections import Connections
from quire.gateway.proxy.settings import ProxySettings
from quire.gateway.proxy.upstream import Connection, Waits
from quire.gateway.proxy.usage import Usage
from quire.gateway.resilience.budget import Budget
from quire.gateway.resilience.hedge import Hedging
from quire.gateway.schedule import Choice
from quire.gateway.traffic.shadow import Mirror

BUSY_OR_BROKEN: Final = frozenset({429, 502, 503, 504})
"""Answers of one endpoint that another may not give."""


@dataclass(slots=True, kw_only=True)
class Forwarder:
    director: Director
    connections: Connections
    settings: ProxySettings
    retries: Budget
    hedging: Hedging
    mirror: Callable[[Call], Mirror | None] = lambda _call: None
    """Starts a copy of the call elsewhere, where the traffic policy wants one."""

    async def forward(self, call: Call) -> None:
        """Answer the call from an endpoint. Raises `Dropped`, and `UpstreamError` when no endpoint answered."""
        choice: Choice | None = await self.director.choose(call.request)
        self.retries.earn()
        mirror: Mirror | None = None
        served = False
        try:
            mirror = self.mirror(call)
            call.tap = None if mirror is None else mirror.feed
            while choice is not None:
                current = self._start(call, choice)
                try:
                    current, answer = await self._first_to_begin(call, current)
                    choice = self._elsewhere(call) if answer.status in BUSY_OR_BROKEN else None
                    if choice is None:
                        call.own_headers = current.choice.conclusion.response_headers
                        await call.deliver(answer, current.endpoint, current.usage, self.settings.max_buffered_answer)
                    current.error = ""
                    served = choice is None and answer.status < 400
                except UpstreamError as error:
                    current.error = error.kind
                    choice = self._elsewhere(call) if may_repeat(call, current, error) else None
                    if choice is None:
                        raise
                finally:
                    current.close(self.connections)
        finally:
            self.director.abandon(call.request)
            if mirror is not None:
                mirror.end(served)

    def _start(self, call: Call, choice: Choice) -> Try:
        call.tried |= {choice.endpoint.key}
        return Try(self.director, call.request, choice, usage=Usage(call.tap))

    async def _begin(self, call: Call, current: Try) -> Connection:
        """Send the request, and wait for the first byte of an answer."""
        fresh = not call.repeatable
        while True:
            answer = current.answer = await self.connections.acquire(current.endpoint, fresh=fresh)
            message = call.message(current.endpoint, current.choice.conclusion)
            answer.send(message, self._waits(call), head_only=call.scope["method"] == "HEAD")
            try:
                await answer.begin()
            except UpstreamError:
                if answer.reused and answer.untouched and not fresh:
                    fresh = True  # it was closed while it lay idle, which says nothing of the endpoint
                    continue
                raise
            return answer

    def _elsewhere(self, call: Call) -> Choice | None:
        """Another endpoint for a call whose attempt failed; None when there is none, or it has been enough."""
        if not call.repeatable or len(call.tried) > self.settings.max_retries:
            return None
        return self._choose_again(call, self.retries)

    def _choose_again(self, call: Call, budget: Budget) -> Choice | None:
        if not budget.allows:
            return None
        try:
            choice = self.director.choose_again(call.request, call.tried)
        except (Dropped, ModelNotFound):
            return None
        budget.spend()
        return choice

    def _waits(self, call: Call) -> Waits:
        left = max(call.deadline - self.director.clock(), 0.0)
        return Waits(first_byte=self.settings.first_byte_timeout, idle=self.settings.idle_timeout, total=left)

    # --- hedging ------------------------------------------------------------------------------------------------

    async def _first_to_begin(self, call: Call, first: Try) -> tuple[Try, Connection]:
        """The attempt whose answer begins first: `first`, or where hedging is on another one that was sent after a
        while. The other one is closed."""
        delay = self.hedging.delay() if call.repeatable else None
        if delay is None:
            winner, answer = first, await self._begin(call, first)
        else:
            winner, answer = await self._race(call, first, delay)
        if answer.status < 400:
            self.director.first_byte(call.request, winner.attempt)
            assert winner.attempt.first_byte is not None
            self.hedging.saw(winner.attempt.first_byte - winner.attempt.sent)
        return winner, answer

    async def _race(self, call: Call, first: Try, delay: float) -> tuple[Try, Connection]:
        tasks = {asyncio.ensure_future(self._begin(call, first)): first}
        winner: Try | None = None
        try:
            self.hedging.budget.earn()
            done, _ = await asyncio.wait(tasks, timeout=delay)
            if not done and (choice := self._choose_again(call, self.hedging.budget)) is not None:
                second = self._start(call, choice)
                tasks[asyncio.ensure_future(self._begin(call, second))] = second
            task = await _first_good(tuple(tasks))
            answer = task.result()
            winner = tasks[task]
            return winner, answer
        finally:
            losers = {task: attempt for task, attempt in tasks.items() if attempt is not winner}
            for task in losers:
                task.cancel()
            ends = await asyncio.gather(*losers, return_exceptions=True)
            for attempt, end in zip(losers.values(), ends, strict=True):
                if isinstance(end, UpstreamError):
                    attempt.error = end.kind
                attempt.close(self.connections)


async def _first_good(tasks: Sequence[asyncio.Task[Connection]]) -> asyncio.Task[Connection]:
    """The first that got an answer worth passing on; when none did one that got any; else the first."""
    pending: set[asyncio.Task[Connection]] = set(tasks)
    answered: list[asyncio.Task[Connection]] = []
    while pending:
        done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
        answered += [task for task in done if task.exception() is None]
        good = [task for task in answered if task.result().status not in BUSY_OR_BROKEN]
        if good:
            return good[0]
    return answered[0] if answered else tasks[0]


def may_repeat(call: Call, current: Try, error: UpstreamError) -> bool:
    """Before the first byte of its answer, an endpoint that broke or could not be reached is no reason to fail the
    request. One that let its time pass is: the time is gone."""
    if call.started or current.attempt.first_byte is not None:
        return False
    return error.kind in ("connect", "connections", "reset", "garbage")
