"""Steps with prompts in them that are padded to a captured size: nobody's bits change."""

from __future__ import annotations

import sys
from collections.abc import Callable, Hashable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quire.config.engine import EngineConfig
from quire.core.errors import NotEnoughMemory
from quire.core.request import EngineRequest
from quire.core.sampling import SamplingParams
from quire.engine.build import build_engine
from quire.engine.decode_loop import DecodeLoop
from quire.engine.loop import Engine
from quire.engine.padded import CHUNKS, PaddedSteps, most_padded, token_buckets
from quire.engine.warm_up import LargestStep
from quire.nn.batch import ForwardBatch

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))  # for `conformance`, which is not installed
from conformance.case import VOCAB
from conformance.cases import CASES
from conformance.oracle import save

SEATS = 6


@given(st.integers(32, 10_000))
def test_sizes_waste_a_third_at_most(most: int) -> None:
    sizes = token_buckets(most)
    assert sizes == sorted(set(sizes))
    assert sizes[0] == 32
    assert sizes[-1] <= most < sizes[-1] * 1.51
    assert all(after <= before * 1.5 for before, after in pairwise(sizes))


@pytest.mark.parametrize(
    ("elements", "layers", "expected"),
    [(0.6e9, 28, range(512, 2049)), (8e9, 36, range(64, 129)), (3e9, 48, range(256, 513)), (400e9, 60, range(1))],
)
def test_small_models_are_padded_further(elements: float, layers: int, expected: range) -> None:
    assert most_padded(int(elements), layers, 8192) in expected


class Recorded:
    """Graphs as a GPU has them: work is tried out and recorded before it is run."""

    def __init__(self) -> None:
        self.works: dict[Hashable, Callable[[], None]] = {}
        self.runs: list[Hashable] = []

    def has(self, key: Hashable) -> bool:
        return key in self.works

    def capture(self, key: Hashable, work: Callable[[], None]) -> None:
        assert key not in self.works
        work()
        self.works[key] = work

    def run(self, key: Hashable, work: Callable[[], None]) -> None:
        self.runs.append(key)
        self.works[key]()  # what was recorded then


class Compared(PaddedSteps):
    """Computes each step as it is, too."""

    def forward(self, batch: ForwardBatch) -> torch.Tensor:
        expected = self._model.forward(batch, self._kv)
        cache = self._kv.data.clone()
        found = super().forward(batch)
        assert torch.equal(found, expected)
        assert torch.equal(self._kv.data[..., 1:, :], cache[..., 1:, :]), "another block than the null block"
        return found


def engine_of(directory: Path) -> Engine:
    return build_engine(
        EngineConfig(
            block_size=16,
            model=str(directory),
            dtype="float32",
            isa="reference",
            num_kv_blocks=120,
            max_model_len=150,
            max_num_seqs=SEATS,
            max_num_batched_tokens=60,
            threads=1,
            async_scheduling=True,
        )
    )


def padded(engine: Engine) -> Recorded:
    """Makes it pad its steps, and record them; returns the record."""
    runner, graphs = engine._runner, Recorded()
    assert isinstance(runner._decode, DecodeLoop)
    runner._decode._graphs = graphs
    runner._padded = Compared(runner._decoder, runner._kv, graphs, tokens=64, requests=SEATS, longest=150)
    return graphs


def run(engine: Engine) -> list[list[int]]:
    """Prompts of all lengths, some of them cut into several steps, beside others that decode."""
    generator = torch.Generator().manual_seed(5)
    prompts = [torch.randint(3, VOCAB, (length,), generator=generator).tolist() for length in (3, 100, 1, 40, 40, 7, 9)]
    for index, prompt in enumerate(prompts):
        sampling = SamplingParams(
            max_tokens=4 + 5 * index,
            ignore_eos=True,
            temperature=index % 2 * 0.9,
            seed=index,
            prompt_logprobs=1 if index == 3 else None,
            logprobs=2 if index == 4 else None,
        )
        request = EngineRequest(
            request_id=str(index), prompt_token_ids=prompt, sampling=sampling, arrival_time=float(index)
        )
        assert engine.submit(request) is None
    answers: list[list[int]] = [[] for _ in prompts]
    while engine.has_work:
        for output in engine.step():
            assert output.error is None
            answers[int(output.request_id)] += output.token_ids
        engine.check_integrity()
    return answers


@pytest.fixture(scope="module", params=["Qwen3ForCausalLM", "Gemma3ForCausalLM"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One with a cache of one group of layers, and one of several."""
    directory = tmp_path_factory.mktemp("checkpoint")
    save(next(case for case in CASES if case.architecture == request.param), directory)
    return directory


@pytest.mark.parametrize("warm", [True, False], ids=["captured before", "captured when needed"])
def test_padded_steps_have_the_bits_of_the_others(checkpoint: Path, warm: bool) -> None:
    torch.set_num_threads(1)
    engine = engine_of(checkpoint)
    graphs = padded(engine)
    if warm:
        engine._runner.warm_up(LargestStep(tokens=200, longest=150, rows=SEATS), lambda: 0.0)
        assert len(graphs.works) == len(token_buckets(64)) + len(engine._runner._decode._sizes)
    recorded = set(graphs.works)
    assert run(engine) == run(engine_of(checkpoint))
    assert {key for key in graphs.runs if key[0] == "padded"} >= {("padded", 32), ("padded", 64)}
    assert not warm or set(graphs.works) == recorded


def test_captures_end_in_time(checkpoint: Path) -> None:
    engine = engine_of(checkpoint)
    graphs = padded(engine)
    now = iter(range(100))
    engine._runner.warm_up(LargestStep(tokens=32, longest=32, rows=SEATS), lambda: float(next(now)))
    assert 2 <= len(graphs.works) <= 5
    assert run(engine) == run(engine_of(checkpoint))


def test_steps_of_too_many_prompts_are_not_padded(checkpoint: Path) -> None:
    engine = engine_of(checkpoint)
    runner = engine._runner
    steps = PaddedSteps(runner._decoder, runner._kv, Recorded(), tokens=64, requests=CHUNKS + 4, longest=150)

    def batch(*query_lens: int, rows: int = 1) -> ForwardBatch:
        starts = [sum(query_lens[:i]) for i in range(len(query_lens) + 1)]
        return ForwardBatch(
            token_ids_t=torch.zeros(starts[-1], dtype=torch.int64),
            positions_t=torch.zeros(starts[-1], dtype=torch.int64),
            slots_t=torch.zeros(starts[-1], dtype=torch.int64),
            query_start=starts,
            context_lens=list(query_lens),
            block_table_rb=torch.zeros(len(query_lens), 1, dtype=torch.int64),
            logits_rows_s=torch.zeros(rows, dtype=torch.int64),
        )

    assert steps.takes(batch(*[2] * (CHUNKS - 1), 1, 1))
    assert not steps.takes(batch(*[2] * CHUNKS))
    assert steps.takes(batch(64))
    assert not steps.takes(batch(65))
    assert steps.takes(batch(40, rows=CHUNKS + 4))
    assert not steps.takes(batch(40, rows=CHUNKS + 5))
    assert not steps.takes(batch(*[1] * (CHUNKS + 5)))


def test_a_largest_step_that_does_not_fit_is_refused_with_numbers(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_of(checkpoint)

    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    monkeypatch.setattr(type(engine._runner._decoder), "forward", full)
    with pytest.raises(NotEnoughMemory, match=r"200 tokens .* 20\.00 GiB"):
        engine._runner.warm_up(LargestStep(tokens=200, longest=150, rows=SEATS), lambda: 0.0)
