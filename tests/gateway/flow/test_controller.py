"""Flow control on the event loop, with a clock that the test drives."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import pytest
import structlog
from hypothesis import given, settings
from hypothesis import strategies as st

from quire.core.errors import ModelNotFound, QuireError
from quire.gateway.director import Attempt, Director
from quire.gateway.endpoint import Endpoint, EndpointMetrics, Pool
from quire.gateway.errors import Dropped, Evicted, Expired, NoEndpoint, QueueCapacity, Saturated, ShuttingDown
from quire.gateway.flow.controller import FlowController
from quire.gateway.flow.limits import SoftReflectiveCeiling, UsageLimitPolicy
from quire.gateway.flow.policies import RoundRobin
from quire.gateway.flow.queue import BandSettings, QueueSettings
from quire.gateway.flow.saturation import NOTHING, Concurrency, OnTheWay, SaturationDetector
from quire.gateway.plugin import Conclusion, Picker, ProfileHandler
from quire.gateway.request import Api, InferenceRequest, Outcome
from quire.gateway.schedule import Profile, Scheduler


class First(Picker):
    name = "first"

    def pick(
        self, request: InferenceRequest, candidates: Sequence[Endpoint], totals: Sequence[float]
    ) -> Sequence[Endpoint]:
        return candidates


class Only(ProfileHandler):
    def next_profiles(
        self, request: InferenceRequest, profiles: Sequence[str], results: Mapping[str, Sequence[Endpoint]]
    ) -> Sequence[str]:
        return [name for name in profiles if name not in results]

    def conclude(self, request: InferenceRequest, results: Mapping[str, Sequence[Endpoint]]) -> Conclusion:
        return Conclusion(results["default"])


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
        self.now = max(self.now, end)


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


async def test_tenants_take_turns() -> None:
    service = Service(default_band=BandSettings(fairness=RoundRobin()))
    current = request("first", tenant="none")
    await service.come(current)
    flood = [request(f"flood-{number}", tenant="flood") for number in range(4)]
    for one in [*flood, request("quiet", tenant="quiet")]:
        await service.come(one)
    by_name = {one.id: one for one in flood}
    await service.leave(current)
    await service.leave(by_name[service.order[-1]])
    assert service.order == ["first", "flood-0", "quiet"]


async def test_a_tenant_is_one_flow_whatever_it_writes_into_the_header() -> None:
    service = Service(default_band=BandSettings(fairness=RoundRobin()))
    current = request("first", tenant="none")
    await service.come(current)
    for number in range(3):
        await service.come(request(f"many-{number}", tenant="many", fairness_id=f"mask-{number}"))
    await service.come(request("one", tenant="one"))
    await service.leave(current)
    await service.leave(next(iter(service.control._inside.values())).request)
    assert service.order == ["first", "many-0", "one"]


async def test_a_full_model_holds_up_no_other() -> None:
    service = Service()
    service.endpoints = [
        Endpoint("a", "127.0.0.1", 8000, models=frozenset({"a"})),
        Endpoint("b", "127.0.0.1", 8001, models=frozenset({"b"})),
    ]
    for number in range(3):
        await service.come(request(f"a-{number}", model="a"))
    await service.come(request("b-0", model="b"))
    await service.come(request("b-1", model="b"))
    assert service.order == ["a-0", "b-0"]


async def test_models_that_share_endpoints_share_by_priority_then_in_turns() -> None:
    service = Service()
    first = request("first")
    await service.come(first)
    for number in range(2):
        await service.come(request(f"a-{number}", model="a"))
    for number in range(2):
        await service.come(request(f"b-{number}", model="b"))
    urgent = request("urgent", model="c", priority=1)
    await service.come(urgent)
    inside = {one.request.id: one.request for one in service.control._inside.values()}
    while inside:
        await service.leave(inside.popitem()[1])
        inside = {one.request.id: one.request for one in service.control._inside.values()}
    assert service.order[:2] == ["first", "urgent"]
    assert sorted(service.order[2:4]) == ["a-0", "b-0"]
    assert sorted(service.order[4:]) == ["a-1", "b-1"]


async def test_nobody_who_waits_is_overtaken_through_another_model() -> None:
    """The place is given back and, before the loop looks, somebody else comes for the same endpoint."""
    service = Service()
    first = request("first")
    await service.come(first)
    await service.come(request("waits", model="a"))
    service.control.leave(first)
    await service.come(request("comes", model="b"))
    assert service.order == ["first", "waits"]


async def test_nobody_who_waits_is_overtaken_through_a_ceiling_that_goes_up_and_down() -> None:
    """At a saturation of 3/4 the lower of two priorities may go each third time that it is asked about."""
    service = Service(places=4, bands={1: BandSettings()}, limits=SoftReflectiveCeiling())
    for number in range(3):
        await service.come(request(f"{number}", 1))
    assert service.control.snapshot().inside == 3
    await service.come(request("first"))
    await service.come(request("second"))
    service.control.poke()
    await settle()
    assert service.order == ["0", "1", "2", "first"]


class Dear(Service):
    """To look for a request's endpoints takes a millisecond; models a… are behind the endpoint a, others behind b."""

    def __init__(self) -> None:
        self.looks = 0
        super().__init__()
        self.endpoints.append(Endpoint("b", "127.0.0.1", 8001))

    def candidates(self, request: InferenceRequest) -> Sequence[Endpoint]:
        self.looks += 1
        self.time.now += 0.001
        return [one for one in self.endpoints if one.name == request.model[0]]

    async def fill(self, lanes: int) -> InferenceRequest:
        """So many models wait for the endpoint a, and all of them have just been looked at. Returns who has it."""
        first = request("first", model="a")
        await self.come(first)
        for number in range(lanes):
            await self.come(request(f"{number}", model=f"a{number}"))
        self.time.advance(1.0)
        self.control.poke()
        await settle()
        self.looks = 0
        return first


async def test_however_many_models_wait_looking_at_them_takes_a_tenth_of_the_time() -> None:
    service = Dear()
    await service.fill(30)
    began = service.time.now
    for _ in range(400):
        service.control.poke()
        service.time.advance(0.01)
        await settle()
    assert 0.05 < 0.001 * service.looks / (service.time.now - began) < 0.11


async def test_an_arrival_looks_at_its_own_endpoints_alone() -> None:
    service = Dear()
    await service.fill(30)
    await service.come(request("elsewhere", model="b"))
    assert service.order == ["first", "elsewhere"]
    assert service.looks == 1
    for number in range(30):
        await service.come(request(f"again {number}", model=f"a{number}"))
    assert service.looks <= 31 + 30  # and one look at all at most, where the time for it has come


async def test_nobody_is_overtaken_while_the_next_look_is_put_off() -> None:
    service = Dear()
    first = await service.fill(30)
    await service.leave(first)
    await service.come(request("late", model="a-late"))
    assert service.order == ["first"]
    service.time.advance(0.5)
    await settle()
    assert service.order == ["first", "0"]


async def test_a_process_that_stood_still_looks_again_soon() -> None:
    service = Dear()
    first = await service.fill(2)
    service.time.now += 1.0
    service.endpoints = Stopped(service.endpoints, service.time)
    service.control.poke()
    await settle()
    await service.leave(first)
    service.time.advance(1.1)
    await settle()
    assert service.order == ["first", "0"]


class Stopped(list[Endpoint]):
    """While it is looked through the first time, half a minute passes."""

    def __init__(self, endpoints: Sequence[Endpoint], time: Time) -> None:
        super().__init__(endpoints)
        self._time, self._passes = time, 30.0

    def __iter__(self) -> Iterator[Endpoint]:
        self._time.now += self._passes
        self._passes = 0.0
        return super().__iter__()


async def test_models_take_turns_for_places_that_become_free_at_once() -> None:
    service = Service(places=2)
    running = [request("first"), request("second")]
    for one in running:
        await service.come(one)
    for name in ("a-0", "a-1", "b-0", "b-1"):
        await service.come(request(name, model=name[0]))
    for one in running:
        service.control.leave(one)
    await settle()
    assert sorted(service.order[2:]) == ["a-0", "b-0"]


async def test_a_request_waits_as_long_as_it_may() -> None:
    service = Service(ttl=10.0)
    await service.come(request("first"))
    task = await service.come(request("late"))
    service.time.advance(9.9)
    await settle()
    assert not task.done()
    service.time.advance(0.2)
    await settle()
    assert reason(task) is Expired
    assert service.control.snapshot().waiting == 0


async def test_requests_wait_for_a_model_to_start() -> None:
    service = Service(ttl=10.0, no_endpoint_ttl=120.0)
    endpoints, service.endpoints = service.endpoints, []
    first, second = request("first"), request("second")
    await service.come(first)
    task = await service.come(second)
    service.time.advance(100.0)
    await settle()
    assert service.order == []
    assert [(lane.model, lane.requests, lane.has_endpoints) for lane in service.control.snapshot().lanes] == [
        ("m", 2, False)
    ]
    service.endpoints = endpoints
    service.control.poke()
    await settle()
    assert service.order == ["first"]  # and the second one has its ten seconds from here
    service.time.advance(9.0)
    await settle()
    assert not task.done()
    service.time.advance(2.0)
    await settle()
    assert reason(task) is Expired


async def test_a_model_that_does_not_start_is_not_waited_for_for_ever() -> None:
    service = Service(ttl=10.0, no_endpoint_ttl=120.0)
    service.endpoints = []
    task = await service.come(request("first"))
    service.time.advance(119.0)
    await settle()
    assert not task.done()
    service.time.advance(2.0)
    await settle()
    assert reason(task) is NoEndpoint


async def test_what_no_endpoint_will_ever_serve_is_refused_at_once() -> None:
    service = Service()
    service.endpoints = []
    control = FlowController(QueueSettings(), service.candidates, service.time, awaited=lambda _request: False)
    with pytest.raises(ModelNotFound, match="'m'"):
        await control.enter(request("first"))


async def test_a_full_band_turns_away() -> None:
    service = Service(default_band=BandSettings(max_requests=1))
    await service.come(request("first"))
    await service.come(request("second"))
    assert reason(await service.come(request("third"))) is QueueCapacity
    assert not (await service.come(request("other band", 1))).done()


async def test_bytes_count_as_well_and_are_given_back() -> None:
    service = Service(default_band=BandSettings(max_bytes=100))
    first = request("first", body=bytes(80))
    await service.come(first)
    second = await service.come(request("second", body=bytes(80)))
    assert service.control.snapshot().size == 80
    assert reason(await service.come(request("third", body=bytes(21)))) is QueueCapacity
    second.cancel()
    await settle()
    assert service.control.snapshot().size == 0
    assert not (await service.come(request("third", body=bytes(21)))).done()


async def test_a_higher_priority_takes_the_place_of_a_lower_one_in_a_full_queue() -> None:
    service = Service(max_requests=2)
    await service.come(request("first"))
    older, newer = await service.come(request("older")), await service.come(request("newer"))
    await service.come(request("high", 1))
    assert reason(newer) is Evicted
    assert not older.done()


async def test_negative_priorities_do_not_wait() -> None:
    service = Service()
    assert not (await service.come(request("first", -1))).exception()
    assert reason(await service.come(request("second", -1))) is Saturated


async def test_closing_turns_all_away() -> None:
    service = Service()
    first = request("first")
    await service.come(first)
    waiting = await service.come(request("second"))
    service.control.close()
    await settle()
    assert reason(waiting) is ShuttingDown
    assert reason(await service.come(request("third"))) is ShuttingDown
    await service.leave(first)
    assert service.control.snapshot().inside == 0


async def test_a_client_that_goes_away_leaves_at_once() -> None:
    service = Service()
    first = request("first")
    await service.come(first)
    second = await service.come(request("second"))
    third = request("third")
    await service.come(third)
    second.cancel()
    await settle()
    assert service.control.snapshot().waiting == 1
    await service.leave(first)
    assert service.order == ["first", "third"]
    assert all(timer.off for timer in service.time.timers)


async def test_a_client_that_goes_away_in_the_instant_it_is_let_go_gives_its_place_back() -> None:
    service = Service()
    first, third = request("first"), request("third")
    await service.come(first)
    second = await service.come(request("second"))
    await service.come(third)
    service.control.leave(first)
    service.control._look()  # lets the second one go, and its task does not know yet
    second.cancel()
    await settle()
    assert service.order == ["first", "third"]
    await service.leave(third)
    assert service.control.snapshot().inside == 0


async def test_a_client_that_went_away_is_not_let_go() -> None:
    service = Service()
    first, third = request("first"), request("third")
    await service.come(first)
    second = await service.come(request("second"))
    await service.come(third)
    second.cancel()
    service.control.leave(first)
    service.control._look()
    await settle()
    assert service.order == ["first", "third"]
    assert service.control.snapshot().inside == 1


async def test_many_that_come_in_one_instant_are_not_all_let_go() -> None:
    """They are counted at no endpoint yet: what is on its way counts."""
    service = Service(places=3)
    tasks = [asyncio.create_task(service.control.enter(request(f"{number}"))) for number in range(10)]
    await settle()
    assert sum(task.done() for task in tasks) == 3
    for task in tasks:
        task.cancel()


async def test_through_the_director_a_request_is_counted_once() -> None:
    """On its way until it is sent, at its endpoint from then on: three places are three, and none is lost."""
    pool = Pool()
    pool.put(Endpoint("a", "127.0.0.1", 8000))
    profile = Profile("default", (), (), First())
    router = Director(pool=pool, scheduler=Scheduler({"default": profile}, Only()), clock=Time())
    control = FlowController(QueueSettings(), router.candidates, router.clock, detector=Concurrency(3))
    router.gate, router.observers = control, (control,)
    open_now: list[tuple[InferenceRequest, Attempt]] = []
    most = 0

    async def serve(name: str) -> None:
        one = request(name)
        choice = await router.choose(one)
        open_now.append((one, router.sent(one, choice.endpoint, choice)))

    tasks = [asyncio.create_task(serve(f"{number}")) for number in range(20)]
    for _ in range(200):
        await settle()
        most = max(most, len(open_now))
        if not open_now:
            break
        one, attempt = open_now.pop(0)
        router.finished(one, attempt, Outcome(status=200, output_tokens=5))
        router.abandon(one)
    assert all(task.done() and task.exception() is None for task in tasks)
    assert most == 3
    assert control.snapshot().inside == 0
    assert pool.all[0].load.requests == 0


async def test_metrics_that_change_let_requests_go() -> None:
    service = Service()
    control = FlowController(QueueSettings(), service.candidates, service.time, call_later=service.time.call_later)
    endpoint = service.endpoints[0]
    endpoint.metrics = EndpointMetrics(time=service.time.now, waiting=9, running=8)
    task = asyncio.create_task(control.enter(request("first")))
    await settle()
    assert not task.done()
    service.time.advance(0.2)
    endpoint.metrics = EndpointMetrics(time=service.time.now, waiting=1, running=8)
    control.poke()
    await settle()
    assert task.done()


@given(st.lists(st.integers(0, 9), max_size=60), st.integers(0, 2**32))
@settings(max_examples=60, deadline=None)
def test_whatever_happens_nobody_is_forgotten(steps: list[int], seed: int) -> None:
    """Requests come, leave, are cancelled and expire in any order: afterwards every one was answered, nothing is
    counted any more, and as long as any waited the one place was taken."""

    async def run() -> None:
        rng = random.Random(seed)
        service = Service(ttl=20.0, default_band=BandSettings(max_requests=5, fairness=RoundRobin()), max_requests=8)
        inside: dict[str, InferenceRequest] = {}
        tasks: dict[str, asyncio.Task[None]] = {}

        async def enter(one: InferenceRequest) -> None:
            await service.control.enter(one)
            inside[one.id] = one

        for number, step in enumerate(steps):
            if step < 5:
                one = request(f"{number}", rng.choice((0, 0, 1)), tenant=rng.choice("xyz"), model=rng.choice("ab"))
                tasks[one.id] = asyncio.create_task(enter(one))
            elif step < 7 and inside:
                service.control.leave(inside.pop(rng.choice(sorted(inside))))
            elif step == 7 and tasks:
                tasks[rng.choice(sorted(tasks))].cancel()
            else:
                service.time.advance(rng.random() * 8)
            if rng.random() < 0.7:
                await settle()
                snapshot = service.control.snapshot()
                assert snapshot.inside == len(inside) <= 1
                assert not snapshot.waiting or inside
        await settle()
        service.time.advance(50.0)
        for _ in range(len(tasks) + 1):
            for name in list(inside):
                service.control.leave(inside.pop(name))
            await settle()
        assert all(task.done() for task in tasks.values())
        snapshot = service.control.snapshot()
        assert (snapshot.waiting, snapshot.size, snapshot.inside, snapshot.lanes) == (0, 0, 0, [])
        assert not service.control._futures
        assert not service.control._shares.requests
        assert all(timer.off for timer in service.time.timers)
        for task in tasks.values():
            if not task.cancelled() and (error := task.exception()) is not None:
                assert isinstance(error, Dropped)

    asyncio.run(run())


# --- ending requests in flight --------------------------------------------------------------------------------


class Evicting(Service):
    """Requests are sent as soon as they are let go, all to one endpoint with so many places."""

    def __init__(self, places: int) -> None:
        super().__init__(places)
        self.ended: list[str] = []
        self.control = FlowController(
            QueueSettings(shed_negative=False),
            self.candidates,
            self.time,
            detector=Concurrency(places),
            evict=True,
            call_later=self.time.call_later,
        )

    async def send(self, request: InferenceRequest) -> None:
        def ended(error: QuireError) -> None:
            assert isinstance(error, Evicted)
            assert 1 <= (error.retry_after or 0) <= 60
            self.ended.append(request.id)

        if request.id != "cannot be broken off":
            request.break_off = ended
        await self.come(request)
        self.endpoints[0].load.requests += 1
        self.control.sent(request, self.endpoints[0], Conclusion(self.endpoints))

    async def end(self, request: InferenceRequest) -> None:
        self.endpoints[0].load.requests -= 1
        await self.leave(request)


async def test_the_newest_of_the_lowest_priority_is_ended_for_those_who_wait() -> None:
    service = Evicting(places=4)
    running = [request("plain"), request("old", -1), request("new", -1), request("least", -5)]
    for one in running:
        await service.send(one)
        service.time.advance(1.0)
    await service.come(request("urgent"))
    service.control.poke()
    await settle()
    assert service.ended == ["least"]
    service.control.poke()  # it has not ended yet: nothing more is done
    await settle()
    assert service.ended == ["least"]
    await service.end(running[3])
    assert service.order[-1] == "urgent"
    await service.come(request("second"))
    service.control.poke()  # the metrics have had no time to show it
    await settle()
    assert service.ended == ["least"]
    service.time.advance(1.1)
    service.control.poke()
    await settle()
    assert service.ended == ["least", "new"]


async def test_nobody_is_ended_for_its_own_priority_nor_anybody_of_none_below_zero() -> None:
    service = Evicting(places=2)
    await service.send(request("plain"))
    await service.send(request("shed", -1))
    await service.come(request("as low", -1))
    for _ in range(3):
        service.time.advance(2.0)
        service.control.poke()
        await settle()
    assert service.ended == []
    await service.come(request("urgent", 7))
    for _ in range(8):
        service.time.advance(6.0)
        service.control.poke()
        await settle()
    assert service.ended == ["shed"]


async def test_what_cannot_be_broken_off_is_not_ended() -> None:
    service = Evicting(places=2)
    await service.send(request("shed", -1))
    await service.send(request("cannot be broken off", -9))
    await service.come(request("urgent"))
    service.control.poke()
    await settle()
    assert service.ended == ["shed"]


async def test_a_cancelled_request_leaves_no_timer() -> None:
    service = Service()
    await service.come(request("first"))
    task = await service.come(request("second"))
    assert not all(timer.off for timer in service.time.timers)
    task.cancel()
    await settle()
    assert all(timer.off for timer in service.time.timers)


class Faulty(SaturationDetector):
    name = "faulty"

    def saturation(self, endpoints: Sequence[Endpoint], now: float, on_the_way: OnTheWay = NOTHING) -> float:
        raise RuntimeError("it does not work")


class FaultyLimits(UsageLimitPolicy):
    def __init__(self) -> None:
        self.calls = 0

    def ceilings(self, saturation: float, priorities: Sequence[int]) -> Sequence[float]:
        self.calls += 1
        return () if self.calls > 2 else (1.0,) * len(priorities)


async def test_a_detector_that_fails_holds_nobody_up() -> None:
    service = Service()
    control = FlowController(QueueSettings(), service.candidates, service.time, detector=Faulty())
    with structlog.testing.capture_logs() as logs:
        await control.enter(request("first"))
    assert logs[0]["plugin"] == "faulty"


async def test_where_a_policy_fails_requests_still_expire() -> None:
    service = Service(limits=FaultyLimits(), ttl=10.0)
    await service.come(request("first"))
    task = await service.come(request("second"))
    with pytest.raises(IndexError):
        service.control._look()
    with pytest.raises(IndexError):
        await service.control.enter(request("third"))
    service.time.advance(11.0)
    await settle()
    assert reason(task) is Expired


async def test_what_waits_is_shown_by_model_and_by_priority() -> None:
    service = Service()
    await service.come(request("first"))
    for name, priority in (("a", 0), ("a", 3), ("b", 0)):
        await service.come(request("waits", priority, model=name))
    service.time.advance(2.0)
    service.control.poke()
    await settle()
    snapshot = service.control.snapshot()
    assert (snapshot.waiting, snapshot.inside) == (3, 1)
    assert snapshot.by_model() == {"a": 2, "b": 1}
    assert snapshot.by_priority() == {0: 2, 3: 1}
    assert all((lane.oldest, lane.saturation) == (2.0, 1.0) for lane in snapshot.lanes)
