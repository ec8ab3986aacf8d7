"""Sampling by Triton's kernels, interpreted, gives what the definitions give: the same tokens, to the bit."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from quire.core.errors import EngineError, InvalidParameter
from quire.core.sampling import SamplingParams
from quire.ops.draw import NOT_FINITE, DrawTable, draw, table_of
from quire.ops.sampling import SamplingRow, sample, token_logprobs
from quire.ops.target import Target
from quire.ops.triton.drawing import Drawing
from quire.ops.triton.library import TRITON
from quire.ops.triton.sampling import TritonSampling, _upload

pytestmark = pytest.mark.filterwarnings(
    "ignore:(overflow|invalid value) encountered:RuntimeWarning"
)  # of numpy, which interprets
CPU = torch.device("cpu")
TARGET = Target(CPU, torch.float32, isa=TRITON)
FEW = settings(
    max_examples=5, deadline=None, phases=(Phase.explicit, Phase.reuse, Phase.generate)
)  # no patience to shrink
OPTIONS = st.fixed_dictionaries(
    {"temperature": st.sampled_from([0.0, 0.3, 1.0, 1.7, 50.0]), "seed": st.integers(-(2**63), 2**63 - 1)},
    optional={
        "top_p": st.floats(1e-3, 1.0),
        "top_k": st.integers(-1, 5000) | st.integers(-1, 50) | st.just(2**31),
        "min_p": st.floats(0.0, 1.0) | st.floats(0.0, 0.01),
    },
)
CHANGES = st.fixed_dictionaries(
    {},
    optional={
        "repetition_penalty": st.floats(0.1, 3.0),
        "presence_penalty": st.floats(-2.0, 2.0),
        "frequency_penalty": st.floats(-2.0, 2.0),
        "logit_bias": st.dictionaries(st.integers(0, 60), st.floats(-100.0, 100.0), max_size=5),
        "allowed_token_ids": st.lists(st.integers(0, 60), min_size=1, max_size=9),
        "bad_words_token_ids": st.just([[2], [4, 5, 6], [5, 4], [4, 5, 4, 9]]),
        "min_tokens": st.integers(0, 5),
        "stop_token_ids": st.just([6]),
        "logprobs": st.integers(0, 64),
        "typical_p": st.floats(1e-3, 1.0),
    },
)
KINDS = {
    "random": lambda x: x,
    "coarse": torch.round,  # many ties
    "flat": torch.zeros_like,
    "near": lambda x: x / 100,  # in a few buckets
    "steep": lambda x: x * 40,
    "cut": lambda x: torch.where(x < 1, -math.inf, x),
    "far": lambda x: x * 2e37,
}


def logits_of(kind: str, rows: int, size: int, seed: int) -> Tensor:
    return KINDS[kind](torch.randn(rows, size, generator=torch.Generator().manual_seed(seed)) * 3)


def row_of(position: int = 9, **options) -> SamplingRow:
    return SamplingRow(
        sampling=SamplingParams(**{"seed": 5, **options}),
        position=position,
        token_ids=[1, 2, 3, 3, 5, 4, 5],
        num_prompt_tokens=4,
        eos_token_ids=[0],
    )


def same(found, expected) -> bool:
    return [(type(x), str(x)) if isinstance(x, Exception) else x for x in found] == [
        (type(x), str(x)) if isinstance(x, Exception) else x for x in expected
    ]


def check_draw(logits: Tensor, table: DrawTable) -> None:
    positions = torch.arange(len(logits)) * 7919
    assert Drawing(TARGET).draw(logits, table, positions).tolist() == draw(logits, table, positions).tolist()


@FEW
@given(
    options=st.lists(OPTIONS, min_size=1, max_size=3),
    size=st.integers(1, 5000) | st.sampled_from([255, 256, 257, 2047, 2048, 2049, 4096]),
    kind=st.sampled_from(sorted(KINDS)),
    seed=st.integers(0, 1000),
)
def test_it_draws_what_the_definition_draws(options, size, kind, seed):
    table = table_of([SamplingParams(**each) for each in options], CPU)
    check_draw(logits_of(kind, len(options), size, seed), table)


def test_all_ways_to_truncate():
    """Among them those that need tokens far below the likeliest, and lists of more than one tile."""
    ways = [
        {"top_k": 2499},
        {"top_p": 1 - 1e-9},
        {"min_p": 1e-3, "top_k": 2100, "top_p": 0.97},
        {"min_p": 1e-30, "top_p": 0.9999},
    ]
    check_draw(logits_of("near", len(ways), 2500, 1), table_of([SamplingParams(seed=3, **way) for way in ways], CPU))


def test_a_row_in_one_part_or_in_several_and_in_other_company():
    ways = [{"top_p": 0.8}, {"top_k": 40}, {}]
    logits = logits_of("coarse", 3, 4500, 3)
    table = table_of([SamplingParams(seed=9, **way) for way in ways], CPU)
    tokens = Drawing(TARGET).draw(logits, table, torch.arange(3))
    assert torch.equal(Drawing(TARGET, programs=1).draw(logits, table, torch.arange(3)), tokens)
    assert torch.equal(Drawing(TARGET).draw(logits[1:], table[1:], torch.arange(1, 3)), tokens[1:])


def test_rows_that_are_broken_or_not_dense():
    logits = torch.randn(4, 2500, generator=torch.Generator().manual_seed(0))[:, 3:2300]
    logits[0, 2100], logits[1, 5], logits[2] = math.nan, math.inf, -math.inf
    table = table_of([SamplingParams(seed=1, top_k=5)] * 4, CPU)
    check_draw(logits, table)
    check_draw(logits, DrawTable.greedy(4, CPU))
    assert Drawing(TARGET).draw(logits, table, torch.arange(4)).tolist()[:3] == [NOT_FINITE] * 3


def test_memory_is_kept_and_shared():
    drawing = Drawing(TARGET)
    logits = logits_of("random", 5, 300, 0)
    tokens = drawing.draw(logits, DrawTable.greedy(5, CPU), torch.arange(5))
    for rows in (3, 5, 1):
        part = drawing.draw(logits[:rows], DrawTable.greedy(rows, CPU), torch.arange(rows))
        assert torch.equal(part, tokens[:rows])
    assert [len(kept) for kept in drawing._workspaces.values()] == [1]


def test_memory_grows_by_doubling():
    """Or a batch that grows row by row would leave as many workspaces."""
    drawing = Drawing(TARGET)
    for rows in range(1, 8):
        drawing._workspace(rows, 50, CPU)
    assert [len(work.limit_s) for work in drawing._workspaces[50]] == [1, 2, 4, 8]


@pytest.mark.parametrize("rows", [1, 2, 3, 5])
def test_what_is_uploaded_is_aligned_whatever_the_number_of_rows(rows):
    """Kernels are compiled anew for pointers that are not."""
    arrays = [np.arange(rows, dtype=dtype) + 1 for dtype in (np.int64, np.float32, np.int32)] + [np.empty(0, np.int32)]
    uploaded = _upload(arrays, CPU)
    assert all(x.storage_offset() * x.itemsize % 16 == 0 for x in uploaded)
    assert [x.tolist() for x in uploaded] == [array.tolist() for array in arrays]
    assert [x.numpy().dtype for x in uploaded] == [array.dtype for array in arrays]


def test_what_can_be_drawn_on_the_device():
    assert SamplingParams(top_p=0.5, top_k=3, min_p=0.1).drawable
    assert not SamplingParams(typical_p=0.5).drawable


@FEW
@given(
    options=st.lists(st.tuples(OPTIONS, CHANGES), min_size=1, max_size=3),
    size=st.integers(61, 3000),
    kind=st.sampled_from(sorted(KINDS)),
    seed=st.integers(0, 1000),
)
def test_it_samples_what_the_definition_samples(options, size, kind, seed):
    logits = logits_of(kind, len(options), size, seed)
    before = logits.clone()
    rows = [row_of(**draws, **changes, position=i) for i, (draws, changes) in enumerate(options)]
    assert same(TritonSampling(TARGET).sample(logits, rows), sample(logits, rows))
    assert torch.equal(logits, before)


def test_every_change_in_one_row_beside_an_unchanged_one():
    changes = {
        "allowed_token_ids": [*range(0, 60, 2), 4, 4],
        "bad_words_token_ids": [[2], [5, 4], [4, 5, 8]],
        "logit_bias": {4: 2.5, 5: 1.0, 30: 9.0},
        "repetition_penalty": 1.3,
        "frequency_penalty": 0.4,
        "presence_penalty": -0.2,
        "min_tokens": 9,
    }
    rows = [row_of(**changes, logprobs=7), row_of(logprobs=0), row_of(**changes, temperature=0.0)]
    logits = logits_of("random", 3, 70, 2)
    assert same(TritonSampling(TARGET).sample(logits, rows), sample(logits, rows))


def test_errors_are_the_definitions():
    logits = logits_of("random", 3, 97, 0)
    logits[1, 96] = math.nan
    rows = [row_of(logprobs=2), row_of(temperature=0.0), row_of(allowed_token_ids=[4], bad_words_token_ids=[[4]])]
    found = TritonSampling(TARGET).sample(logits, rows)
    assert same(found, sample(logits, rows))
    assert isinstance(found[1], EngineError)
    assert isinstance(found[2], InvalidParameter)
    with pytest.raises(EngineError, match="position 1"):
        TritonSampling(TARGET).token_logprobs(logits, [0, 0, 0], 1)
    with pytest.raises(IndexError):
        TritonSampling(TARGET).token_logprobs(logits, [0, 97, 0], 1)
    assert TritonSampling(TARGET).sample(logits[:0], []) == []


@FEW
@given(
    rows=st.integers(1, 3), size=st.integers(1, 3000), num_top=st.integers(0, 64), kind=st.sampled_from(sorted(KINDS))
)
def test_logprobs_of_given_tokens(rows, size, num_top, kind):
    logits = logits_of(kind, rows, size + 3, size)[:, 3:]
    logits[:, 0] = -0.0
    targets = torch.randint(0, size, (rows,), generator=torch.Generator().manual_seed(size)).tolist()
    assert TritonSampling(TARGET).token_logprobs(logits, targets, num_top) == token_logprobs(logits, targets, num_top)
