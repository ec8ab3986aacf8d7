"""What is learnt of endpoints' paces against endpoints whose paces are known, and the queue before them."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quire.gateway.cost.learner import HALF_LIFE, Learner
from quire.gateway.cost.queue import PrefillQueue

BASE, PREFILL, STEP, SEQUENCE = 0.03, 6e-5, 0.015, 4e-4


def teach(learner: Learner, key: str, rng: random.Random, slow: float, count: int, start: float = 0.0) -> float:
    """Half a second between observations that scatter by a tenth; the time after the last one."""
    now = start
    for _ in range(count):
        now += 0.5
        tokens, beside = rng.uniform(100, 8000), rng.randrange(40)
        noise = slow * math.exp(rng.gauss(0.0, 0.1))
        learner.saw_first(key, tokens, (BASE + PREFILL * tokens) * noise, now)
        learner.saw_tokens(key, beside, (STEP + SEQUENCE * beside) * noise, now)
    return now


def test_known_coefficients_are_found() -> None:
    learner = Learner()
    now = teach(learner, "a", random.Random(1), 1.0, 300)
    costs = learner.costs("a", now)
    assert costs.prefill == pytest.approx(PREFILL, rel=0.1)
    assert costs.base == pytest.approx(BASE, abs=0.02)
    assert costs.step == pytest.approx(STEP, rel=0.15)
    assert costs.sequence == pytest.approx(SEQUENCE, rel=0.15)


def test_an_endpoint_of_other_hardware_has_its_own_speed_and_a_new_one_the_pools() -> None:
    learner, rng, now = Learner(), random.Random(2), 0.0
    for _ in range(30):
        for key, slow in (("a", 1.0), ("b", 1.0), ("c", 1.0), ("slow", 2.5)):
            now = teach(learner, key, rng, slow, 2, now)
    fast, slow = learner.costs("a", now), learner.costs("slow", now)
    assert slow.prefill / fast.prefill == pytest.approx(2.5, rel=0.25)
    assert slow.step / fast.step == pytest.approx(2.5, rel=0.25)
    assert learner.costs("b", now) == fast
    assert learner.costs("new", now) == fast


def test_one_wild_observation_moves_little_and_a_lasting_change_is_followed() -> None:
    learner, rng = Learner(), random.Random(3)
    now = teach(learner, "a", rng, 1.0, 100)
    before = learner.costs("a", now).prefill
    learner.saw_first("a", 4000, 3600.0, now)
    assert learner.costs("a", now).prefill < 1.5 * before
    now = teach(learner, "a", rng, 3.0, 600, now)
    costs = learner.costs("a", now)
    assert costs.base + costs.prefill * 4000 == pytest.approx(3 * (BASE + PREFILL * 4000), rel=0.2)


def test_a_slow_endpoint_is_believed_again_after_a_while_and_the_pools_pace_stays() -> None:
    learner, rng, now = Learner(), random.Random(4), 0.0
    for _ in range(20):
        now = teach(learner, "a", rng, 1.0, 2, now)
        now = teach(learner, "slow", rng, 4.0, 1, now)
    known = learner.costs("a", now)
    assert learner.costs("slow", now).prefill > 2 * known.prefill
    later = now + 20 * HALF_LIFE
    assert learner.costs("slow", later) == learner.costs("a", later)
    assert learner.costs("a", later).prefill == pytest.approx(known.prefill, rel=0.3)


def test_what_an_endpoint_says_of_itself_is_believed_until_something_was_seen() -> None:
    learner = Learner()
    learner.hint(3e-3, 0.5)
    assert (learner.costs("a", 0.0).prefill, learner.costs("a", 0.0).step) == (3e-3, 0.5)
    teach(learner, "a", random.Random(5), 1.0, 300)
    known = learner.costs("a", 150.0)
    learner.hint(3e-3, 0.5)
    assert learner.costs("a", 150.0) == known


@pytest.mark.parametrize("said", [1e308, math.inf, math.nan, -1.0, 0.0, 1e-300, 11.0])
def test_paces_that_cannot_be_are_not_believed(said: float) -> None:
    learner, fresh = Learner(), Learner()
    learner.hint(said, said)
    assert learner.costs("a", 0.0) == fresh.costs("a", 0.0)


@given(st.lists(st.tuples(st.floats(0, 1e9), st.floats(0, 1e9), st.floats(-10, 1e6)), max_size=30))
def test_paces_are_positive_and_finite_whatever_was_seen(seen: list[tuple[float, float, float]]) -> None:
    learner = Learner()
    for x, y, now in seen:
        learner.saw_first("a", x, y, now)
        learner.saw_tokens("a", x, y, now)
        costs = learner.costs("a", now)
        assert all(map(math.isfinite, (costs.base, costs.prefill, costs.step, costs.sequence)))
        assert min(costs.base, costs.sequence) >= 0 < min(costs.prefill, costs.step)


# --- the queue ------------------------------------------------------------------------------------------------------


def test_what_is_sent_counts_until_it_is_done() -> None:
    queue = PrefillQueue()
    first = queue.send(1000, awaited=True)
    queue.send(500, awaited=True)
    assert queue.left(0.0, 0.001) == 1500
    assert queue.left(0.4, 0.001) == pytest.approx(1100)
    assert queue.left(9.0, 0.001) == pytest.approx(500)  # the second cannot begin before the first is told to be done
    queue.first(first)
    assert queue.left(9.1, 0.001) == pytest.approx(400)


def test_answers_that_are_not_streamed_are_done_by_pace() -> None:
    queue = PrefillQueue()
    queue.send(1000, awaited=False)
    assert queue.left(0.25, 0.001) == pytest.approx(750)
    assert queue.left(5.0, 0.001) == 0
    queue.send(1000, awaited=False)
    assert queue.left(5.0, 0.001) == 1000


def test_who_leaves_takes_its_work_away() -> None:
    queue = PrefillQueue()
    gone = queue.send(1000, awaited=True)
    queue.send(500, awaited=True)
    queue.gone(gone, 1000)
    assert queue.left(0.0, 0.001) == 500


@given(st.lists(st.tuples(st.sampled_from("sufg"), st.integers(0, 5000), st.floats(0, 2)), max_size=40))
def test_the_queue_is_never_less_than_nothing_nor_more_than_what_is_open(
    steps: list[tuple[str, int, float]],
) -> None:
    queue, now = PrefillQueue(), 0.0
    open_: dict[int, int] = {}
    sent = 0
    for kind, tokens, passed in steps:
        now += passed
        if kind in "su":
            ticket = queue.send(tokens, awaited=kind == "s")
            sent += tokens
            if kind == "s":
                open_[ticket] = tokens
        elif open_:
            ticket = list(open_)[tokens % len(open_)]
            queue.first(ticket) if kind == "f" else queue.gone(ticket, open_[ticket])
            del open_[ticket]
        left = queue.left(now, 0.001)
        assert -1e-6 <= left <= sent + 1e-6
    for ticket in list(open_):
        queue.first(ticket)
    assert queue.left(now + 1e6, 0.001) == pytest.approx(0.0, abs=1e-6)
