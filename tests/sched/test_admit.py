"""The way in: what is refused, with which numbers; and the early way out."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from quire.cache.groups import ALL_OF_THE_PAST, group_layers
from quire.cache.ledger import KVLedger
from quire.core.errors import ConfigError, InvalidParameter, PromptTooLong, QueueFull
from quire.core.request import Deadlines, EngineRequest
from quire.core.sampling import SamplingParams
from quire.sched.state import SchedulerLimits


def limits(**changes) -> SchedulerLimits:
    return SchedulerLimits(**{"max_num_seqs": 2, "max_num_batched_tokens": 8, "max_model_len": 40, **changes})


def request(name="r", prompt=(1, 2, 3), **more) -> EngineRequest:
    more.setdefault("sampling", SamplingParams(max_tokens=4, seed=0))
    return EngineRequest(request_id=name, prompt_token_ids=prompt, arrival_time=0.0, **more)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(num_blocks=st.integers(1, 450), length=st.integers(1, 90), max_num_seqs=st.integers(1, 60))
@example(num_blocks=300, length=12, max_num_seqs=200)  # three blocks are kept back, and so the last request
@example(num_blocks=303, length=12, max_num_seqs=200)
def test_a_plan_counts_the_sequences_that_are_let_in(driver_class, num_blocks, length, max_num_seqs):
    ledger = KVLedger(
        memory_available=0,
        weight_bytes=0,
        activation_bytes=0,
        kv_bytes_per_block=1,
        groups=group_layers({ALL_OF_THE_PAST: 1}, 100),
        step_tokens=100_000,
        block_size=4,
        longest=100,
        max_num_seqs=max_num_seqs,
    )
    bounds = limits(max_num_seqs=max_num_seqs, max_num_batched_tokens=100_000, max_model_len=100)
    driver = driver_class(bounds, num_blocks=num_blocks, block_size=4, cache=False)
    planned = ledger.num_sequences(length, num_blocks + 1)
    if not planned:
        with pytest.raises(PromptTooLong, match="KV cache holds"):
            driver.submit(request(prompt=[1] * length))
        return
    for index in range(planned + 3):
        driver.submit(request(name=str(index), prompt=[1] * length))
    assert len(driver.step().scheduled) == planned


def test_an_id_may_be_used_again_only_when_its_request_is_done(driver_class):
    driver = driver_class(limits(), num_blocks=8, block_size=4)
    driver.submit(request())
    with pytest.raises(InvalidParameter, match="'r' is in use") as caught:
        driver.submit(request())
    assert caught.value.param == "request_id"
    driver.finish()
    driver.submit(request())
    driver.finish()


def test_empty_prompt_is_refused(driver_class):
    driver = driver_class(limits(), num_blocks=8, block_size=4)
    with pytest.raises(InvalidParameter, match="empty"):
        driver.submit(request(prompt=()))
    assert not driver.state.has_work


def test_prompt_and_one_token_must_fit_the_context(driver_class):
    driver = driver_class(limits(max_model_len=10), num_blocks=8, block_size=4)
    with pytest.raises(PromptTooLong, match=r"10 tokens; the context holds 10"):
        driver.submit(request(prompt=[1] * 10))
    driver.submit(request(prompt=[1] * 9, sampling=SamplingParams(max_tokens=None, ignore_eos=True, seed=0)))
    driver.finish()
    driver.check_answers()
    assert driver.told["r"].last.finish_reason == "length"
    assert len(driver.told["r"].token_ids) == 1


def test_prompt_must_fit_the_cache_and_outgrowing_it_is_length(driver_class):
    driver = driver_class(limits(), num_blocks=3, block_size=4)
    with pytest.raises(PromptTooLong, match=r"13 tokens; the KV cache holds 12 \(3 blocks of 4\)"):
        driver.submit(request(prompt=[1] * 13))
    long = SamplingParams(max_tokens=None, ignore_eos=True, seed=0)
    driver.submit(request(prompt=[1] * 8, sampling=long))
    driver.submit(request(name="other", prompt=[2] * 8, sampling=long))
    driver.finish()
    driver.check_answers()
    assert driver.told["r"].last.finish_reason == "length"
    assert len(driver.told["r"].token_ids) == 5


def test_queue_holds_so_many_requests_besides_those_that_can_run(driver_class):
    driver = driver_class(limits(max_num_queued_reqs=3), num_blocks=20, block_size=4)
    for number in range(5):
        driver.submit(request(f"r{number}"))
    with pytest.raises(QueueFull, match="3 requests are waiting; at most 3 may") as caught:
        driver.submit(request("one more"))
    assert caught.value.retry_after >= 1.0
    driver.step()
    with pytest.raises(QueueFull):
        driver.submit(request("one more"))
    driver.cancel("r4")
    driver.submit(request("one more"))
    driver.finish()


def test_queue_holds_so_many_tokens(driver_class):
    driver = driver_class(limits(max_num_queued_tokens=10), num_blocks=20, block_size=4)
    driver.submit(request("longer than the cap", prompt=[1] * 12))
    driver.step()
    driver.step()
    driver.submit(request("a", prompt=[1] * 6))
    with pytest.raises(QueueFull, match="6 tokens are waiting and the prompt has 5; at most 10"):
        driver.submit(request("b", prompt=[1] * 5))
    driver.submit(request("b", prompt=[1] * 4))
    assert driver.state.num_waiting_tokens == 10
    driver.finish()


def test_retry_after_follows_the_pace(driver_class):
    driver = driver_class(limits(max_num_queued_reqs=4, max_num_seqs=1), num_blocks=20, block_size=4)
    for number in range(4):
        driver.submit(request(f"r{number}", prompt=[1] * 24))
    driver.step()
    driver.submit(request("r4", prompt=[1] * 24))
    with pytest.raises(QueueFull) as caught:
        driver.submit(request("one more"))
    assert caught.value.retry_after == pytest.approx(4 * 24 / 8)


def test_cancel_frees_everything_wherever_the_request_is(driver_class):
    one = limits(max_num_seqs=2, swap="swap")
    driver = driver_class(one, num_blocks=5, block_size=2, host_blocks=8)
    long = SamplingParams(max_tokens=7, ignore_eos=True, seed=0)
    for name in ("first", "second", "third"):
        driver.submit(request(name, prompt=[len(name), 2, 3], sampling=long))
    while not driver.state.swapped:
        driver.step()
    assert set(driver.state.swapped) == {"second"}
    assert {item.request_id for item in driver.state.waiting} == {"third"}
    for name in ("second", "first", "third"):
        assert driver.cancel(name).request_id == name
        assert driver.cancel(name) is None
        driver.state.check_integrity()
    assert driver.state.pool.num_free == 5
    assert driver.state.swap_pool.num_free == 8
    assert not driver.state.has_work


def test_deadlines_of_ended_requests_take_bounded_memory(driver_class):
    driver = driver_class(limits(), num_blocks=8, block_size=4)
    for _ in range(1000):
        driver.submit(request(deadlines=Deadlines(total_ms=1e9, queue_ms=1e9, ttft_ms=1e9)))
        driver.cancel("r")
    assert len(driver.state.deadlines.entries) < 100


@pytest.mark.parametrize("name", ["max_num_seqs", "max_num_batched_tokens", "max_model_len"])
def test_limits_of_zero_are_refused(name):
    with pytest.raises(ConfigError, match=f"{name} is 0"):
        limits(**{name: 0})
