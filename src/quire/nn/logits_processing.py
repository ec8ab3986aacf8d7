"""Changes to one row of logits before temperature: what may not be sampled, biases, penalties.

Legend: v vocabulary. All functions change a float32 row in place; the caller hands over a copy.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from quire.core.sampling import SamplingParams

_NEVER = float("-inf")


def process_logits(
    logits_v: Tensor,
    sampling: SamplingParams,
    prompt_token_ids: Sequence[int],
    generated_token_ids: Sequence[int],
    eos_token_ids: Sequence[int],
) -> None:
    """Applies what `sampling` asks for, in vLLM's order."""
    if sampling.allowed_token_ids is not None:
        _allow_only(logits_v, sampling.allowed_token_ids)
    forbidden = _bad_word_ends(sampling.bad_words_token_ids, generated_token_ids)
    if len(generated_token_ids) < sampling.min_tokens:
        forbidden += [*eos_token_ids, *sampling.stop_token_ids]
    if forbidden:
        logits_v[_indices(forbidden, logits_v)] = _NEVER
    if sampling.logit_bias:
        ids = _indices(list(sampling.logit_bias), logits_v)
        bias = torch.tensor(list(sampling.logit_bias.values()), dtype=torch.float32, device=logits_v.device)
        logits_v[ids] += bias
    _penalise(logits_v, sampling, prompt_token_ids, generated_token_ids)


def changes_logits(sampling: SamplingParams, num_generated: int) -> bool:
    """Whether `process_logits` would do anything."""
    return (
        sampling.allowed_token_ids is not None
        or bool(sampling.bad_words_token_ids)
        or num_generated < sampling.min_tokens
        or bool(sampling.logit_bias)
        or sampling.repetition_penalty != 1.0
        or sampling.frequency_penalty != 0.0
        or sampling.presence_penalty != 0.0
    )


def _allow_only(logits_v: Tensor, token_ids: Sequence[int]) -> None:
    ids = _indices(token_ids, logits_v)
    kept = logits_v[ids]
    logits_v.fill_(_NEVER)
    logits_v[ids] = kept


def _bad_word_ends(bad_words: Sequence[Sequence[int]], generated: Sequence[int]) -> list[int]:
    """The last token of each bad word whose other tokens are what was generated last."""
    ends = []
    for word in bad_words:
        num_before = len(word) - 1
        if num_before <= len(generated) and (
            not num_before or list(generated[-num_before:]) == list(word[:num_before])
        ):
            ends.append(word[-1])
    return ends


def _penalise(logits_v: Tensor, sampling: SamplingParams, prompt: Sequence[int], generated: Sequence[int]) -> None:
    """Repetition (Keskar et al., CTRL, 2019) looks at prompt and output; frequency and presence at the output."""
    if sampling.repetition_penalty != 1.0 and (prompt or generated):
        # An id that comes twice is written twice, with the same value.
        ids = _indices([*prompt, *generated], logits_v)
        values = logits_v[ids]
        penalty = sampling.repetition_penalty
        logits_v[ids] = torch.where(values > 0, values / penalty, values * penalty)
    if generated and (sampling.frequency_penalty or sampling.presence_penalty):
        distinct, counts = np.unique(np.asarray(generated, dtype=np.int64), return_counts=True)
        ids = torch.from_numpy(distinct).to(logits_v.device)
        counts_of_ids = torch.from_numpy(counts).to(logits_v.device, torch.float32)
        logits_v[ids] -= sampling.frequency_penalty * counts_of_ids + sampling.presence_penalty


def _indices(token_ids: Sequence[int], logits_v: Tensor) -> Tensor:
    return torch.from_numpy(np.fromiter(token_ids, dtype=np.int64, count=len(token_ids))).to(logits_v.device)
