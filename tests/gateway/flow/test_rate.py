"""When callers are told to come back."""

from __future__ import annotations

import pytest

from quire.gateway.flow.rate import DispatchRate


@pytest.mark.parametrize("per_second", [0.5, 4.0, 50.0])
@pytest.mark.parametrize("seconds", [20, 120])
def test_a_steady_rate_is_seen_from_the_beginning_on(per_second: float, seconds: int) -> None:
    rate = DispatchRate(100.0)
    for number in range(int(per_second * seconds)):
        rate.add(100.0 + number / per_second)
    assert rate.per_second(100.0 + seconds) == pytest.approx(per_second, rel=0.15)


def test_a_caller_comes_back_when_those_before_it_are_gone() -> None:
    rate = DispatchRate(0.0)
    for number in range(1200):
        rate.add(number / 10)
    now = 120.0
    assert rate.retry_after(0, now) == 1.0
    assert rate.retry_after(5, now) == 1.0
    assert rate.retry_after(200, now) == pytest.approx(20, abs=1)
    assert rate.retry_after(5000, now) == 60.0
    assert rate.retry_after(200, now + 10.0) > rate.retry_after(200, now)
    assert rate.retry_after(1, now + 10_000.0) == 60.0


def test_where_nothing_ever_went_it_is_a_minute() -> None:
    assert DispatchRate(0.0).retry_after(1, 0.0) == 60.0
