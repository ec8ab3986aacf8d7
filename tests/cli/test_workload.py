"""What benchmarks send, and when."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quire.cli.bench.workload import WORDS, Workload, arrival_times, make_requests, parse_slos
from quire.core.errors import ConfigError

WORKLOADS = st.builds(
    Workload,
    kind=st.sampled_from(["random", "shared-prefix"]),
    num_prompts=st.integers(1, 20),
    input_len=st.integers(1, 50),
    output_len=st.integers(1, 50),
    range_ratio=st.floats(0, 0.99),
    prefix_len=st.integers(1, 20),
    num_prefixes=st.integers(1, 5),
    vocab_size=st.integers(1, 1000),
    seed=st.integers(0, 2**32),
)


@given(WORKLOADS, st.sampled_from(["token-ids", "text"]))
def test_lengths_are_within_their_range_and_prompts_within_the_vocabulary(workload, prompt_format):
    requests = make_requests(workload, prompt_format)
    assert requests == make_requests(workload, prompt_format)
    assert len(requests) == workload.num_prompts
    prefix_len = workload.prefix_len if workload.kind == "shared-prefix" else 0
    for request in requests:
        units = request.prompt.split() if prompt_format == "text" else request.prompt
        known = set(WORDS) if prompt_format == "text" else range(workload.vocab_size)
        assert all(unit in known for unit in units)
        for length, mean in ((len(units) - prefix_len, workload.input_len), (request.output_len, workload.output_len)):
            low, high = mean * (1 - workload.range_ratio), mean * (1 + workload.range_ratio)
            assert max(1, math.floor(low)) <= length <= math.ceil(high)


@given(WORKLOADS)
def test_shared_prefixes_are_shared_by_as_many_groups_as_asked_for(workload):
    requests = make_requests(workload)
    if workload.kind == "shared-prefix":
        for index, request in enumerate(requests):
            first = requests[index % workload.num_prefixes]
            assert request.prompt[: workload.prefix_len] == first.prompt[: workload.prefix_len]


def test_another_seed_gives_other_prompts():
    one, two = (make_requests(Workload(num_prompts=2, input_len=50, output_len=1, seed=seed)) for seed in (0, 1))
    assert one != two


@given(st.integers(1, 200), st.floats(0.01, 1e4), st.floats(0.05, 20), st.integers(0, 2**32))
def test_arrivals_are_ordered_and_repeatable(count, rate, burstiness, seed):
    times = arrival_times(count, rate, burstiness, seed)
    assert len(times) == count
    assert (np.diff(times) >= 0).all()
    assert times[0] >= 0
    assert (times == arrival_times(count, rate, burstiness, seed)).all()


@settings(max_examples=20)
@given(st.floats(0.1, 100), st.sampled_from([0.25, 0.5, 1.0, 2.0, 4.0]), st.integers(0, 1000))
def test_gaps_have_the_mean_and_the_spread_that_were_asked_for(rate, burstiness, seed):
    count = 20_000
    gaps = np.diff(arrival_times(count, rate, burstiness, seed), prepend=0.0)
    # Gamma with shape k: coefficient of variation 1/sqrt(k); the mean's own error is that over sqrt(count).
    spread = 1 / math.sqrt(burstiness)
    assert gaps.mean() * rate == pytest.approx(1.0, abs=6 * spread / math.sqrt(count))
    assert gaps.std() * rate == pytest.approx(spread, rel=0.15)


def test_an_infinite_rate_sends_everything_at_once():
    assert (arrival_times(5, math.inf, 1.0, 0) == 0).all()


@pytest.mark.parametrize(
    ("rate", "burstiness"), [(0.0, 1.0), (-1.0, 1.0), (math.nan, 1.0), (1.0, 0.0), (1.0, math.inf), (1.0, math.nan)]
)
def test_a_rate_or_burstiness_without_meaning_is_refused(rate, burstiness):
    with pytest.raises(ConfigError):
        arrival_times(3, rate, burstiness, 0)


@pytest.mark.parametrize(
    "wrong",
    [
        {"num_prompts": 0},
        {"input_len": 0},
        {"output_len": -1},
        {"range_ratio": 1.0},
        {"range_ratio": -0.1},
        {"num_prefixes": 0},
        {"vocab_size": 0},
        {"kind": "shared-prefix", "prefix_len": 0},
    ],
)
def test_a_workload_without_meaning_is_refused(wrong):
    with pytest.raises(ConfigError, match="--"):
        Workload(**{"num_prompts": 1, "input_len": 1, "output_len": 1, **wrong})


def test_limits_are_read_by_metric():
    assert parse_slos(["ttft=500", "tpot=2.5"]) == {"ttft": 500.0, "tpot": 2.5}


@pytest.mark.parametrize("text", ["ttft", "ttft=", "ttft=x", "ttft=0", "ttft=-1", "ttft=nan", "speed=3", "=3"])
def test_a_limit_without_meaning_is_refused(text):
    with pytest.raises(ConfigError, match="--slo"):
        parse_slos([text])
