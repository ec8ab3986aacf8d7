"""The circuit breaker, the guard over all of them, and what may be done twice."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quire.gateway.endpoint import Endpoint, Pool
from quire.gateway.plugin import Conclusion
from quire.gateway.request import Api, InferenceRequest, Outcome
from quire.gateway.resilience.breaker import Breaker, State
from quire.gateway.resilience.budget import Budget
from quire.gateway.resilience.guard import Guard
from quire.gateway.resilience.hedge import ENOUGH, Hedging
from quire.gateway.resilience.settings import ResilienceSettings

SETTINGS = ResilienceSettings()
REQUEST = InferenceRequest(id="r", path="/x", api=Api.OTHER, model="m", body=b"", headers={}, arrived=0.0)
OK = Outcome(status=200)
BROKEN = Outcome(status=None, error="reset")
LEFT = Outcome(status=None, error="cancelled")


class Time:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def guard(count: int) -> tuple[Guard, list[Endpoint], Time]:
    pool, time = Pool(), Time()
    endpoints = [pool.put(Endpoint(f"e{index}", "h", index)) for index in range(count)]
    return Guard(pool=pool, clock=time), endpoints, time


def attempt(watch: Guard, endpoint: Endpoint, outcome: Outcome) -> None:
    watch.sent(REQUEST, endpoint, Conclusion([endpoint]))
    watch.finished(REQUEST, endpoint, outcome)


def test_failures_in_a_row_eject_and_one_probe_decides() -> None:
    watch, (first, _), time = guard(2)
    for _ in range(SETTINGS.consecutive_failures):
        assert first.available
        attempt(watch, first, BROKEN)
    assert not first.available
    time.now = SETTINGS.ejection - 0.01
    watch.step()
    assert not first.available
    time.now = SETTINGS.ejection
    watch.step()
    assert first.available
    watch.sent(REQUEST, first, Conclusion([first]))
    assert not first.available  # the probe is out, and is alone
    watch.finished(REQUEST, first, OK)
    assert first.available


def test_a_long_answer_closes_with_its_first_byte() -> None:
    watch, (first, _), time = guard(2)
    for _ in range(SETTINGS.consecutive_failures):
        attempt(watch, first, BROKEN)
    time.now = SETTINGS.ejection
    watch.step()
    watch.sent(REQUEST, first, Conclusion([first]))
    watch.first_byte(REQUEST, first, 0.1)
    assert first.available


def test_a_probe_whose_client_left_says_nothing() -> None:
    watch, (first, _), time = guard(2)
    for _ in range(SETTINGS.consecutive_failures):
        attempt(watch, first, BROKEN)
    time.now = SETTINGS.ejection
    watch.step()
    attempt(watch, first, LEFT)
    assert first.available
    attempt(watch, first, BROKEN)
    assert not first.available


def test_each_failed_probe_doubles_the_wait() -> None:
    watch, (first, _), time = guard(2)
    waits = []
    for _ in range(SETTINGS.consecutive_failures):
        attempt(watch, first, BROKEN)
    for _ in range(8):
        breaker = watch.breaker(first)
        assert breaker is not None
        waits.append(breaker.reopens_at - time.now)
        time.now = breaker.reopens_at
        watch.step()
        attempt(watch, first, BROKEN)
    assert waits == [2, 4, 8, 16, 32, 60, 60, 60]


def test_a_share_of_failures_ejects() -> None:
    watch, (first, _), time = guard(2)
    for index in range(100):
        time.now += 0.01
        attempt(watch, first, OK if index % 3 == 0 else BROKEN)
        if not first.available:
            break
    assert 20 <= index + 1 <= 21


@pytest.mark.parametrize(
    "outcome",
    [
        Outcome(status=500),
        Outcome(status=429),
        Outcome(status=400),
        LEFT,
        Outcome(status=None, error="connections"),
    ],
)
def test_what_the_endpoint_is_not_to_blame_for(outcome: Outcome) -> None:
    watch, (first, _), _ = guard(2)
    for _ in range(100):
        attempt(watch, first, outcome)
    assert first.available


def test_one_alone_is_never_ejected_and_never_more_than_the_share() -> None:
    for count in range(1, 8):
        watch, endpoints, _ = guard(count)
        for endpoint in endpoints:
            for _ in range(50):
                attempt(watch, endpoint, BROKEN)
        assert sum(not endpoint.available for endpoint in endpoints) == count // 2


def test_one_bad_look_is_not_unhealthy() -> None:
    watch, (only,), _ = guard(1)
    for _ in range(10):
        watch.looked(only, healthy=False)
        watch.looked(only, healthy=False)
        assert only.available
        watch.looked(only, healthy=True)
    for _ in range(3):
        watch.looked(only, healthy=False)
    assert not only.available
    watch.looked(only, healthy=False)
    assert not only.available
    watch.looked(only, healthy=True)
    assert only.available


def test_whoever_answers_is_alive() -> None:
    watch, (only,), _ = guard(1)
    for _ in range(20):
        watch.looked(only, healthy=False)
        watch.looked(only, healthy=False)
        watch.sent(REQUEST, only, Conclusion([only]))
        watch.first_byte(REQUEST, only, 0.1)
        assert only.available


def test_whoever_left_is_forgotten_and_starts_anew() -> None:
    watch, (first, _), _ = guard(2)
    for _ in range(10):
        attempt(watch, first, BROKEN)
    watch.pool.remove(first.key)
    watch.finished(REQUEST, first, BROKEN)  # one that was still open
    fresh = watch.pool.put(Endpoint("e0", "h", 0))
    assert fresh.available
    assert watch.breaker(fresh).state is State.CLOSED


events = st.lists(
    st.tuples(st.floats(0, 5), st.sampled_from(["ok", "fail", "left", "send", "step"])), min_size=1, max_size=200
)


@given(events)
def test_whatever_happens_it_comes_back(happenings: list[tuple[float, str]]) -> None:
    breaker, now = Breaker(SETTINGS), 0.0
    for seconds, what in happenings:
        now += seconds
        match what:
            case "ok":
                breaker.succeeded(now)
            case "fail":
                if breaker.failed(now):
                    breaker.open(now)
            case "left":
                breaker.undecided()
            case "send":
                if breaker.lets_through:
                    breaker.probe()
            case _:
                breaker.step(now)
        if breaker.state is State.OPEN:
            assert breaker.reopens_at - now <= SETTINGS.max_ejection
        assert len(breaker._slices) <= 12
        assert not breaker.probing or breaker.state is State.HALF_OPEN
    now = max(now, breaker.reopens_at)
    breaker.step(now)
    if breaker.state is State.HALF_OPEN:
        breaker.undecided()
        breaker.probe()
        breaker.succeeded(now)
    assert breaker.state is State.CLOSED
    assert breaker.lets_through


@given(st.lists(st.booleans(), max_size=300), st.floats(0, 1), st.integers(0, 20))
def test_a_budget_is_kept(asks: list[bool], share: float, burst: int) -> None:
    budget, requests, spent = Budget(share=share, burst=burst), 0, 0
    for ask in asks:
        if ask and budget.allows:
            budget.spend()
            spent += 1
        elif not ask:
            budget.earn()
            requests += 1
        assert spent <= burst + share * requests + 1e-6
    if not any(asks) and burst >= 1:
        assert budget.allows


def test_hedging_learns_when_most_have_begun() -> None:
    hedging = Hedging(ResilienceSettings(hedge_quantile=0.9))
    assert hedging.delay() is None
    for index in range(ENOUGH * 10):
        hedging.saw((index % 100) / 100)
    assert 0.85 <= hedging.delay() <= 0.95
    floor = Hedging(ResilienceSettings(hedge_quantile=0.9, hedge_delay=5.0))
    for _ in range(ENOUGH):
        floor.saw(0.1)
    assert floor.delay() == 5.0
    assert Hedging(ResilienceSettings(hedge_delay=0.2)).delay() == 0.2
    assert Hedging(ResilienceSettings()).delay() is None
