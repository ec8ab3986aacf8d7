"""The queue against a list that is looked through from end to end each time."""

from __future__ import annotations

import dataclasses
import random
from collections import Counter
from math import inf

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from quire.gateway.flow.attained import REBASE_HALF_LIVES, LeastAttainedService
from quire.gateway.flow.limits import PriorityHoldback
from quire.gateway.flow.policies import (
    EarliestDeadlineFirst,
    FairnessPolicy,
    FirstComeFirstServed,
    GlobalStrict,
    LaneKey,
    OrderingPolicy,
    RoundRobin,
    SloDeadline,
    Waiting,
)
from quire.gateway.flow.queue import MAX_LANES, BandSettings, FlowQueue, QueueSettings, Rejection
from quire.gateway.flow.ranked import RankedSet
from quire.gateway.request import Api, InferenceRequest

FAIRNESS: dict[str, type[FairnessPolicy]] = {"strict": GlobalStrict, "round-robin": RoundRobin}
ORDERING: dict[str, type[OrderingPolicy]] = {
    "fcfs": FirstComeFirstServed,
    "edf": EarliestDeadlineFirst,
    "slo": SloDeadline,
}


def request(model: str = "m", priority: int = 0, flow: str = "", **fields: object) -> InferenceRequest:
    values: dict[str, object] = {"id": "r", "path": "/v1/completions", "api": Api.COMPLETIONS, "model": model}
    values |= {"body": b"", "headers": {}, "arrived": 0.0, "priority": priority, "fairness_id": flow}
    return InferenceRequest(**(values | fields))  # type: ignore[arg-type]


@dataclasses.dataclass
class Listed:
    waiting: Waiting
    lane: str
    priority: int
    flow: str
    size: int
    enqueued: float
    key: tuple[float, ...]
    number: int


@dataclasses.dataclass
class Regime:
    has_endpoints: bool
    since: float


class AgainstAList(RuleBasedStateMachine):
    TTL, NO_ENDPOINT_TTL = 10.0, 25.0
    BAND = (4, 100)
    ALL = (7, 150)

    @initialize(fairness=st.sampled_from(sorted(FAIRNESS)), ordering=st.sampled_from(sorted(ORDERING)))
    def start(self, fairness: str, ordering: str) -> None:
        self.fairness, self.ordering = fairness, ordering
        band = BandSettings(
            max_requests=self.BAND[0],
            max_bytes=self.BAND[1],
            fairness=FAIRNESS[fairness](),
            ordering=ORDERING[ordering](),
        )
        self.queue = FlowQueue(
            QueueSettings(
                max_requests=self.ALL[0],
                max_bytes=self.ALL[1],
                ttl=self.TTL,
                no_endpoint_ttl=self.NO_ENDPOINT_TTL,
                default_band=band,
                bands={0: band},
                limits=PriorityHoldback(0.5),
                shed_negative=False,
            )
        )
        self.now = 100.0
        self.number = 0
        self.listed: list[Listed] = []
        self.turns: dict[tuple[str, int, str], int] = {}
        """(lane, priority, flow) → when it was last served, or came: the round robin goes by that."""
        self.regimes: dict[str, Regime] = {}

    def tick(self) -> int:
        self.number += 1
        return self.number

    def drop(self, gone: Listed) -> None:
        self.listed.remove(gone)
        flow = (gone.lane, gone.priority, gone.flow)
        if not any((one.lane, one.priority, one.flow) == flow for one in self.listed):
            self.turns.pop(flow, None)
        if not any(one.lane == gone.lane for one in self.listed):
            self.regimes.pop(gone.lane, None)

    @rule(
        lane=st.sampled_from("ab"),
        priority=st.sampled_from((-1, 0, 1, 5)),
        flow=st.sampled_from("xyz"),
        size=st.integers(0, 60),
        slo=st.none() | st.integers(0, 20),
        has_endpoints=st.booleans(),
    )
    def offer(self, lane: str, priority: int, flow: str, size: int, slo: int | None, has_endpoints: bool) -> None:
        slo_ttft = None if slo is None else float(slo)
        one = request(lane, priority, flow, body=bytes(size), arrived=self.now, slo_ttft=slo_ttft)
        place, displaced = self.queue.offer(one, self.now, has_endpoints=has_endpoints)
        band = [other for other in self.listed if other.priority == priority]
        if len(band) + 1 > self.BAND[0] or sum(other.size for other in band) + size > self.BAND[1]:
            assert place is Rejection.CAPACITY
            assert not displaced
            return
        victims: list[Listed] = []
        lower = sorted(
            (other for other in self.listed if other.priority < priority),
            key=lambda other: (other.priority, -other.number),
        )
        left = list(self.listed)
        while len(left) + 1 > self.ALL[0] or sum(other.size for other in left) + size > self.ALL[1]:
            if not lower:
                assert place is Rejection.CAPACITY
                assert not displaced
                return
            victim = lower.pop(0)
            victims.append(victim)
            left.remove(victim)
        assert isinstance(place, Waiting)
        assert [victim.waiting for victim in victims] == list(displaced)
        for victim in victims:
            self.drop(victim)
        number = self.tick()
        key: tuple[float, ...] = (self.now,)
        if self.ordering == "slo":
            key = (inf if slo is None else self.now + slo, self.now)
        self.listed.append(Listed(place, lane, priority, flow, size, self.now, key, number))
        self.turns.setdefault((lane, priority, flow), number)
        self.regimes.setdefault(lane, Regime(has_endpoints, self.now))

    @rule(name=st.sampled_from("ab"), saturation=st.sampled_from((0.0, 0.4, 0.6, 0.8, 1.0, 2.0)))
    def dispatch(self, name: str, saturation: float) -> None:
        lane = self.queue.lane(LaneKey(name))
        mine = [one for one in self.listed if one.lane == name]
        assert (lane is not None) == bool(mine)
        if lane is None:
            return
        got = self.queue.dispatch(lane, self.now, saturation)
        active = sorted({0} | {one.priority for one in mine}, reverse=True)
        highest = max(one.priority for one in mine)
        rank = active.index(highest)
        ceiling = 1.0 if len(active) == 1 else 1.0 - rank * 0.5 / (len(active) - 1)
        if not self.regimes[name].has_endpoints or saturation >= ceiling:
            assert got is None
            return
        band = [one for one in mine if one.priority == highest]
        if self.fairness == "round-robin":
            flow = min({one.flow for one in band}, key=lambda flow: self.turns[name, highest, flow])
            band = [one for one in band if one.flow == flow]
        expected = min(band, key=lambda one: (one.key, one.number))
        assert got is expected.waiting
        self.turns[name, highest, expected.flow] = self.tick()
        self.drop(expected)

    @precondition(lambda self: self.listed)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        one = data.draw(st.sampled_from(self.listed))
        assert self.queue.cancel(one.waiting)
        assert not self.queue.cancel(one.waiting)
        self.drop(one)

    @rule(name=st.sampled_from("ab"), has_endpoints=st.booleans())
    def endpoints(self, name: str, has_endpoints: bool) -> None:
        lane = self.queue.lane(LaneKey(name))
        if lane is None:
            return
        self.queue.set_endpoints(lane, self.now, has_endpoints=has_endpoints)
        if self.regimes[name].has_endpoints != has_endpoints:
            self.regimes[name] = Regime(has_endpoints, self.now)

    def deadline(self, one: Listed) -> float:
        regime = self.regimes[one.lane]
        ttl = self.TTL if regime.has_endpoints else self.NO_ENDPOINT_TTL
        return min(max(one.enqueued, regime.since) + ttl, one.enqueued + max(self.TTL, self.NO_ENDPOINT_TTL))

    @rule(seconds=st.sampled_from((0.0, 1.0, 4.0, 9.0, 30.0)))
    def time_passes(self, seconds: float) -> None:
        assert self.queue.next_deadline() == min((self.deadline(one) for one in self.listed), default=inf)
        self.now += seconds
        late = [
            (one, Rejection.EXPIRED if self.regimes[one.lane].has_endpoints else Rejection.NO_ENDPOINT)
            for one in self.listed
            if self.deadline(one) <= self.now
        ]
        gone = self.queue.expire(self.now)
        assert {(id(waiting), reason) for waiting, reason in gone} == {(id(one.waiting), why) for one, why in late}
        for one, _ in late:
            self.drop(one)

    @invariant()
    def everything_is_accounted_for(self) -> None:
        if not hasattr(self, "queue"):
            return
        assert len(self.queue) == len(self.listed)
        assert self.queue.size == sum(one.size for one in self.listed)
        assert {lane.key.model for lane in self.queue.lanes} == {one.lane for one in self.listed}
        counts = Counter(one.priority for one in self.listed)
        assert {priority: count for priority, count, _ in self.queue.totals()} == counts
        for lane in self.queue.lanes:
            mine = Counter(one.priority for one in self.listed if one.lane == lane.key.model)
            assert {priority: len(band) for priority, band in lane.bands.items()} == mine

    def teardown(self) -> None:
        if not hasattr(self, "queue"):
            return
        for one in self.listed:
            assert self.queue.cancel(one.waiting)
        assert len(self.queue) == self.queue.size == 0
        assert not self.queue.lanes
        assert not list(self.queue.totals())


TestAgainstAList = AgainstAList.TestCase
TestAgainstAList.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


@pytest.mark.parametrize("seed", range(3))
def test_round_robin_leaves_no_flow_more_than_one_behind(seed: int) -> None:
    rng = random.Random(seed)
    queue = FlowQueue(QueueSettings(default_band=BandSettings(fairness=RoundRobin(), max_requests=10_000)))
    flows = [f"tenant-{number}" for number in range(20)]
    offers = [flow for flow in flows for _ in range(rng.randint(30, 200))]
    rng.shuffle(offers)
    for flow in offers:
        queue.offer(request(flow=flow), 0.0)
    lane = queue.lane(LaneKey("m"))
    assert lane is not None
    waiting, served = Counter(offers), Counter[str]()
    while all(waiting.values()):
        one = queue.dispatch(lane, 0.0, 0.0)
        assert one is not None
        waiting[one.flow] -= 1
        served[one.flow] += 1
        assert max(served.values()) - min(served[flow] for flow in flows) <= 1


def test_ten_thousand_tenants_each_get_a_turn_and_leave_nothing_behind() -> None:
    """One tenant floods; each of 10,000 others has one request, and is served within one round."""
    band = BandSettings(fairness=RoundRobin(), max_requests=40_000)
    queue = FlowQueue(QueueSettings(max_requests=40_000, default_band=band))
    for _ in range(20_000):
        queue.offer(request(flow="flood"), 0.0)
    for number in range(10_000):
        queue.offer(request(flow=f"tenant-{number}"), 0.0)
    lane = queue.lane(LaneKey("m"))
    assert lane is not None
    served = Counter[str]()
    for _ in range(10_001):
        one = queue.dispatch(lane, 0.0, 0.0)
        assert one is not None
        served[one.flow] += 1
    assert served["flood"] == 1
    assert len(served) == 10_001
    assert len(lane.bands[0]._flows) == 1  # type: ignore[attr-defined] # idle tenants are forgotten
    while queue.dispatch(lane, 0.0, 0.0) is not None:
        pass
    assert len(queue) == queue.size == len(queue.lanes) == 0


def test_the_number_of_models_that_wait_is_bounded() -> None:
    queue = FlowQueue(QueueSettings())
    for number in range(MAX_LANES):
        assert isinstance(queue.offer(request(f"model-{number}"), 0.0)[0], Waiting)
    assert queue.offer(request("one more"), 0.0)[0] is Rejection.CAPACITY
    assert isinstance(queue.offer(request("model-0"), 0.0)[0], Waiting)


def test_negative_priorities_are_shed_unless_the_model_starts() -> None:
    queue = FlowQueue(QueueSettings())
    assert queue.offer(request(priority=-1), 0.0)[0] is Rejection.SATURATED
    assert isinstance(queue.offer(request(priority=-1), 0.0, has_endpoints=False)[0], Waiting)


def test_endpoints_that_flap_do_not_keep_a_request_for_ever() -> None:
    queue = FlowQueue(QueueSettings(ttl=10.0, no_endpoint_ttl=20.0))
    queue.offer(request(), 0.0)
    lane = queue.lane(LaneKey("m"))
    assert lane is not None
    for second in range(20):
        assert not queue.expire(float(second))
        queue.set_endpoints(lane, float(second), has_endpoints=bool(second % 2))
    assert [reason for _, reason in queue.expire(20.0)] == [Rejection.EXPIRED]


# --- least attained service -----------------------------------------------------------------------------------


@pytest.mark.parametrize("pause", [0.0, 30.0, 60.0 * REBASE_HALF_LIVES, 60.0 * 5000])
def test_least_attained_service_serves_whoever_got_least(pause: float) -> None:
    """Against accounts that are decayed one by one at each step; across a change of units, too."""
    rng = random.Random(1)
    policy = LeastAttainedService(half_life=60.0)
    queue = policy.queue(FirstComeFirstServed())
    accounts: dict[str, float] = {}
    waiting = Counter[str]()
    now, before = 1000.0, 1000.0
    flows = [f"tenant-{number}" for number in range(8)]
    for step in range(400):
        now += pause if step == 200 else rng.random() * 5
        accounts = {flow: account * 0.5 ** ((now - before) / 60.0) for flow, account in accounts.items()}
        before = now
        flow = rng.choice(flows)
        one = request(flow=flow, prompt_tokens=rng.randint(1, 5000))
        queue.add(Waiting(one, LaneKey("m"), 0, flow, now, now + 60, 0))
        waiting[flow] += 1
        if rng.random() < 0.5:
            spent = rng.randint(1, 3000)
            policy.served(flow, spent, now)
            accounts[flow] = accounts.get(flow, 0.0) + spent
        if step < 40 or rng.random() < 0.2:
            continue
        got = queue.take(now)
        least = min(accounts.get(name, 0.0) for name in waiting if waiting[name])
        assert accounts.get(got.flow, 0.0) == pytest.approx(least, rel=1e-6, abs=2.0)
        waiting[got.flow] -= 1
        accounts[got.flow] = accounts.get(got.flow, 0.0) + got.request.prompt_tokens + 1
    for name, account in accounts.items():
        assert policy.attained(name, now) == pytest.approx(account, rel=1e-6, abs=2.0)


# --- the ranked set -------------------------------------------------------------------------------------------


class RankedAgainstASortedList(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.ranked: RankedSet[int] = RankedSet()
        self.places: dict[int, tuple[int, int]] = {}
        self.turn = 0

    @rule(item=st.integers(0, 12), key=st.integers(0, 5))
    def put(self, item: int, key: int) -> None:
        self.turn += 1
        self.ranked.put(item, (key,))
        self.places[item] = (key, self.turn)

    @rule(item=st.integers(0, 12))
    def discard(self, item: int) -> None:
        self.ranked.discard(item)
        self.places.pop(item, None)

    @precondition(lambda self: self.places)
    @rule()
    def pop(self) -> None:
        least = min(self.places, key=self.places.__getitem__)
        assert self.ranked.first() == least
        assert self.ranked.first_key() == (self.places[least][0],)
        assert self.ranked.pop() == least
        del self.places[least]

    @invariant()
    def same(self) -> None:
        assert set(self.ranked) == set(self.places)
        assert len(self.ranked) == len(self.places)
        assert len(self.ranked._heap) <= 2 * len(self.places) + 17


TestRankedAgainstASortedList = RankedAgainstASortedList.TestCase
TestRankedAgainstASortedList.settings = settings(max_examples=60, stateful_step_count=60, deadline=None)
