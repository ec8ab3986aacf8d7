"""Sampling that stays on the device: what a captured step does with its logits.

It draws as the op `sample` does, for parameters that need no look at the tokens so far, and tells no log-probabilities.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Protocol

import torch
from torch import Tensor

from quire.core.sampling import SamplingParams

NOT_FINITE = -1
"""In the place of a token: the row's logits are not finite."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DrawTable:
    """Sampling parameters on the device, one entry per row, in buffers that keep their addresses.

    `temperature` (0: greedy) and `min_p` float32, `top_k` (0: all) int32, `top_p` and `typical_p` float64, `seed`
    int64, as in `SamplingParams`.
    """

    temperature: Tensor
    min_p: Tensor
    top_k: Tensor
    top_p: Tensor
    typical_p: Tensor
    seed: Tensor

    @classmethod
    def greedy(cls, rows: int, device: torch.device) -> DrawTable:
        def full(value: float, dtype: torch.dtype) -> Tensor:
            return torch.full((rows,), value, dtype=dtype, device=device)

        return cls(
            temperature=full(0, torch.float32),
            min_p=full(0, torch.float32),
            top_k=full(0, torch.int32),
            top_p=full(1, torch.float64),
            typical_p=full(1, torch.float64),
            seed=full(0, torch.int64),
        )

    def rows(self, count: int) -> DrawTable:
        """A view of the first `count`."""
        return DrawTable(**{field.name: getattr(self, field.name)[:count] for field in fields(self)})


def drawable(sampling: SamplingParams) -> bool:
    """Whether a request's tokens can be drawn without the host: parameters of a `DrawTable` say it all."""
    return (
        sampling.logprobs is None
        and sampling.prompt_logprobs is None
        and not sampling.reads_tokens
        and sampling.allowed_token_ids is None
        and not sampling.logit_bias
    )


class Draw(Protocol):
    def __call__(self, logits_sv: Tensor, table: DrawTable, position_s: Tensor) -> Tensor:
        """int64 `[s]`: for each row of float32 logits the token at `position_s` (int64), or `NOT_FINITE`.

        Nothing is copied to or from the host, so that it can be part of a captured graph.
        """
        ...
