"""The default in front of simulated engines whose metrics are read five times a second: it costs no throughput, it
holds nothing back while there is room, and it keeps engines' queues short."""

from __future__ import annotations

import asyncio
import heapq
import random
from collections import deque
from dataclasses import dataclass, field

import pytest

from quire.gateway.endpoint import Endpoint, EndpointMetrics
from quire.gateway.flow.controller import FlowController
from quire.gateway.flow.queue import QueueSettings
from quire.gateway.flow.saturation import BURST
from quire.gateway.plugin import Conclusion
from quire.gateway.request import Api, InferenceRequest

PERIOD = 0.2


class NeverCalled:
    def cancel(self) -> None:
        return


@dataclass
class Engine:
    """Runs so many requests at once, the others wait in the order they came."""

    endpoint: Endpoint
    slots: int
    waiting: deque[InferenceRequest] = field(default_factory=deque)
    running: int = 0


@dataclass
class Simulation:
    """Requests go to the endpoint with the fewest open. Time goes from one event to the next."""

    engines: list[Engine]
    controlled: bool
    rng: random.Random
    now: float = 0.0
    events: list[tuple[float, int, str, object]] = field(default_factory=list)
    number: int = 0
    done: list[float] = field(default_factory=list)
    longest_queue: int = 0
    held: int = 0

    def at(self, time: float, kind: str, what: object) -> None:
        self.number += 1
        heapq.heappush(self.events, (time, self.number, kind, what))

    async def run(self, arrivals: list[float]) -> None:
        by_endpoint = {id(engine.endpoint): engine for engine in self.engines}
        endpoints = [engine.endpoint for engine in self.engines]
        control = FlowController(
            QueueSettings(ttl=1e9),
            lambda _: endpoints,
            lambda: self.now,
            call_later=lambda _delay, _call: NeverCalled(),
        )
        tasks: list[asyncio.Task[None]] = []

        async def come(one: InferenceRequest) -> None:
            if self.controlled:
                await control.enter(one)
            place = min(endpoints, key=lambda endpoint: endpoint.load.requests)
            place.load.requests += 1
            control.sent(one, place, Conclusion(endpoints))
            self.accept(by_endpoint[id(place)], one)

        for arrival in arrivals:
            self.at(arrival, "arrival", None)
        self.at(0.0, "metrics", None)
        while len(self.done) < len(arrivals):
            self.now, _, kind, what = heapq.heappop(self.events)
            if kind == "arrival":
                one = InferenceRequest(
                    id="r", path="/", api=Api.CHAT, model="m", body=b"", headers={}, arrived=self.now
                )
                tasks.append(asyncio.create_task(come(one)))
            elif kind == "metrics":
                for engine in self.engines:
                    engine.endpoint.metrics = EndpointMetrics(
                        time=self.now, waiting=len(engine.waiting), running=engine.running
                    )
                control.poke()
                self.at(self.now + PERIOD, "metrics", None)
            else:
                engine, one = what  # type: ignore[misc]
                self.finish(engine)
                engine.endpoint.load.requests -= 1
                if self.controlled:
                    control.leave(one)
            for _ in range(4):
                await asyncio.sleep(0)
            self.held = max(self.held, control.snapshot().waiting)
        await asyncio.gather(*tasks)

    def accept(self, engine: Engine, one: InferenceRequest) -> None:
        engine.waiting.append(one)
        self.start(engine)
        self.longest_queue = max(self.longest_queue, len(engine.waiting))

    def start(self, engine: Engine) -> None:
        while engine.waiting and engine.running < engine.slots:
            engine.running += 1
            one = engine.waiting.popleft()
            self.at(self.now + self.rng.uniform(0.02, 0.5), "end", (engine, one))

    def finish(self, engine: Engine) -> None:
        engine.running -= 1
        self.done.append(self.now)
        self.start(engine)


def simulate(arrivals: list[float], *, controlled: bool, slots: tuple[int, ...] = (8, 8, 8, 8)) -> Simulation:
    engines = [Engine(Endpoint(f"e{index}", "127.0.0.1", 8000 + index), count) for index, count in enumerate(slots)]
    simulation = Simulation(engines, controlled, random.Random(7))
    asyncio.run(simulation.run(arrivals))
    return simulation


@pytest.mark.parametrize("slots", [(32, 32), (2, 4, 16), (1,)])
def test_an_overload_takes_no_longer_than_without(slots: tuple[int, ...]) -> None:
    """1.5 times what the engines can do, for a while, and then the queue empties."""
    rng = random.Random(3)
    rate = 1.5 * sum(slots) / 0.26
    arrivals, now = [], 0.0
    for _ in range(40 * sum(slots)):
        now += rng.expovariate(rate)
        arrivals.append(now)
    free, controlled = (simulate(arrivals, controlled=one, slots=slots) for one in (False, True))
    assert controlled.held > 0
    assert controlled.longest_queue < free.longest_queue
    # Engines of different speeds finish earlier with a queue in common; equal ones within the noise of the last few.
    assert max(controlled.done) <= max(free.done) * 1.03


def test_below_saturation_nothing_is_held() -> None:
    rng = random.Random(4)
    arrivals, now = [], 0.0
    for _ in range(1500):
        now += rng.expovariate(0.6 * 32 / 0.26)
        arrivals.append(now)
    free, controlled = (simulate(arrivals, controlled=one) for one in (False, True))
    assert controlled.held == 0
    assert controlled.done == free.done


def test_a_flood_does_not_all_go_to_an_engine_that_had_a_moments_room() -> None:
    free, controlled = (simulate([0.05] * 2000, controlled=one, slots=(8,)) for one in (False, True))
    assert controlled.longest_queue <= BURST + 5 < free.longest_queue
    assert max(controlled.done) <= max(free.done) * 1.03


def test_a_burst_within_one_reading_is_not_held_back() -> None:
    free, controlled = (simulate([0.05] * 30, controlled=one) for one in (False, True))
    assert controlled.held == 0
    assert controlled.done == free.done
