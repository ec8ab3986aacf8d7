"""`sample` and `token_logprobs`: the last rows of a step's logits become tokens.

Legend: s rows, v vocabulary. Everything here keeps promise P1: what a row gives depends on its logits, its parameters,
its seed and its position alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from quire.core.errors import EngineError, InvalidParameter, QuireError
from quire.core.request import TokenLogprobs
from quire.core.sampling import SamplingParams
from quire.ops.choosing import Floats, choose, exp, top_ids, weight_of_all
from quire.ops.logits_processing import changes_logits, process_logits
from quire.ops.op import Inputs, Op, Tolerance, random_int, random_tensor
from quire.ops.randomness import uniform


@dataclass(slots=True, kw_only=True)
class SamplingRow:
    """What belongs to one row of logits. `position` is that of the token to be sampled.

    `token_ids` are the request's own, prompt first, and neither copied nor kept: only some parameters need them.
    """

    sampling: SamplingParams
    position: int
    token_ids: Sequence[int]
    num_prompt_tokens: int
    eos_token_ids: Sequence[int]


def sample(logits_sv: Tensor, rows: Sequence[SamplingRow]) -> list[TokenLogprobs | QuireError]:
    """Samples one token per row of float32 `logits_sv`, on any device.

    Order of operations: log-probabilities of the raw logits; allowed_token_ids, bad_words, min_tokens,
    logit_bias; penalties; greedy: the largest, of equal ones the lowest id; otherwise temperature, min_p, top_k,
    top_p, typical_p, and a draw.

    A row that cannot be sampled gives an error in its place, and the other rows do not notice: `EngineError` for
    logits that are not finite, `InvalidParameter` when the parameters leave no token. A row whose request did not
    ask for logprobs has `rank` 0 and `logprob` 0, not computed.
    """
    assert logits_sv.shape[0] == len(rows), (logits_sv.shape, len(rows))
    if not rows:
        return []
    best_s, finite_s = best(logits_sv)
    return [
        _sample_row(logits_v, row, best) if finite else not_finite(row.position)
        for logits_v, row, best, finite in zip(logits_sv, rows, best_s, finite_s, strict=True)
    ]


def token_logprobs(logits_sv: Tensor, token_ids: Sequence[int], num_top: int) -> list[TokenLogprobs]:
    """Log-probabilities of given tokens: row i of float32 `logits_sv` is what the model says about `token_ids[i]`.

    `num_top` alternatives each. Raises `EngineError` for logits that are not finite.
    """
    assert logits_sv.shape[0] == len(token_ids), (logits_sv.shape, len(token_ids))
    if not token_ids:
        return []
    _, finite_s = best(logits_sv)
    if not all(finite_s):
        raise not_finite(finite_s.index(False))
    # One row at a time: a long prompt's log-probabilities together would be as large as its logits.
    return [
        _token_logprobs(logits_v, token_id, num_top) for logits_v, token_id in zip(logits_sv, token_ids, strict=True)
    ]


def not_finite(position: int) -> EngineError:
    return EngineError(
        f"The model's logits for position {position} are not finite.",
        remedy="Try another dtype (float32 or bfloat16 instead of float16), or check the checkpoint.",
    )


def nothing_left(row: SamplingRow) -> InvalidParameter:
    return InvalidParameter(
        f"The sampling parameters leave no token for position {row.position}.",
        param="allowed_token_ids" if row.sampling.allowed_token_ids is not None else "bad_words",
        remedy="Allow more tokens, or forbid fewer.",
    )


def best(logits_sv: Tensor) -> tuple[list[int], list[bool]]:
    """Per row the id of its maximum (the lowest of equal ones), and whether that is a finite number.

    NaN counts as the maximum, so this finds it as well.
    """
    best_s1 = logits_sv.argmax(dim=-1, keepdim=True)
    finite_s1 = logits_sv.gather(-1, best_s1).isfinite()
    return best_s1[:, 0].tolist(), finite_s1[:, 0].tolist()


def _sample_row(logits_v: Tensor, row: SamplingRow, best: int) -> TokenLogprobs | QuireError:
    sampling = row.sampling
    changed_v = logits_v
    if changes_logits(sampling, len(row.token_ids) - row.num_prompt_tokens):
        changed_v = logits_v.clone()
        process_logits(changed_v, sampling, row.token_ids, row.num_prompt_tokens, row.eos_token_ids)
        best = int(changed_v.argmax())
        if not math.isfinite(changed_v[best].item()):
            return nothing_left(row)
    if sampling.greedy:
        token_id = best
    else:
        assert sampling.seed is not None, "the front end sets the seed"
        token_id = choose(_on_host(changed_v), sampling, uniform(sampling.seed, row.position))
    if sampling.logprobs is None:
        return TokenLogprobs(token_id, 0.0, 0)
    return _token_logprobs(logits_v, token_id, sampling.logprobs)


def _token_logprobs(logits_v: Tensor, token_id: int, num_top: int) -> TokenLogprobs:
    values_v = _on_host(logits_v)
    largest = values_v.max()
    with np.errstate(over="ignore"):
        log_of_sum = math.log(weight_of_all(exp(values_v - largest)))
    ids_k = top_ids(values_v, num_top)
    logprobs = (values_v[[token_id, *ids_k]].astype(np.float64) - float(largest) - log_of_sum).astype(np.float32)
    # Counting is exact in any order, unlike a sum of floats.
    rank = int(np.count_nonzero(values_v > values_v[token_id])) + 1
    return TokenLogprobs(token_id, float(logprobs[0]), rank, tuple(ids_k.tolist()), tuple(logprobs[1:].tolist()))


def _on_host(values_v: Tensor) -> Floats:
    array: Floats = values_v.cpu().numpy()
    return array


def random_params(vocab: int, generator: torch.Generator) -> SamplingParams:
    """Greedy, plain and all kinds of truncation and change, each now and then."""

    def now_and_then(value: float, otherwise: float) -> float:
        return value if random_int(0, 3, generator) == 0 else otherwise

    def some_ids() -> list[int]:
        return torch.randint(0, vocab, (4,), generator=generator).tolist()

    return SamplingParams(
        seed=random_int(0, 2**40, generator),
        temperature=now_and_then(0.0, random_int(3, 20, generator) / 10),
        min_p=now_and_then(0.02, 0.0),
        top_k=int(now_and_then(random_int(1, vocab, generator), 0)),
        top_p=now_and_then(random_int(1, 999, generator) / 1000, 1.0),
        typical_p=now_and_then(random_int(1, 999, generator) / 1000, 1.0),
        repetition_penalty=now_and_then(1.3, 1.0),
        frequency_penalty=now_and_then(0.3, 0.0),
        presence_penalty=now_and_then(-0.7, 0.0),
        logit_bias=dict.fromkeys(some_ids(), 1.5) if random_int(0, 3, generator) == 0 else {},
        allowed_token_ids=some_ids() if random_int(0, 7, generator) == 0 else None,
        bad_words_token_ids=[some_ids()[:1]] if random_int(0, 3, generator) == 0 else (),
        min_tokens=int(now_and_then(9, 0)),
        stop_token_ids=some_ids()[:2],
        logprobs=random_int(0, 5, generator) if random_int(0, 1, generator) else None,
    )


def _sample_inputs(rows: int, _dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    vocab = random_int(1, 3000, generator)

    def row() -> SamplingRow:
        num_tokens = random_int(1, 30, generator)
        return SamplingRow(
            sampling=random_params(vocab, generator),
            position=num_tokens,
            token_ids=torch.randint(0, vocab, (num_tokens,), generator=generator).tolist(),
            num_prompt_tokens=random_int(0, num_tokens, generator),
            eos_token_ids=[0],
        )

    return {"logits_sv": _random_logits(rows, vocab, generator), "rows": [row() for _ in range(rows)]}


def _token_logprobs_inputs(rows: int, _dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    vocab = random_int(1, 3000, generator)
    return {
        "logits_sv": _random_logits(rows, vocab, generator),
        "token_ids": torch.randint(0, vocab, (rows,), generator=generator).tolist(),
        "num_top": random_int(0, 8, generator),
    }


def _random_logits(rows: int, vocab: int, generator: torch.Generator) -> Tensor:
    logits = random_tensor(rows, vocab, dtype=torch.float32, generator=generator, scale=3.0)
    return logits.round() if random_int(0, 1, generator) else logits  # many ties


EXACT = {dtype: Tolerance(relative=0.0, absolute=0.0) for dtype in (torch.float32, torch.bfloat16, torch.float16)}
SAMPLE = Op(
    name="sample",
    definition=sample,
    inputs=_sample_inputs,
    row_arguments=("logits_sv", "rows"),
    tolerances=EXACT,
)
TOKEN_LOGPROBS = Op(
    name="token_logprobs",
    definition=token_logprobs,
    inputs=_token_logprobs_inputs,
    row_arguments=("logits_sv", "token_ids"),
    tolerances=EXACT,
)
