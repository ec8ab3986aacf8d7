"""Sampling: the last rows of a step's logits become tokens.

Legend: s rows, v vocabulary. Everything here keeps the promise of same bits: what a row gives depends on its logits,
its parameters, its seed and its position alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from quire.core.errors import EngineError, InvalidParameter, QuireError
from quire.core.request import TokenLogprobs
from quire.core.sampling import SamplingParams
from quire.nn.choosing import Floats, choose, top_ids
from quire.nn.logits_processing import changes_logits, process_logits
from quire.nn.randomness import uniform


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingRow:
    """What belongs to one row of logits. `position` is that of the token to be sampled."""

    sampling: SamplingParams
    position: int
    prompt_token_ids: Sequence[int]
    generated_token_ids: Sequence[int]
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
    best_s, finite_s = _best(logits_sv)
    return [
        _sample_row(logits_v, row, best) if finite else _not_finite(row.position)
        for logits_v, row, best, finite in zip(logits_sv, rows, best_s, finite_s, strict=True)
    ]


def prompt_logprobs(logits_sv: Tensor, target_ids: Sequence[int], num_top: int) -> list[TokenLogprobs]:
    """Log-probabilities of given tokens: row i of `logits_sv` is what the model says about `target_ids[i]`.

    `num_top` alternatives each. Raises `EngineError` for logits that are not finite.
    """
    assert logits_sv.shape[0] == len(target_ids), (logits_sv.shape, len(target_ids))
    if not target_ids:
        return []
    _, finite_s = _best(logits_sv)
    if not all(finite_s):
        raise _not_finite(finite_s.index(False))
    # One row at a time: a long prompt's log-probabilities together would be as large as its logits.
    return [
        _token_logprobs(logits_v, token_id, num_top) for logits_v, token_id in zip(logits_sv, target_ids, strict=True)
    ]


def _best(logits_sv: Tensor) -> tuple[list[int], list[bool]]:
    """Per row the id of its maximum (the lowest of equal ones), and whether that is a finite number.

    NaN counts as the maximum, so this finds it as well.
    """
    best_s1 = logits_sv.argmax(dim=-1, keepdim=True)
    finite_s1 = logits_sv.gather(-1, best_s1).isfinite()
    return best_s1[:, 0].tolist(), finite_s1[:, 0].tolist()


def _sample_row(logits_v: Tensor, row: SamplingRow, best: int) -> TokenLogprobs | QuireError:
    sampling = row.sampling
    changed_v = logits_v
    if changes_logits(sampling, len(row.generated_token_ids)):
        changed_v = logits_v.clone()
        process_logits(changed_v, sampling, row.prompt_token_ids, row.generated_token_ids, row.eos_token_ids)
        best = int(changed_v.argmax())
        if not math.isfinite(changed_v[best].item()):
            return _nothing_left(row)
    if sampling.greedy:
        token_id = best
    else:
        assert sampling.seed is not None, "the front end sets the seed"
        token_id = choose(_on_host(changed_v), sampling, uniform(sampling.seed, row.position))
    if sampling.logprobs is None:
        return TokenLogprobs(token_id, 0.0, 0)
    return _token_logprobs(logits_v, token_id, sampling.logprobs)


def _token_logprobs(logits_v: Tensor, token_id: int, num_top: int) -> TokenLogprobs:
    logprobs_v = _on_host(logits_v.log_softmax(dim=-1))
    values_v = _on_host(logits_v)
    # Counting is exact in any order, unlike a sum of floats.
    rank = int(np.count_nonzero(values_v > values_v[token_id])) + 1
    ids_k = top_ids(values_v, num_top)
    return TokenLogprobs(
        token_id, float(logprobs_v[token_id]), rank, tuple(ids_k.tolist()), tuple(logprobs_v[ids_k].tolist())
    )


def _on_host(values_v: Tensor) -> Floats:
    array: Floats = values_v.cpu().numpy()
    return array


def _not_finite(position: int) -> EngineError:
    return EngineError(
        f"The model's logits for position {position} are not finite.",
        remedy="Try another dtype (float32 or bfloat16 instead of float16), or check the checkpoint.",
    )


def _nothing_left(row: SamplingRow) -> InvalidParameter:
    return InvalidParameter(
        f"The sampling parameters leave no token for position {row.position}.",
        param="allowed_token_ids" if row.sampling.allowed_token_ids is not None else "bad_words",
        remedy="Allow more tokens, or forbid fewer.",
    )
