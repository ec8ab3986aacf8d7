"""Replaying a request after its engine died: the reader gets each token once, whatever the cuts."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quire.core.errors import EngineDead
from quire.core.request import Deadlines, EngineOutput, EngineRequest, FinishReason, TokenLogprobs
from quire.core.sampling import SamplingParams
from quire.serve.inbox import Flight, Inbox, SlowReader

REQUEST = EngineRequest(
    request_id="r", prompt_token_ids=(1, 2), sampling=SamplingParams(seed=0, logprobs=0), arrival_time=0.0
)


def outputs(tokens: list[int], cuts: list[int]) -> list[EngineOutput]:
    """The tokens as an engine might say them: in pieces that end at `cuts`, the last with a finish reason."""
    edges = [0, *sorted({cut for cut in cuts if cut < len(tokens)} - {0}), len(tokens)]
    made = []
    for low, high in itertools.pairwise(edges):
        ids = tuple(tokens[low:high])
        made.append(
            EngineOutput(
                request_id="r",
                token_ids=ids,
                logprobs=tuple(TokenLogprobs(token, -float(low + i), 1) for i, token in enumerate(ids)),
                prompt_logprobs=(None, TokenLogprobs(2, -0.1, 1)) if low == 0 else None,
                finish_reason=FinishReason.LENGTH if high == len(tokens) else None,
            )
        )
    return made


@given(
    tokens=st.lists(st.integers(0, 5), min_size=1, max_size=20),
    lives=st.lists(st.tuples(st.lists(st.integers(0, 19), max_size=6), st.integers(0, 6)), max_size=4),
    last=st.lists(st.integers(0, 19), max_size=6),
)
def test_each_token_once(tokens, lives, last):
    flight = Flight(REQUEST, None, 0.0)
    news = []
    for cuts, heard in lives:
        # An engine that dies after `heard` outputs, never having told the last one.
        news.extend(flight.accept(output) for output in outputs(tokens, cuts)[:-1][:heard])
        flight.engine_died(1.0)
    news.extend(flight.accept(output) for output in outputs(tokens, last))
    told = [output for output in news if output is not None]
    assert [token for output in told for token in output.token_ids] == tokens
    assert [entry.logprob for output in told for entry in output.logprobs] == [-float(i) for i in range(len(tokens))]
    assert sum(output.prompt_logprobs is not None for output in told) == 1
    assert [output.finish_reason for output in told if output.finish_reason] == [FinishReason.LENGTH]
    assert flight.deaths == len(lives)


@given(tokens=st.lists(st.integers(0, 5), min_size=3, max_size=10), heard=st.integers(1, 2), data=st.data())
def test_a_replay_that_differs_is_an_error(tokens, heard, data):
    flight = Flight(REQUEST, None, 0.0)
    for output in outputs(tokens, list(range(len(tokens))))[:heard]:
        flight.accept(output)
    flight.engine_died(1.0)
    wrong = list(tokens)
    place = data.draw(st.integers(0, heard - 1))
    wrong[place] += 1
    replay = outputs(wrong, data.draw(st.lists(st.integers(0, 9))))
    with pytest.raises(EngineDead):
        list(map(flight.accept, replay))


def test_a_replay_that_ends_early_is_an_error():
    flight = Flight(REQUEST, None, 0.0)
    for output in outputs([1, 2, 3, 4], [1, 2, 3])[:3]:
        flight.accept(output)
    flight.engine_died(1.0)
    with pytest.raises(EngineDead):
        list(map(flight.accept, outputs([1, 2], [1])))


def test_a_replay_is_not_refused_for_deadlines_that_were_met():
    deadlines = Deadlines(total_ms=3.0, queue_ms=1.0, ttft_ms=2.0)
    flight = Flight(replace(REQUEST, deadlines=deadlines), None, 0.0)
    flight.engine_died(1.0)
    assert flight.request.deadlines == deadlines
    flight.accept(outputs([1, 2, 3], [1])[0])
    flight.engine_died(2.0)
    assert flight.request.deadlines == Deadlines(total_ms=3.0)


async def test_an_inbox_is_bounded():
    inbox = Inbox(max_pending=5)
    one = EngineOutput(request_id="r", token_ids=(1, 2, 3))
    assert inbox.put(one)
    assert inbox.put(one)
    assert not inbox.put(one)
    with pytest.raises(SlowReader):
        await inbox.get()


async def test_an_inbox_that_is_read_never_overflows():
    inbox = Inbox(max_pending=5)
    one = EngineOutput(request_id="r", token_ids=(1, 2, 3))
    for _ in range(20):
        assert inbox.put(one)
        assert list(await inbox.get()) == [one]
