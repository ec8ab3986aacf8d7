"""Latencies, percentiles and goodput against numpy and against counting by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from quire.cli.bench.statistics import (
    Record,
    e2e_ms,
    goodput,
    itls_ms,
    meets,
    summarise,
    tpot_ms,
    ttft_ms,
)

SECONDS = st.floats(0, 1e3)


@st.composite
def records(draw) -> Record:
    start = draw(st.floats(0, 1e6))
    gaps = draw(st.lists(st.floats(0, 10), max_size=8))
    times = [start + sum(gaps[: i + 1]) for i in range(len(gaps))]
    return Record(
        start=start,
        token_times=times,
        end=times[-1] if times else start + draw(st.floats(0, 10)),
        output_tokens=len(times),
        error=draw(st.sampled_from([None, None, None, "broken"])),
    )


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=50))
def test_percentiles_are_linear_interpolations_of_the_sorted_values(values):
    summary = summarise(values)
    ordered = sorted(values)

    def by_hand(q: float) -> float:
        position = q / 100 * (len(ordered) - 1)
        low, high = math.floor(position), math.ceil(position)
        return ordered[low] + (ordered[high] - ordered[low]) * (position - low)

    assert summary.count == len(values)
    assert summary.mean == pytest.approx(sum(values) / len(values))
    assert (summary.p50, summary.p90, summary.p99) == pytest.approx((by_hand(50), by_hand(90), by_hand(99)))
    assert ordered[0] <= summary.p50 <= summary.p90 <= summary.p99 <= ordered[-1] * (1 + 1e-9)


def test_nothing_measured_has_no_percentiles():
    summary = summarise([])
    assert (summary.count, summary.mean, summary.p99) == (0, None, None)


@given(records())
def test_ttft_and_the_gaps_make_up_the_whole_time(record):
    assert ttft_ms(record) + sum(itls_ms(record)) == pytest.approx(e2e_ms(record), abs=1e-3)
    assert len(itls_ms(record)) == max(0, len(record.token_times) - 1)


@given(records())
def test_tpot_is_the_mean_gap_when_every_event_carries_one_token(record):
    if len(record.token_times) < 2:
        assert tpot_ms(record) is None
    else:
        assert tpot_ms(record) == pytest.approx(np.mean(itls_ms(record)), abs=1e-3)


def test_tpot_counts_tokens_not_events():
    record = Record(start=0.0, token_times=[1.0, 3.0], end=3.0, output_tokens=5)
    assert tpot_ms(record) == pytest.approx(2000 / 4)
    assert itls_ms(record) == [2000.0]


@given(st.lists(records(), max_size=20), st.floats(1, 1e4), st.floats(1, 1e4), st.floats(0.1, 100))
def test_goodput_counts_requests_within_every_limit(many, ttft, tpot, duration):
    slos = {"ttft": ttft, "tpot": tpot}
    good = 0
    for record in many:
        if record.error is None and ttft_ms(record) <= ttft and (tpot_ms(record) or 0.0) <= tpot:
            good += 1
    assert goodput(many, slos, duration) == pytest.approx(good / duration)


@given(records(), st.dictionaries(st.sampled_from(["ttft", "tpot", "itl", "e2e"]), st.floats(1e-3, 1e5)))
def test_looser_limits_are_met_by_whatever_met_tighter_ones(record, slos):
    if meets(record, slos):
        assert meets(record, {name: 2 * limit for name, limit in slos.items()})
    if record.error is not None:
        assert not meets(record, slos)


def test_no_time_gives_no_goodput():
    assert goodput([], {}, 0.0) == 0.0
