"""How a pool fares under the default policy, beside round robin and the fewest open requests. Ratios, on a simulated
clock and with fixed seeds: every run gives the same numbers."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest

PREFIXES = 32
PREFIX = 6000
QUARTER = PREFIXES * PREFIX // 4
"""Tokens of a quarter of all prefixes."""


def servers(simulation: ModuleType, *factors: float, cache: float = 1.25, reports: str = "vllm") -> list[Any]:
    room = int(QUARTER * cache)
    return [
        simulation.Server(speed=simulation.Speed().times(factor), cache_tokens=room, reports=reports)
        for factor in factors or (1.0,) * 4
    ]


def shared(simulation: ModuleType, rate: float, count: int, seed: int = 1, **more: object) -> list[Any]:
    shape = {"prefixes": PREFIXES, "prefix_tokens": PREFIX, "own_tokens": 400, "output_tokens": 60}
    arrivals: list[Any] = simulation.poisson(rate, count, seed=seed, **(shape | more))
    return arrivals


@pytest.mark.parametrize("reports", ["nothing", "vllm", "quire"])
def test_shared_prefixes_near_the_saturation_of_round_robin(simulation: ModuleType, reports: str) -> None:
    pool, load = servers(simulation, reports=reports), shared(simulation, 11, 700)
    mine = simulation.simulate("default", pool, load, warm=150)
    theirs = simulation.simulate("round-robin", pool, load, warm=150)
    assert theirs.ttft(0.9) > 4 * mine.ttft(0.9)
    assert mine.mean_latency < 0.5 * theirs.mean_latency
    assert mine.hit_rate > 2.5 * theirs.hit_rate


@pytest.mark.parametrize("rate", [20, 40])
def test_beyond_it_prefixes_stay_where_they_are_and_throughput_follows_the_load(
    simulation: ModuleType, rate: int
) -> None:
    """A policy that looks only at a request's own wait loses all prefixes here: it does no better than round robin."""
    pool, load = servers(simulation), shared(simulation, rate, 600, seed=2)
    mine = simulation.simulate("default", pool, load, warm=100)
    theirs = simulation.simulate("round-robin", pool, load, warm=100)
    fewest = simulation.simulate("least-loaded", pool, load, warm=100)
    assert mine.throughput > 1.5 * max(theirs.throughput, fewest.throughput)
    assert 10 * mine.ttft(0.9) < min(theirs.ttft(0.9), fewest.ttft(0.9))
    assert mine.hit_rate > 0.8


def test_engines_that_share_cores(simulation: ModuleType) -> None:
    """Four engines on two cores: what one computes in vain, all wait for."""
    pool, load = servers(simulation), shared(simulation, 7, 500)
    mine = simulation.simulate("default", pool, load, warm=100, cores=2)
    theirs = simulation.simulate("round-robin", pool, load, warm=100, cores=2)
    assert theirs.ttft(0.9) > 4 * mine.ttft(0.9)


def test_answers_that_are_not_streamed(simulation: ModuleType) -> None:
    pool, load = servers(simulation), shared(simulation, 25, 500, stream=False)
    mine = simulation.simulate("default", pool, load, warm=100)
    theirs = simulation.simulate("round-robin", pool, load, warm=100)
    assert theirs.mean_latency > 5 * mine.mean_latency


def test_long_answers(simulation: ModuleType) -> None:
    pool, load = servers(simulation), shared(simulation, 15, 400, output_tokens=500)
    mine = simulation.simulate("default", pool, load, warm=50)
    theirs = simulation.simulate("round-robin", pool, load, warm=50)
    assert mine.throughput > 1.3 * theirs.throughput
    assert theirs.ttft(0.9) > 4 * mine.ttft(0.9)


# --- where there is nothing to win ----------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [1, 4])
def test_nothing_shared_is_no_worse_than_counting(simulation: ModuleType, rate: int) -> None:
    pool = servers(simulation)
    load = simulation.poisson(rate, 400, own_tokens=6400, output_tokens=100)
    mine = simulation.simulate("default", pool, load, warm=20)
    for other in ("least-loaded", "round-robin"):
        theirs = simulation.simulate(other, pool, load, warm=20)
        assert mine.mean_latency < 1.05 * theirs.mean_latency
        assert mine.throughput > 0.95 * theirs.throughput
        if other == "least-loaded":
            assert mine.ttft(0.9) < 1.05 * theirs.ttft(0.9)
    assert all(0.2 < mine.share(f"e{index}") < 0.3 for index in range(4))


def test_at_low_load_a_prefix_is_used_and_no_endpoint_is_idle(simulation: ModuleType) -> None:
    pool, load = servers(simulation), shared(simulation, 1, 300)
    mine = simulation.simulate("default", pool, load, warm=60)
    theirs = simulation.simulate("least-loaded", pool, load, warm=60)
    assert mine.ttft(0.5) < 0.2 * theirs.ttft(0.5)
    assert mine.mean_latency < theirs.mean_latency
    assert all(0.1 < mine.share(f"e{index}") < 0.4 for index in range(4))


def test_a_burst_of_one_new_prefix_spreads(simulation: ModuleType) -> None:
    load = [
        simulation.Arrival(
            time=8.0 * burst + 0.001 * index, prefix=burst, prefix_tokens=6000, own_tokens=400, output_tokens=50
        )
        for burst in range(10)
        for index in range(16)
    ]
    mine = simulation.simulate("default", servers(simulation), load)
    theirs = simulation.simulate("least-loaded", servers(simulation), load)
    assert mine.ttft(0.9) < 1.05 * theirs.ttft(0.9)
    assert all(0.15 < mine.share(f"e{index}") < 0.35 for index in range(4))


# --- hardware that differs ------------------------------------------------------------------------------------------


def test_half_the_speed_gets_about_half_the_work(simulation: ModuleType) -> None:
    pool = servers(simulation, 1.0, 1.0, 1.0, 0.5)
    load = simulation.poisson(6.5, 700, own_tokens=6400, output_tokens=100)
    mine = simulation.simulate("default", pool, load, warm=100)
    theirs = simulation.simulate("round-robin", pool, load, warm=100)
    fewest = simulation.simulate("least-loaded", pool, load, warm=100)
    fast = sum(mine.share(f"e{index}") for index in range(3)) / 3
    assert 0.3 * fast < mine.share("e3") < 0.7 * fast
    assert theirs.ttft(0.9) > 4 * mine.ttft(0.9)
    assert mine.ttft(0.9) < 1.05 * fewest.ttft(0.9)


def test_prefixes_on_hardware_that_differs(simulation: ModuleType) -> None:
    pool, load = servers(simulation, 1.0, 1.0, 1.0, 0.5), shared(simulation, 25, 500)
    mine = simulation.simulate("default", pool, load, warm=100)
    fewest = simulation.simulate("least-loaded", pool, load, warm=100)
    assert mine.throughput > 1.5 * fewest.throughput
    assert fewest.ttft(0.9) > 4 * mine.ttft(0.9)


def test_a_run_gives_the_same_numbers_again(simulation: ModuleType) -> None:
    pool, load = servers(simulation), shared(simulation, 11, 150)
    first, second = (simulation.simulate("default", pool, load) for _ in range(2))
    assert first == second
