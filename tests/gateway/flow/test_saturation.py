"""When endpoints count as full, and up to where each priority may go."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quire.gateway.endpoint import Endpoint, EndpointMetrics
from quire.gateway.flow.limits import (
    ExplicitHoldback,
    PriorityHoldback,
    SoftReflectiveCeiling,
    StaticLimit,
    UsageLimitPolicy,
)
from quire.gateway.flow.saturation import BURST, Concurrency, EngineQueues, Highest, OnTheWay, Shares, Utilization
from quire.gateway.request import Api, InferenceRequest

NOW = 1000.0


def endpoint(
    name: str = "a", waiting: int = 0, running: int = 0, kv: float = 0.0, age: float | None = 0.1, load: int = 0
) -> Endpoint:
    one = Endpoint(name, "127.0.0.1", 8000)
    one.load.requests, one.load.tokens = load, 100 * load
    if age is not None:
        one.metrics = EndpointMetrics(time=NOW - age, waiting=waiting, running=running, kv_usage=kv)
    return one


def request() -> InferenceRequest:
    return InferenceRequest(id="r", path="/", api=Api.CHAT, model="m", body=b"", headers={}, arrived=0.0)


@given(
    st.lists(st.tuples(st.integers(0, 20), st.floats(0, 1), st.integers(0, 40)), min_size=1, max_size=6),
    st.integers(1, 9),
    st.floats(0.1, 1.0),
)
def test_utilization_is_the_mean_of_the_fuller_resource(
    pages: list[tuple[int, float, int]], depth: int, kv_use: float
) -> None:
    endpoints = [endpoint(waiting=waiting, kv=kv, load=load) for waiting, kv, load in pages]
    expected = sum(max(waiting / depth, kv / kv_use) for waiting, kv, _ in pages) / len(pages)
    assert Utilization(queue_depth=depth, kv_use=kv_use).saturation(endpoints, NOW) == pytest.approx(expected)


def test_what_is_sent_and_what_comes_back_since_the_metrics_were_read_counts_where_requests_wait() -> None:
    busy, idle = endpoint(waiting=3, running=8, load=11), endpoint(waiting=0, running=2, load=2)
    detector = Utilization()
    assert detector.saturation([busy], NOW) == pytest.approx(3 / 5)
    assert detector.saturation([idle], NOW) == 0.0
    busy.load.requests += 1
    idle.load.requests += 50
    assert detector.saturation([busy], NOW, OnTheWay(1.0)) == pytest.approx(5 / 5)
    assert detector.saturation([idle], NOW) == 0.0  # how much more it runs at once is not known
    idle.load.requests += BURST - 50
    assert detector.saturation([idle], NOW) == 0.0
    idle.load.requests += 4
    assert detector.saturation([idle], NOW, OnTheWay(1.0)) == 1.0  # … but not that much before it is asked again
    busy.load.requests -= 8
    assert detector.saturation([busy], NOW) == 0.0
    busy.metrics = EndpointMetrics(time=NOW + 0.2, waiting=2, running=4)
    assert detector.saturation([busy], NOW + 0.2) == pytest.approx(2 / 5)


def test_a_stale_endpoint_is_full_unless_all_are() -> None:
    """If every reading fails it is the readings: nobody is turned away for that."""
    fresh, stale, unread = endpoint(waiting=1), endpoint(age=9.0), endpoint(age=None)
    assert Utilization().saturation([fresh, stale], NOW) == pytest.approx((0.2 + 1) / 2)
    assert Utilization(stale="ignore").saturation([fresh, stale], NOW) == pytest.approx(0.2)
    assert Utilization().saturation([stale, unread], NOW) == 0.0


@pytest.mark.parametrize("detector", [Utilization(), EngineQueues()])
def test_one_failed_reading_changes_nothing(detector: Utilization | EngineQueues) -> None:
    """Metrics are read each 0.2 s; after one failure the next reading is 0.4 s later."""
    assert detector.saturation([endpoint(waiting=1, age=0.65), endpoint(waiting=1)], NOW) == pytest.approx(0.2)


def test_engine_queues_are_full_only_when_every_endpoint_is() -> None:
    detector = EngineQueues()
    assert detector.saturation([endpoint(waiting=100, kv=1.0), endpoint(waiting=4, kv=1.0)], NOW) < 1
    assert detector.saturation([endpoint(waiting=100), endpoint(waiting=5)], NOW) == 1.0
    assert detector.saturation([endpoint(waiting=100), endpoint(age=None)], NOW) < 1
    assert detector.saturation([endpoint(waiting=100, age=5.0)], NOW) == 0.0
    assert detector.saturation([endpoint(kv=1.0, running=500, load=500)], NOW, OnTheWay(100.0)) == 0.0


def test_an_endpoint_that_cannot_be_read_has_room_for_a_burst_beside_others_and_for_all_alone() -> None:
    unread, full = endpoint(age=None, load=BURST - 1), endpoint(waiting=9)
    assert EngineQueues().saturation([unread, full], NOW) == 0.5
    unread.load.requests += 1
    assert EngineQueues().saturation([unread, full], NOW) == 1.0
    assert EngineQueues().saturation([unread], NOW) == 0.0


@given(
    st.lists(st.integers(0, 300), min_size=1, max_size=5),
    st.integers(0, 50),
    st.sampled_from([(100, None), (None, 5000), (100, 5000)]),
)
def test_concurrency_is_what_is_open_of_what_may_be(
    loads: list[int], on_the_way: int, limits: tuple[int | None, int | None]
) -> None:
    requests, tokens = limits
    endpoints = [endpoint(load=load) for load in loads]
    expected = max(
        0.0 if requests is None else (sum(loads) + on_the_way) / (requests * len(loads)),
        0.0 if tokens is None else (100 * sum(loads) + 7 * on_the_way) / (tokens * len(loads)),
    )
    given = Concurrency(requests, tokens).saturation(endpoints, NOW, OnTheWay(on_the_way, 7 * on_the_way))
    assert given == pytest.approx(expected)
    assert Highest([Concurrency(requests, tokens), EngineQueues()]).saturation(
        endpoints, NOW, OnTheWay(on_the_way, 7 * on_the_way)
    ) == pytest.approx(expected)


def test_as_filters_they_take_out_full_endpoints_but_never_all() -> None:
    full, free, stale = endpoint("full", waiting=6, load=12), endpoint("free", load=1), endpoint("stale", age=9)
    utilization = Utilization(headroom=0.2, now=lambda: NOW)
    assert utilization.filter(request(), [full, free, stale]) == [free]
    assert utilization.filter(request(), [full, stale]) == [full, stale]
    assert utilization.filter(request(), [endpoint(waiting=5), stale]) != [endpoint(waiting=5), stale]
    assert Concurrency(10, headroom=0.1).filter(request(), [full, free]) == [free]
    assert Concurrency(10, headroom=0.3).filter(request(), [full, free]) == [full, free]
    assert Concurrency(None, 1200).filter(request(), [full]) == [full]


def test_shares_return_to_nothing() -> None:
    shares, endpoints = Shares(), [endpoint(name) for name in "abc"]
    for _ in range(10):
        shares.add(endpoints, 30, 1)
    shares.add(endpoints[:1], 5, 1)
    assert shares.of(endpoints).requests == pytest.approx(11)
    assert shares.of(endpoints[:1]).tokens == pytest.approx(105)
    shares.add(endpoints[:1], 5, -1)
    for _ in range(10):
        shares.add(endpoints, 30, -1)
    assert shares.of(endpoints) == OnTheWay()
    assert not shares.requests


# --- ceilings -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        (StaticLimit(0.7), [0.7, 0.7, 0.7]),
        (PriorityHoldback(0.4, 0.9), [0.9, 0.65, 0.4]),
        (PriorityHoldback(0.0, 1.0, "value"), [1.0, 0.1, 0.0]),
        (ExplicitHoldback({100: 0.95, 10: 0.5}), [0.95, 0.5, 0.0]),
    ],
)
def test_ceilings_by_priority(policy: UsageLimitPolicy, expected: list[float]) -> None:
    assert list(policy.ceilings(0.5, [100, 10, 0])) == pytest.approx(expected)


def test_a_single_priority_has_all_the_room() -> None:
    for policy in (PriorityHoldback(0.1, 0.9), PriorityHoldback(0.1, 0.9, "value")):
        assert list(policy.ceilings(0.5, [3])) == [0.9]
    assert list(SoftReflectiveCeiling().ceilings(2.0, [3])) == [1.0]


@pytest.mark.parametrize(("saturation", "opened"), [(0.3, 60), (0.5, 60), (0.75, 20), (0.9, 60 // 9), (1.0, 0)])
def test_the_soft_ceiling_opens_in_proportion(saturation: float, opened: int) -> None:
    """The lowest of two priorities reflects at 1 - saturation, and is then open (1 - s)/s of the time."""
    policy = SoftReflectiveCeiling()
    ceilings = [policy.ceilings(saturation, [1, 0]) for _ in range(60)]
    assert all(both[0] == 1.0 for both in ceilings)
    assert sum(both[1] > saturation for both in ceilings) == opened
