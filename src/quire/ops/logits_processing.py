"""Changes to one row of logits before temperature: what may not be sampled, biases, penalties.

Legend: v vocabulary. `token_ids` are a request's prompt and what was generated after it, `num_prompt` says where the
prompt ends.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from quire.core.sampling import SamplingParams

_NEVER = float("-inf")


def process_logits(
    logits_v: Tensor, sampling: SamplingParams, token_ids: Sequence[int], num_prompt: int, eos_token_ids: Sequence[int]
) -> None:
    """Applies what `sampling` asks for, in vLLM's order, to a float32 row in place: the caller hands over a copy."""
    if sampling.allowed_token_ids is not None:
        _allow_only(logits_v, sampling.allowed_token_ids)
    forbidden = forbidden_ids(sampling, token_ids, num_prompt, eos_token_ids)
    if forbidden:
        logits_v[_indices(forbidden, logits_v)] = _NEVER
    if sampling.logit_bias:
        ids = _indices(list(sampling.logit_bias), logits_v)
        bias = torch.tensor(list(sampling.logit_bias.values()), dtype=torch.float32, device=logits_v.device)
        logits_v[ids] += bias
    _penalise(logits_v, sampling, token_ids, num_prompt)


def changes_logits(sampling: SamplingParams, num_generated: int) -> bool:
    """Whether `process_logits` would do anything."""
    return (
        penalises(sampling)
        or sampling.allowed_token_ids is not None
        or bool(sampling.bad_words_token_ids)
        or num_generated < sampling.min_tokens
        or bool(sampling.logit_bias)
    )


def penalises(sampling: SamplingParams) -> bool:
    """Whether the tokens so far matter to the next one's logits."""
    return sampling.repetition_penalty != 1.0 or sampling.frequency_penalty != 0.0 or sampling.presence_penalty != 0.0


def forbidden_ids(
    sampling: SamplingParams, token_ids: Sequence[int], num_prompt: int, eos_token_ids: Sequence[int]
) -> list[int]:
    """Ends of bad words that are all but complete, and what would stop a request that has not its `min_tokens` yet."""
    num_generated = len(token_ids) - num_prompt
    ids = []
    for word in sampling.bad_words_token_ids:
        num_before = len(word) - 1
        if num_before <= num_generated and list(token_ids[len(token_ids) - num_before :]) == list(word[:num_before]):
            ids.append(word[-1])
    if num_generated < sampling.min_tokens:
        ids += [*eos_token_ids, *sampling.stop_token_ids]
    return ids


def _allow_only(logits_v: Tensor, token_ids: Sequence[int]) -> None:
    ids = _indices(token_ids, logits_v)
    kept = logits_v[ids]
    logits_v.fill_(_NEVER)
    logits_v[ids] = kept


def _penalise(logits_v: Tensor, sampling: SamplingParams, token_ids: Sequence[int], num_prompt: int) -> None:
    """Repetition (Keskar et al., CTRL, 2019) looks at prompt and output; frequency and presence at the output."""
    if sampling.repetition_penalty != 1.0 and token_ids:
        # An id that comes twice is written twice, with the same value.
        ids = _indices(token_ids, logits_v)
        values = logits_v[ids]
        penalty = sampling.repetition_penalty
        logits_v[ids] = torch.where(values > 0, values / penalty, values * penalty)
    if num_prompt < len(token_ids) and (sampling.frequency_penalty or sampling.presence_penalty):
        generated = np.asarray(token_ids[num_prompt:], dtype=np.int64)
        distinct, counts = np.unique(generated, return_counts=True)
        ids = torch.from_numpy(distinct).to(logits_v.device)
        counts_of_ids = torch.from_numpy(counts).to(logits_v.device, torch.float32)
        logits_v[ids] -= sampling.frequency_penalty * counts_of_ids + sampling.presence_penalty


def _indices(token_ids: Sequence[int], logits_v: Tensor) -> Tensor:
    return torch.from_numpy(np.fromiter(token_ids, dtype=np.int64, count=len(token_ids))).to(logits_v.device)
