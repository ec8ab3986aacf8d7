from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from quire.core.errors import EngineError, InvalidParameter
from quire.core.sampling import SamplingParams
from quire.ops.choosing import choose, exp, survivors, top_ids
from quire.ops.logits_processing import process_logits
from quire.ops.randomness import uniform
from quire.ops.sampling import SamplingRow, sample, token_logprobs

V = 97
PROPERTY = settings(max_examples=60, deadline=None)


def random_logits(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 3


def make_row(position: int = 7, prompt=(1, 2, 3), generated=(4, 5), eos=(0,), **options) -> SamplingRow:
    return SamplingRow(
        sampling=SamplingParams(**{"seed": 11, **options}),
        position=position,
        token_ids=[*prompt, *generated],
        num_prompt_tokens=len(prompt),
        eos_token_ids=eos,
    )


def probabilities(logits_v: torch.Tensor, sampling: SamplingParams) -> torch.Tensor:
    """Our truncated distribution over the whole vocabulary."""
    ids, weights = survivors(logits_v.numpy(), sampling)
    full = torch.zeros(len(logits_v), dtype=torch.float64)
    full[torch.arange(len(logits_v)) if ids is None else torch.from_numpy(ids)] = torch.from_numpy(weights).double()
    return full / full.sum()


def assert_same_distribution(ours: torch.Tensor, scores_v: torch.Tensor) -> None:
    theirs = scores_v.double().softmax(dim=-1)
    assert torch.equal(ours > 0, scores_v > -math.inf)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-7)


# --- against transformers -----------------------------------------------------------------------------------

WARPERS = [
    ({"temperature": 0.7}, [TemperatureLogitsWarper(0.7)]),
    ({"temperature": 1.8}, [TemperatureLogitsWarper(1.8)]),
    ({"top_k": 1}, [TopKLogitsWarper(1)]),
    ({"top_k": 10}, [TopKLogitsWarper(10)]),
    ({"top_k": -1}, []),
    ({"top_k": 10**6}, []),
    ({"top_p": 0.01}, [TopPLogitsWarper(0.01)]),
    ({"top_p": 0.5}, [TopPLogitsWarper(0.5)]),
    ({"top_p": 0.97}, [TopPLogitsWarper(0.97)]),
    ({"min_p": 0.1}, [MinPLogitsWarper(0.1)]),
    ({"typical_p": 0.3}, [TypicalLogitsWarper(0.3)]),
    ({"typical_p": 0.95}, [TypicalLogitsWarper(0.95)]),
    (
        {"temperature": 1.3, "min_p": 0.02, "top_k": 20, "top_p": 0.8},
        [TemperatureLogitsWarper(1.3), MinPLogitsWarper(0.02), TopKLogitsWarper(20), TopPLogitsWarper(0.8)],
    ),
    (
        {"top_k": 20, "top_p": 0.8, "typical_p": 0.5},
        [TopKLogitsWarper(20), TopPLogitsWarper(0.8), TypicalLogitsWarper(0.5)],
    ),
]


@pytest.mark.parametrize(("options", "warpers"), WARPERS, ids=[str(options) for options, _ in WARPERS])
@pytest.mark.parametrize("scale", [0.3, 1.0, 3.0])
def test_truncation_is_that_of_transformers(options, warpers, scale):
    sampling = SamplingParams(**options)
    for seed in range(20):
        logits_v = random_logits(V, seed=seed) * scale
        scores = logits_v[None].clone()
        for warper in warpers:
            scores = warper(None, scores)
        assert_same_distribution(probabilities(logits_v, sampling), scores[0])


PROMPT, GENERATED = [1, 2, 3, 3], [5, 6, 5]
PROCESSORS = [
    ({"repetition_penalty": 1.5}, RepetitionPenaltyLogitsProcessor(1.5)),
    ({"repetition_penalty": 0.5}, RepetitionPenaltyLogitsProcessor(0.5)),
    (
        {"bad_words_token_ids": [[9], [6, 5, 20], [5, 6, 30], [7, 5, 40]]},
        NoBadWordsLogitsProcessor([[9], [6, 5, 20], [5, 6, 30], [7, 5, 40]], None),
    ),
    ({"logit_bias": {3: 5.0, 8: -100.0}}, SequenceBiasLogitsProcessor([[[3], 5.0], [[8], -100.0]])),
    ({"min_tokens": 4, "stop_token_ids": [12]}, MinNewTokensLengthLogitsProcessor(len(PROMPT), 4, [0, 12])),
    ({"min_tokens": 3, "stop_token_ids": [12]}, MinNewTokensLengthLogitsProcessor(len(PROMPT), 3, [0, 12])),
]


@pytest.mark.parametrize(("options", "processor"), PROCESSORS, ids=[str(options) for options, _ in PROCESSORS])
def test_logits_are_changed_as_transformers_does(options, processor):
    logits_v = random_logits(V)
    changed_v = logits_v.clone()
    process_logits(changed_v, SamplingParams(**options), PROMPT + GENERATED, len(PROMPT), [0])
    expected = processor(torch.tensor([PROMPT + GENERATED]), logits_v[None].clone())
    torch.testing.assert_close(changed_v, expected[0])


def test_presence_and_frequency_count_the_output_alone():
    logits_v = torch.zeros(8)
    sampling = SamplingParams(presence_penalty=0.5, frequency_penalty=0.25)
    process_logits(logits_v, sampling, [1, 1, 1, 2, 3, 3], 3, [])
    assert logits_v.tolist() == [0, 0, -0.75, -1.0, 0, 0, 0, 0]


def test_allowed_tokens_are_all_there_is():
    rows = [make_row(position=position, allowed_token_ids=[3, 50], temperature=5.0) for position in range(40)]
    results = sample(torch.zeros(40, V), rows)
    assert {result.token_id for result in results} == {3, 50}


# --- drawing ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"top_k": 6}, {"top_p": 0.9}, {"min_p": 0.1}, {"typical_p": 0.8}])
def test_frequencies_are_the_probabilities(options):
    draws = 4000
    logits_v = random_logits(12, seed=3) / 3
    sampling = SamplingParams(**options)
    expected = probabilities(logits_v, sampling) * draws
    values = logits_v.numpy()
    counts = torch.zeros(12, dtype=torch.float64)
    for position in range(draws):
        counts[choose(values, sampling, uniform(5, position))] += 1
    assert not counts[expected == 0].any()
    there = expected > 0
    chi_square = ((counts - expected)[there] ** 2 / expected[there]).sum().item()
    assert chi_square < 31.3  # the 0.999 quantile for 11 degrees of freedom


@given(seed=st.integers(-(2**63), 2**63 - 1), options=st.sampled_from([{}, {"top_k": 5}, {"top_p": 0.8}]))
@PROPERTY
def test_a_draw_inverts_the_distribution_by_token_id(seed, options):
    logits_v = random_logits(600, seed=seed % 1000)
    sampling = SamplingParams(**options)
    drawn = uniform(seed, 3)
    cumulative = probabilities(logits_v, sampling).cumsum(0)
    token_id = choose(logits_v.numpy(), sampling, drawn)
    before = cumulative[token_id - 1].item() if token_id else 0.0
    assert before - 1e-9 <= drawn <= cumulative[token_id].item() + 1e-9


@pytest.mark.parametrize("drawn", [0.0, 1.0 - 2.0**-53])
def test_the_ends_of_the_unit_interval_choose_tokens_with_weight(drawn):
    logits_v = torch.full((1000,), -math.inf)
    logits_v[[300, 700]] = 1.0
    assert choose(logits_v.numpy(), SamplingParams(), drawn) == (300 if drawn == 0.0 else 700)


def test_random_numbers_are_uniform_and_apart():
    numbers = [uniform(seed, position) for seed in range(40) for position in range(100)]
    assert len(set(numbers)) == len(numbers)
    counts = torch.histc(torch.tensor(numbers, dtype=torch.float64), bins=20, min=0.0, max=1.0)
    assert ((counts - 200) ** 2 / 200).sum().item() < 43.8  # the 0.999 quantile for 19 degrees of freedom
    for shift in (1, 2):  # neighbouring seeds do not repeat each other's numbers
        pairs = torch.tensor([[uniform(s, p), uniform(s + shift, p)] for s in range(40) for p in range(50)])
        assert abs(torch.corrcoef(pairs.T)[0, 1].item()) < 0.08


def test_random_numbers_stay_the_same():
    # Pinned: another number here means that seeds of earlier releases give other texts.
    assert [uniform(0, 0), uniform(42, 7), uniform(-1, 1)] == [
        0.6524484863740322,
        0.7347204584623639,
        0.7408050620013817,
    ]


def test_the_exponential_function_is_near_enough():
    values = np.concatenate((np.linspace(-88, 0, 200_001, dtype=np.float32), [np.float32(-1e-30)]))
    exact = np.exp(values.astype(np.float64))
    there = values > -87.3
    assert np.abs(exp(values) / exact - 1)[there].max() < 2 * 2.0**-23
    ends = np.array([0.0, -88.5, -3e38, -np.inf], dtype=np.float32)
    assert exp(ends).tolist() == [1.0, 0.0, 0.0, 0.0]
    assert exp(values).max() == 1.0


def test_ties_go_to_the_lower_id():
    values = torch.tensor([1.0, 3.0, 3.0, 2.0, 3.0])
    assert top_ids(values.numpy(), 2).tolist() == [1, 2]
    assert top_ids(values.numpy(), 9).tolist() == [1, 2, 4, 3, 0]
    assert top_ids(values.numpy(), 0).tolist() == []
    ids, _ = survivors(values.numpy(), SamplingParams(top_k=2))
    assert ids.tolist() == [1, 2]
    ids, _ = survivors(values.numpy(), SamplingParams(top_p=0.5))
    assert ids.tolist() == [1, 2]
    (result,) = sample(values[None], [make_row(temperature=0, generated=[])])
    assert result.token_id == 1


@pytest.mark.parametrize("scale", [0.01, 1.0, 3.0])
@pytest.mark.parametrize("top_p", [0.1, 0.9, 0.999999, 0.99999999])
def test_the_nucleus_is_the_same_however_it_is_found(scale, top_p):
    logits_v = random_logits(5000, seed=8) * scale
    logits_v[100:200] = logits_v[50]
    weights = (logits_v - logits_v.max()).exp().double()
    ordered = weights.sort(descending=True, stable=True)
    kept = int((ordered.values.cumsum(0) - ordered.values < top_p * weights.sum()).sum())
    ids, _ = survivors(logits_v.numpy(), SamplingParams(top_p=top_p))
    assert abs(len(ids) - kept) <= 1  # sums in another order may differ by one token
    assert set(ids.tolist()) ^ set(ordered.indices[:kept].tolist()) <= set(
        ordered.indices[kept - 1 : kept + 1].tolist()
    )


# --- log-probabilities --------------------------------------------------------------------------------------


def test_logprobs_are_of_the_raw_logits():
    logits = random_logits(1, V)
    (result,) = sample(logits, [make_row(logprobs=5, temperature=2.0, logit_bias={40: 100.0})])
    expected = logits[0].log_softmax(dim=-1)
    assert result.token_id == 40
    assert result.logprob == pytest.approx(expected[40].item())
    assert result.rank == 1 + int((expected > expected[40]).sum())
    best = expected.sort(descending=True)
    assert list(result.top_ids) == best.indices[:5].tolist()
    assert list(result.top_logprobs) == pytest.approx(best.values[:5].tolist())


def test_zero_logprobs_report_the_token_alone():
    (result,) = sample(random_logits(1, V), [make_row(logprobs=0, temperature=0)])
    assert result.rank == 1
    assert result.logprob < 0
    assert not result.top_ids


def test_logprobs_of_given_tokens():
    logits = random_logits(4, V)
    results = token_logprobs(logits, [5, 6, 7, 8], 3)
    for logits_v, token_id, result in zip(logits, [5, 6, 7, 8], results, strict=True):
        expected = logits_v.log_softmax(dim=-1)
        assert (result.token_id, result.logprob) == (token_id, pytest.approx(expected[token_id].item()))
        assert list(result.top_ids) == expected.topk(3).indices.tolist()
    assert token_logprobs(logits[:0], [], 3) == []
    logits[2, 0] = math.nan
    with pytest.raises(EngineError, match="not finite"):
        token_logprobs(logits, [5, 6, 7, 8], 3)


# --- P1: each row by itself ---------------------------------------------------------------------------------

OPTIONS = st.fixed_dictionaries(
    {"temperature": st.sampled_from([0.0, 0.5, 1.0, 1.7]), "seed": st.integers(0, 2**40)},
    optional={
        "top_p": st.sampled_from([0.3, 0.9, 0.999]),
        "top_k": st.sampled_from([1, 5, 40]),
        "min_p": st.sampled_from([0.01, 0.2]),
        "typical_p": st.sampled_from([0.5, 0.9]),
        "repetition_penalty": st.sampled_from([0.8, 1.2]),
        "presence_penalty": st.just(0.5),
        "frequency_penalty": st.just(-0.5),
        "logit_bias": st.just({1: 2.0}),
        "allowed_token_ids": st.just(list(range(0, 60, 2))),
        "bad_words_token_ids": st.just([[2], [5, 4]]),
        "min_tokens": st.sampled_from([1, 5]),
        "stop_token_ids": st.just([6]),
        "logprobs": st.sampled_from([0, 3]),
    },
)


def check_rows_alone(logits: torch.Tensor, rows: list[SamplingRow], order: list[int]) -> None:
    together = sample(logits, rows)
    shuffled = sample(logits[order].contiguous(), [rows[i] for i in order])
    for place, i in enumerate(order):
        (alone,) = sample(logits[i : i + 1].clone(), [rows[i]])
        assert alone == together[i] == shuffled[place]  # bit for bit


@given(options=st.lists(OPTIONS, min_size=1, max_size=6), size=st.integers(61, 1200), data=st.data())
@PROPERTY
def test_a_row_gives_the_same_bits_in_any_company(options, size, data):
    rows = [make_row(position=i, prompt=[1, 2], generated=[3, 5], **each) for i, each in enumerate(options)]
    coarse = data.draw(st.booleans())  # many ties
    logits = random_logits(len(rows), size, seed=size)
    order = data.draw(st.permutations(range(len(rows))))
    check_rows_alone(logits.round() if coarse else logits, rows, order)


def test_a_row_gives_the_same_bits_with_a_large_vocabulary():
    kinds = [{"temperature": 0.0}, {}, {"top_p": 0.9}, {"top_k": 50}, {"min_p": 0.1}, {"typical_p": 0.9}]
    rows = [make_row(position=i, logprobs=2, **options) for i, options in enumerate(kinds)]
    check_rows_alone(random_logits(len(rows), 151_937), rows, [3, 1, 5, 0, 4, 2])


def test_a_result_depends_on_seed_and_position():
    logits = torch.zeros(1, 4096)

    def token(**options) -> int:
        (result,) = sample(logits, [make_row(**options)])
        return result.token_id

    assert token(seed=1, position=1) == token(seed=1, position=1)
    assert len({token(seed=seed, position=position) for seed in range(4) for position in range(4)}) == 16


# --- faults -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_broken_row_harms_no_other(bad):
    logits = random_logits(3, V)
    rows = [make_row(logprobs=2), make_row(logprobs=2), make_row(logprobs=2, temperature=0)]
    healthy = sample(logits, rows)
    broken = logits.clone()
    broken[1, 50] = bad
    first, error, last = sample(broken, rows)
    assert isinstance(error, EngineError)
    assert "position 7" in str(error)
    assert (first, last) == (healthy[0], healthy[2])
    assert isinstance(sample(torch.full((1, V), -math.inf), rows[:1])[0], EngineError)


def test_parameters_that_leave_nothing():
    row = make_row(allowed_token_ids=[4], bad_words_token_ids=[[4]])
    (error,) = sample(random_logits(1, V), [row])
    assert isinstance(error, InvalidParameter)
    assert error.param == "allowed_token_ids"


def test_logits_are_left_as_they_were():
    logits = random_logits(2, V)
    before = logits.clone()
    row = make_row(allowed_token_ids=[4], repetition_penalty=1.5, temperature=0.5, top_p=0.5)
    sample(logits, [row, replace(row, sampling=SamplingParams(seed=1, temperature=0.3))])
    assert torch.equal(logits, before)
    assert sample(logits[:0], []) == []
