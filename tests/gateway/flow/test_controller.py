"""Flow control on the event loop, with a clock that the test drives."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import pytest

from quire.gateway.endpoint import Endpoint
from quire.gateway.errors import Dropped
from quire.gateway.flow.controller import FlowController
from quire.gateway.flow.queue import QueueSettings
from quire.gateway.flow.saturation import Concurrency
from quire.gateway.request import Api, InferenceRequest


@dataclass
class Timer:
    at: float
    call: Callable[[], None]
    off: bool = False

    def cancel(self) -> None:
        self.off = True


@dataclass
class Time:
    now: float = 100.0
    timers: list[Timer] = field(default_factory=list)

    def __call__(self) -> float:
        return self.now

    def call_later(self, delay: float, call: Callable[[], None]) -> Timer:
        timer = Timer(self.now + delay, call)
        self.timers.append(timer)
        return timer

    def advance(self, seconds: float) -> None:
        end = self.now + seconds
        while due := [timer for timer in self.timers if not timer.off and timer.at <= end]:
            timer = min(due, key=lambda one: one.at)
            timer.off = True
            self.now = max(self.now, timer.at)
            timer.call()
        self.now = end


class Service:
    """A controller with what is around it: endpoints, and requests that come, are sent and end."""

    def __init__(self, places: int = 1, **settings: object) -> None:
        self.time = Time()
        self.endpoints: list[Endpoint] = [Endpoint("a", "127.0.0.1", 8000)]
        self.control = FlowController(
            QueueSettings(**settings),  # type: ignore[arg-type]
            self.candidates,
            self.time,
            detector=Concurrency(places),
            call_later=self.time.call_later,
        )
        self.order: list[str] = []

    def candidates(self, request: InferenceRequest) -> Sequence[Endpoint]:
        return [one for one in self.endpoints if one.models is None or request.model in one.models]

    async def come(self, request: InferenceRequest) -> asyncio.Task[None]:
        task = asyncio.create_task(self._enter(request))
        await settle()
        return task

    async def _enter(self, request: InferenceRequest) -> None:
        await self.control.enter(request)
        self.order.append(request.id)

    async def leave(self, request: InferenceRequest) -> None:
        self.control.leave(request)
        await settle()


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def request(name: str, priority: int = 0, **fields: object) -> InferenceRequest:
    values: dict[str, object] = {"id": name, "path": "/v1/completions", "api": Api.COMPLETIONS, "model": "m"}
    values |= {"body": b"{}", "headers": {}, "arrived": 0.0, "priority": priority, "max_tokens": 1}
    return InferenceRequest(**(values | fields))  # type: ignore[arg-type]


def reason(task: asyncio.Task[None]) -> type[BaseException]:
    error = task.exception()
    assert isinstance(error, Dropped)
    assert error.retry_after is not None
    assert 1 <= error.retry_after <= 60
    return type(error)


async def test_what_can_go_goes_without_a_turn_of_the_loop() -> None:
    service = Service(places=2)
    entering = service.control.enter(request("a"))
    with pytest.raises(StopIteration):
        entering.send(None)


async def test_the_next_goes_when_one_leaves_the_highest_priority_first() -> None:
    service = Service()
    first = request("first")
    await service.come(first)
    low, high = request("low", 0), request("high", 5)
    await service.come(low)
    await service.come(high)
    assert service.order == ["first"]
    await service.leave(first)
    assert service.order == ["first", "high"]
    await service.leave(high)
    assert service.order == ["first", "high", "low"]
