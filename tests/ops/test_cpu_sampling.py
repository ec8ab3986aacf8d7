"""Compiled sampling gives what the definition gives: the same tokens and the same log-probabilities, to the bit."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quire.core.errors import EngineError, InvalidParameter
from quire.core.sampling import SamplingParams
from quire.ops.cpu.library import usable_isas
from quire.ops.kernels import Kernels, select
from quire.ops.sampling import SamplingRow, sample, token_logprobs
from quire.ops.target import Target

ISAS = pytest.mark.parametrize("isa", usable_isas())


def kernels(isa: str, threads: int = 1) -> Kernels:
    return select(Target("cpu", torch.float32, isa=isa, threads=threads))


def row_of(position: int = 9, **options) -> SamplingRow:
    return SamplingRow(
        sampling=SamplingParams(**{"seed": 5, **options}),
        position=position,
        token_ids=[1, 2, 3, 3, 5, 4, 5],
        num_prompt_tokens=4,
        eos_token_ids=[0],
    )


def same(found, expected) -> bool:
    """Errors are equal if they are of one kind and say the same."""
    return [(type(x), str(x)) if isinstance(x, Exception) else x for x in found] == [
        (type(x), str(x)) if isinstance(x, Exception) else x for x in expected
    ]


OPTIONS = st.fixed_dictionaries(
    {"temperature": st.sampled_from([0.0, 0.3, 1.0, 1.7, 50.0]), "seed": st.integers(-(2**63), 2**63 - 1)},
    optional={
        "top_p": st.floats(1e-3, 1.0),
        "top_k": st.integers(-1, 3000),
        "min_p": st.floats(0.0, 1.0),
        "typical_p": st.floats(1e-3, 1.0),
        "repetition_penalty": st.floats(0.1, 3.0),
        "presence_penalty": st.floats(-2.0, 2.0),
        "frequency_penalty": st.floats(-2.0, 2.0),
        "logit_bias": st.dictionaries(st.integers(0, 60), st.floats(-100.0, 100.0), max_size=5),
        "allowed_token_ids": st.lists(st.integers(0, 60), min_size=1, max_size=9),
        "bad_words_token_ids": st.just([[2], [4, 5, 6], [5, 4], [4, 5, 4, 9]]),
        "min_tokens": st.integers(0, 5),
        "stop_token_ids": st.just([6]),
        "logprobs": st.integers(0, 64),
    },
)
KINDS = {
    "random": lambda x: x,
    "coarse": torch.round,  # many ties
    "flat": torch.zeros_like,
    "steep": lambda x: x * 40,
    "cut": lambda x: torch.where(x < 1, -math.inf, x),
    "far": lambda x: x * 1e38,
}


@ISAS
@settings(max_examples=150, deadline=None)
@given(
    options=st.lists(OPTIONS, min_size=1, max_size=5),
    size=st.integers(61, 3000),
    kind=st.sampled_from(sorted(KINDS)),
    seed=st.integers(0, 1000),
)
def test_it_samples_what_the_definition_samples(isa, options, size, kind, seed):
    logits = KINDS[kind](torch.randn(len(options), size, generator=torch.Generator().manual_seed(seed)) * 3)
    rows = [row_of(**each, position=i) for i, each in enumerate(options)]
    assert same(kernels(isa).sample(logits, rows), sample(logits, rows))


@ISAS
@pytest.mark.parametrize("spread", [0.0, 0.02, 1.0, 4.0])
def test_a_large_vocabulary(isa, spread):
    """As large as they come, from all tokens alike to a few that matter."""
    kinds = [
        {},
        {"temperature": 0.0},
        {"top_p": 0.3},
        {"top_p": 0.9999999},
        {"top_k": 50},
        {"top_k": 100_000},
        {"min_p": 0.1},
        {"typical_p": 0.5},
        {"min_p": 1e-6, "top_k": 200_000, "top_p": 0.9, "typical_p": 0.9, "temperature": 0.8},
    ]
    rows = [row_of(**options, position=i, logprobs=i) for i, options in enumerate(kinds)]
    logits = torch.randn(len(rows), 262_144 - 7, generator=torch.Generator().manual_seed(1)) * spread
    expected = sample(logits, rows)
    one, two = (kernels(isa, threads).sample(logits, rows) for threads in (1, 2))
    assert same(one, expected)
    assert same(two, expected)


@ISAS
@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 6), size=st.integers(1, 5000), num_top=st.integers(0, 64), seed=st.integers(0, 99))
def test_logprobs_of_given_tokens(isa, rows, size, num_top, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, size + 3, generator=generator)[:, 3:] * 4  # rows that do not begin at a round address
    targets = torch.randint(0, size, (rows,), generator=generator).tolist()
    assert kernels(isa).token_logprobs(logits, targets, num_top) == token_logprobs(logits, targets, num_top)


@ISAS
@pytest.mark.parametrize("place", [0, 5, 96])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_broken_row_harms_no_other(isa, bad, place):
    logits = torch.randn(3, 97, generator=torch.Generator().manual_seed(0))
    logits[1, place] = bad
    rows = [row_of(logprobs=2), row_of(temperature=0.0), row_of(allowed_token_ids=[4], bad_words_token_ids=[[4]])]
    found = kernels(isa).sample(logits, rows)
    assert same(found, sample(logits, rows))
    assert isinstance(found[1], EngineError)
    assert isinstance(found[2], InvalidParameter)
    with pytest.raises(EngineError, match="position 1"):
        kernels(isa).token_logprobs(logits, [0, 0, 0], 1)
    with pytest.raises(IndexError):
        kernels(isa).token_logprobs(logits, [0, 97, 0], 1)


@ISAS
def test_no_rows_and_the_smallest_vocabulary(isa):
    assert kernels(isa).sample(torch.empty(0, 5), []) == []
    assert kernels(isa).token_logprobs(torch.empty(0, 5), [], 3) == []
    rows = [row_of(temperature=temperature, logprobs=3) for temperature in (0.0, 1.0)]
    assert kernels(isa).sample(torch.zeros(2, 1), rows) == sample(torch.zeros(2, 1), rows)
