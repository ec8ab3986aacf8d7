"""Who goes first, and what that adds up to."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quire.core.errors import ConfigError
from quire.core.request import EngineRequest
from quire.core.sampling import SamplingParams
from quire.sched.policy import GENERATED_WEIGHT, PROMPT_WEIGHT, Service, policies
from quire.sched.state import SchedulerLimits


def limits(**changes) -> SchedulerLimits:
    return SchedulerLimits(
        **{"max_num_seqs": 4, "max_num_batched_tokens": 16, "max_model_len": 64, "eos_token_ids": (6,), **changes}
    )


def request(number, *, arrival=0.0, length=4, max_tokens=6, **more) -> EngineRequest:
    return EngineRequest(
        request_id=f"r{number}",
        prompt_token_ids=[number % 5, *[1] * (length - 1)],
        sampling=SamplingParams(max_tokens=max_tokens, ignore_eos=True, seed=0),
        arrival_time=arrival,
        **more,
    )


def order_of_first_tokens(driver) -> list[str]:
    order = []
    for step in driver.steps:
        for chunk in step.scheduled:
            if chunk.state.request_id not in order:
                order.append(chunk.state.request_id)
    return order


@given(arrivals=st.lists(st.integers(0, 9), min_size=1, max_size=15))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_fcfs_schedules_in_order_of_arrival(driver_class, arrivals):
    driver = driver_class(limits(scheduling_policy="fcfs"), num_blocks=12, block_size=4)
    for number, arrival in enumerate(arrivals):
        driver.submit(request(number, arrival=arrival))
    driver.finish()
    expected = sorted(range(len(arrivals)), key=lambda number: (arrivals[number], number))
    assert order_of_first_tokens(driver) == [f"r{number}" for number in expected]


@given(priorities=st.lists(st.integers(-3, 3), min_size=1, max_size=15))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_priority_schedules_the_lowest_number_first(driver_class, priorities):
    driver = driver_class(limits(scheduling_policy="priority"), num_blocks=12, block_size=4)
    for number, priority in enumerate(priorities):
        driver.submit(request(number, priority=priority))
    driver.finish()
    expected = sorted(range(len(priorities)), key=lambda number: (priorities[number], number))
    assert order_of_first_tokens(driver) == [f"r{number}" for number in expected]


@pytest.mark.parametrize(
    ("policy", "changes", "victim"),
    [
        ("fcfs", {"r0": {"arrival": 5.0}, "r1": {"arrival": 1.0}}, "r0"),
        ("priority", {"r0": {"priority": 0}, "r1": {"priority": 7}}, "r1"),
        ("priority", {"r0": {"priority": 7}, "r1": {"priority": 0}}, "r0"),
        ("fair", {"r0": {"tenant": "greedy", "length": 6}, "r1": {"tenant": "modest", "length": 4}}, "r0"),
    ],
)
def test_blocks_are_taken_from_the_one_that_ranks_last(driver_class, policy, changes, victim):
    driver = driver_class(limits(scheduling_policy=policy), num_blocks=12, block_size=1, cache=False)
    for number in range(2):
        driver.submit(request(number, max_tokens=7, **changes[f"r{number}"]))
    while not driver.state.totals.preemptions:
        driver.step()
    assert [preemption.state.request_id for preemption in driver.decisions[-1].preempted] == [victim]
    driver.finish()
    driver.check_answers()


@given(
    loads=st.tuples(st.integers(1, 8), st.integers(1, 8)),
    lengths=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    outputs=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    num_blocks=st.integers(8, 30),
    max_num_seqs=st.integers(1, 6),
)
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_tenants_with_unequal_load_get_equal_shares(driver_class, loads, lengths, outputs, num_blocks, max_num_seqs):
    """While both have requests waiting, what they were served differs by no more than what is in flight."""
    driver = driver_class(limits(max_num_seqs=max_num_seqs), num_blocks=num_blocks, block_size=4)
    count = 0
    one = max(PROMPT_WEIGHT * length + GENERATED_WEIGHT * output for length, output in zip(lengths, outputs))
    for _ in range(40):
        for tenant, load, length, output in zip("ab", loads, lengths, outputs):
            waiting = sum(1 for item in driver.state.waiting if item.request.tenant == tenant)
            for _ in range(waiting, max_num_seqs + load):
                driver.submit(request(count, arrival=driver.now, length=length, max_tokens=output, tenant=tenant))
                count += 1
        driver.step()
        served = {tenant: served_to(driver, tenant) for tenant in "ab"}
        assert abs(served["a"] - served["b"]) <= (max_num_seqs + 1) * one
        assert driver.state.service.tokens == served


def served_to(driver, tenant: str) -> float:
    """Weighted tokens, counted from what was scheduled and told."""
    total = 0.0
    seen = {chunk.state.request_id: chunk.state for step in driver.steps for chunk in step.scheduled}
    for request_id, item in seen.items():
        if item.request.tenant == tenant:
            total += PROMPT_WEIGHT * (item.num_prompt_tokens - item.num_cached_tokens)
            total += GENERATED_WEIGHT * len(driver.told[request_id].token_ids)
    return total


def test_fairness_starts_when_a_tenant_is_named(driver_class):
    driver = driver_class(limits(max_num_seqs=1), num_blocks=12, block_size=4)
    for number in range(6):
        driver.submit(request(number, arrival=number))
    driver.step()
    assert driver.state.policy_name == "fcfs"
    driver.submit(request(6, arrival=6.0, tenant="late"))
    assert driver.state.policy_name == "fair"
    driver.finish()
    assert order_of_first_tokens(driver)[:2] == ["r0", "r6"]
    driver.check_answers()


def test_a_chosen_policy_stays_when_a_tenant_is_named(driver_class):
    driver = driver_class(limits(max_num_seqs=1, scheduling_policy="fcfs"), num_blocks=12, block_size=4)
    for number in range(4):
        driver.submit(request(number, arrival=number, tenant="x" if number == 3 else ""))
    driver.finish()
    assert order_of_first_tokens(driver) == ["r0", "r1", "r2", "r3"]


def test_idle_tenants_earn_no_credit():
    service = Service()
    service.arrive("busy")
    service.charge("busy", 1000.0)
    service.arrive("late")
    assert service.tokens["late"] == 1000.0
    service.charge("late", 50.0)
    service.leave("late")
    service.charge("busy", 10.0)
    service.arrive("late")
    assert service.tokens["late"] == 1050.0
    service.leave("late")
    service.leave("busy")
    service.arrive("third")
    assert service.tokens["third"] >= 1010.0


def test_counters_of_tenants_that_left_are_bounded():
    service = Service()
    service.arrive("steady")
    for number in range(10_000):
        service.arrive(f"t{number}")
        service.charge(f"t{number}", float(number % 100 + 1))
        service.leave(f"t{number}")
    assert len(service.tokens) <= 2 * service.num_idle_kept + 3
    assert service.tokens["steady"] == 0.0


def test_unknown_policy_is_named_with_the_known_ones(driver_class):
    with pytest.raises(ConfigError, match=r"'lottery'.*fair, fcfs, priority"):
        driver_class(limits(scheduling_policy="lottery"), num_blocks=4, block_size=4)
    assert policies().names() == ["fair", "fcfs", "priority"]
