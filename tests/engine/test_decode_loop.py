"""What a decode step finds on the device, and how graphs are used."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quire import LLM, SamplingParams
from quire.core.request import EngineRequest
from quire.engine.decode_loop import DecodeLoop, buckets
from quire.engine.readback import Readback
from quire.engine.seats import Seats
from quire.sched.state import Phase, RequestState, ScheduledChunk


@given(st.integers(1, 2000))
def test_buckets_rise_to_as_many_as_there_are(most):
    found = buckets(most)
    assert found == sorted(set(found))
    assert found[-1] == most
    assert all(high - low <= 16 for low, high in itertools.pairwise(found))


class Recorded:
    """Graphs as a GPU has them: work is tried out and recorded before it is run, and must change nothing by that."""

    def __init__(self) -> None:
        self.works: dict[int, Callable[[], None]] = {}

    def has(self, key: int) -> bool:
        return key in self.works

    def capture(self, key: int, work: Callable[[], None]) -> None:
        work()
        self.works[key] = work

    def run(self, key: int, work: Callable[[], None]) -> None:
        self.works[key]()  # what was recorded then


@pytest.fixture(scope="module")
def llms():
    return [LLM("quire-tiny", isa="reference", dtype="float32", async_scheduling=ahead) for ahead in (True, False)]


def test_trying_a_step_out_changes_nothing(llms):
    ahead, plain = llms
    loop = ahead._engine._runner._decode
    assert isinstance(loop, DecodeLoop)
    assert plain._engine._runner._decode is None
    recorded = loop._graphs = Recorded()
    prompts = ["Hello", "What is 3 + 4?", "The months are", "a b c d e f g h"] * 3
    params = [
        SamplingParams(max_tokens=3 + 4 * number, temperature=number % 2 * 0.9, seed=number, ignore_eos=True)
        for number in range(len(prompts))
    ]
    found = [[output.outputs[0].token_ids for output in llm.generate(prompts, params, progress=False)] for llm in llms]
    assert found[0] == found[1]
    assert len(recorded.works) >= 2, "steps of different sizes"
    again = ahead.generate(prompts[::-1], params[::-1], progress=False)
    assert [output.outputs[0].token_ids for output in again] == found[1][::-1]


def test_copies_are_read_in_the_order_in_which_they_were_started():
    readback = Readback(4, torch.device("cpu"), in_flight=2)
    numbers = torch.tensor([1, 2, 3])
    first = readback.start(numbers)
    numbers += 10
    second = readback.start(numbers[:2])
    numbers += 10
    assert first.wait() == [1, 2, 3]
    assert second.wait() == [11, 12]


def chunk_of(state: RequestState, start: int) -> ScheduledChunk:
    return ScheduledChunk(state=state, start=start, num_tokens=1, samples=True, first_slot_cached=False)


def running(number: int, num_tokens: int) -> RequestState:
    request = EngineRequest(
        request_id=str(number),
        prompt_token_ids=[number] * num_tokens,
        sampling=SamplingParams(seed=number, temperature=number / 10),
        arrival_time=0.0,
    )
    return RequestState(
        request=request,
        number=number,
        token_ids=[number] * num_tokens,
        num_prompt_tokens=num_tokens,
        longest=99,
        phase=Phase.RUNNING,
        block_tables=[[1 + 4 * number + block for block in range(-(-num_tokens // 8))]],
    )


@settings(max_examples=150, deadline=None)
@given(data=st.data(), count=st.integers(1, 9))
def test_the_device_knows_who_takes_part_and_nobody_else(data, count):
    """Requests come, decode, pause and go; before each step, every row is its request's or of length 0."""
    seats = Seats(count, 4, 1, torch.device("cpu"))
    alive: list[RequestState] = []
    born = 0
    for _ in range(data.draw(st.integers(1, 12))):
        for state in data.draw(st.lists(st.sampled_from(alive), unique=True)) if alive else []:
            alive.remove(state)
            state.phase = Phase.ENDED
        while len(alive) < count and data.draw(st.booleans()):
            alive.append(running(born, data.draw(st.integers(1, 20))))
            born += 1
        part = [state for state in alive if len(state.token_ids) < 32 and data.draw(st.booleans())]
        if not part:
            continue
        chunks = [chunk_of(state, len(state.token_ids) - 1) for state in part]
        rows, end = seats.prepare(chunks)
        assert len(set(rows)) == len(rows)
        assert max(rows) < end <= count
        expected = torch.zeros(count, dtype=torch.int32)
        for row, state in zip(rows, part, strict=True):
            expected[row] = len(state.token_ids)
            assert seats.token_s[row] == state.token_ids[-1]
            table = state.block_tables[0]
            assert seats.tables_sb[0][row, : len(table)].tolist() == table
            assert seats.params.seed[row] == state.request.sampling.seed
        assert torch.equal(seats.length_s, expected)
        for row, state in zip(rows, part, strict=True):  # what a step does
            drawn = int(seats.token_s[row]) + 1
            seats.token_s[row], seats.length_s[row] = drawn, seats.length_s[row] + 1
            state.token_ids.append(drawn)
            if len(state.token_ids) > 8 * len(state.block_tables[0]):
                state.block_tables[0].append(1000 + len(state.token_ids))
        seats.advance(rows)


def test_a_failure_of_an_earlier_request_does_not_end_one_of_the_same_name():
    """The first is cancelled while the step whose logits are not finite is in flight."""
    llm = LLM("quire-tiny", isa="reference", dtype="float32", async_scheduling=True)
    engine = llm._engine
    weight = engine._runner._decoder.head.weight
    sound = weight.clone()
    request = EngineRequest(
        request_id="r",
        prompt_token_ids=[5, 6, 7],
        sampling=SamplingParams(temperature=0.0, max_tokens=3, ignore_eos=True, seed=0),
        arrival_time=0.0,
    )
    weight.fill_(float("nan"))
    assert engine.submit(request) is None
    assert engine.step() == []
    weight.copy_(sound)
    assert engine.cancel("r") is not None
    assert engine.submit(request) is None
    outputs = []
    while engine.has_work:
        outputs += engine.step()
    assert all(output.error is None for output in outputs)
    assert sum(len(output.token_ids) for output in outputs) == 3
