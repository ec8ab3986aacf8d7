"""Any schedule gives each request what it gets alone; `Driver` and `FakeModel` check blocks and contexts on the way."""

from __future__ import annotations

from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from quire.cache.groups import ALL_OF_THE_PAST, Sight
from quire.core.errors import DeadlineExceeded, PromptTooLong, QueueFull
from quire.core.request import Deadlines, EngineRequest, FinishReason
from quire.core.sampling import SamplingParams
from quire.sched.state import SchedulerLimits

STEMS = [(0, 1, 2, 3, 4, 5, 0, 1), (0, 1, 2, 3, 1, 1, 1, 1), (5, 4)]

ALL = ALL_OF_THE_PAST
SIGHTS = [
    (ALL,),
    (Sight(window=5),),
    (Sight(chunk=8),),
    (ALL, ALL),
    (ALL, Sight(window=3), Sight(window=3)),
    (ALL, Sight(window=1)),
    (ALL, Sight(chunk=4)),
    (ALL, Sight(window=9), Sight(chunk=8)),
]
"""What the layers of each group see: one group, and several."""

samplings = st.builds(
    lambda max_tokens, min_tokens, ignore_eos, stop, logprobs, prompt_logprobs: SamplingParams(
        max_tokens=max_tokens,
        min_tokens=min(min_tokens, max_tokens or min_tokens),
        ignore_eos=ignore_eos,
        stop_token_ids=stop,
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        seed=0,
    ),
    st.sampled_from([20, 14, 9, 5, 1, None]),
    st.integers(0, 6),
    st.sampled_from([True, True, True, False]),
    st.sampled_from([(), (), (), (3,), (6,)]),
    st.sampled_from([None, 0]),
    st.sampled_from([None, None, None, 0]),
)

prompts = st.builds(
    lambda stem, cut, tail: (*stem[:cut], *tail) or (0,),
    st.sampled_from(STEMS),
    st.integers(0, 8),
    st.lists(st.integers(0, 2), max_size=5),
)


@st.composite
def arrivals(draw, *, with_deadlines: bool = False):
    """(step of arrival, request, step of cancellation or None), by arrival."""
    moments = sorted(draw(st.lists(st.integers(0, 12), min_size=1, max_size=12)))
    limit = st.sampled_from([None, None, 2000.0, 7500.0, 20000.0]) if with_deadlines else st.none()
    made = []
    for number, moment in enumerate(moments):
        request = EngineRequest(
            request_id=f"r{number}",
            prompt_token_ids=draw(prompts),
            sampling=draw(samplings),
            arrival_time=float(moment),
            priority=draw(st.integers(-1, 1)),
            tenant=draw(st.sampled_from(["", "", "a", "b"])),
            cache_salt=draw(st.sampled_from(["", "", "", "salt"])),
            deadlines=Deadlines(total_ms=draw(limit), queue_ms=draw(limit), ttft_ms=draw(limit)),
        )
        lasts = draw(st.sampled_from([None, None, None, 0, 1, 4]))
        made.append((moment, request, None if lasts is None else moment + lasts))
    return made


@st.composite
def machines(draw):
    limits = SchedulerLimits(
        max_num_seqs=draw(st.sampled_from([4, 6, 3, 2, 1])),
        max_num_batched_tokens=draw(st.sampled_from([8, 16, 64, 5, 3, 2, 1])),
        max_model_len=draw(st.sampled_from([30, 64, 18])),
        eos_token_ids=(6,),
        scheduling_policy=draw(st.sampled_from([None, "fcfs", "priority", "fair"])),
        swap=draw(st.sampled_from(["auto", "recompute", "swap"])),
        recompute_seconds_per_token=draw(st.sampled_from([1.0, 3.0])),
        swap_seconds_per_block=2.0,
        max_num_queued_reqs=draw(st.sampled_from([2, 100])),
    )
    block_size = draw(st.sampled_from([1, 2, 4]))
    sights = draw(st.sampled_from(SIGHTS))
    return {
        "limits": limits,
        "block_size": block_size,
        "sights": sights,
        "num_blocks": draw(st.sampled_from([16, 20, 24, 12, 32, 40])) * len(sights) // block_size,
        "host_blocks": draw(st.sampled_from([0, 3, 12, 40])),
        "cache": draw(st.booleans()),
        "ahead": draw(st.sampled_from([0, 0, 1, 2])),
    }


def play(driver, plan, *, cancel_mid_step: bool = False) -> set[str]:
    """Run everything to its end; the ids that were cancelled, or refused as too late."""
    cut_short: set[str] = set()
    pending = list(plan)
    goodbyes = [(moment, request.request_id) for moment, request, moment in plan if moment is not None]
    while pending or driver.state.has_work:
        while pending and pending[0][0] <= driver.now:
            request = pending.pop(0)[1]
            try:
                driver.submit(request)
            except PromptTooLong:
                longest = min(driver.state.limits.max_model_len - 1, driver.state.token_capacity)
                assert len(request.prompt_token_ids) > longest
            except QueueFull:
                assert len(driver.state.waiting) >= driver.state.limits.max_num_queued_reqs

        def leave():
            for moment, request_id in goodbyes:
                if moment <= driver.now and driver.cancel(request_id):
                    cut_short.add(request_id)

        if not cancel_mid_step:
            leave()
        driver.step(while_running=leave if cancel_mid_step else lambda: None)
        assert driver.now < 5000, "the scheduler does not come to an end"
    return cut_short


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(machine=machines(), plan=arrivals(), mid_step=st.booleans())
def test_every_schedule_gives_what_each_request_gets_alone(driver_class, machine, plan, mid_step):
    driver = driver_class(**machine)
    cut_short = play(driver, plan, cancel_mid_step=mid_step)
    totals = driver.state.totals
    event(f"preempted {totals.preemptions > 0}, swapped {totals.swaps_in > 0}, hit {totals.prefix_cache_hits > 0}")
    driver.finish()
    driver.check_answers(but=cut_short)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(machine=machines(), plan=arrivals(with_deadlines=True))
def test_deadlines_end_what_is_late_and_nothing_else(driver_class, machine, plan):
    driver = driver_class(**machine | {"ahead": 0})  # a step decides and takes in what it brought
    cut_short = play(driver, plan)
    late = set()
    for request_id, request in driver.requests.items():
        last, limits = driver.told[request_id].last, request.deadlines
        if last is None:
            assert request_id in cut_short
            continue
        times, refused = last.times, last.error is not None
        ended = (
            next(
                decision.now for decision in driver.decisions if any(s.request is request for s, _ in decision.refused)
            )
            if refused
            else times.last_token - 1.0
        )
        waited = {
            "total_ms": ended,
            "queue_ms": ended if times.first_scheduled is None else times.first_scheduled,
            "ttft_ms": ended if times.first_token is None else times.first_token - 1.0,
        }
        broken = {
            name
            for name, moment in waited.items()
            if getattr(limits, name) is not None and (moment - times.arrival) * 1000.0 >= getattr(limits, name)
        }
        if refused:
            assert last.error.code == DeadlineExceeded.code
            assert last.finish_reason is FinishReason.ERROR
            assert last.error.param in broken
            assert last.error.retry_after >= 1.0
            late.add(request_id)
        else:
            assert not broken, f"{request_id} should have been refused for {broken}"
    driver.check_answers(but=cut_short | late)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    members=st.lists(
        st.tuples(st.integers(0, 6), st.sampled_from([4, 8, 6, 9]), st.integers(-3, 3)), min_size=3, max_size=8
    ),
    num_blocks=st.integers(6, 10),
    num_tokens=st.sampled_from([4, 6, 9, 16]),
    swap=st.sampled_from(["recompute", "swap"]),
    ahead=st.integers(0, 2),
)
def test_a_crowd_that_shares_its_prefix(driver_class, members, num_blocks, num_tokens, swap, ahead):
    """Whoever gives way frees only what nobody else holds."""
    limits = SchedulerLimits(
        max_num_seqs=4, max_num_batched_tokens=num_tokens, max_model_len=64, scheduling_policy="priority", swap=swap
    )
    driver = driver_class(limits, num_blocks=num_blocks, block_size=2, host_blocks=6, ahead=ahead)
    plan = [
        (
            moment,
            EngineRequest(
                request_id=f"r{number}",
                prompt_token_ids=(*STEMS[0], 3)[:length],
                sampling=SamplingParams(max_tokens=8, seed=number),
                arrival_time=float(moment),
                priority=priority,
            ),
            None,
        )
        for number, (moment, length, priority) in enumerate(sorted(members))
    ]
    play(driver, plan)
    event(f"preempted {driver.state.totals.preemptions > 0}, swapped {driver.state.totals.swaps_in > 0}")
    driver.check_answers()
