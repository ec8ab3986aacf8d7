"""What a decode step finds on the device, and how graphs are used."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quire import LLM, SamplingParams
from quire.engine.decode_loop import DecodeLoop, buckets
from quire.engine.readback import Readback


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
