"""Sampling that stays on the device: what a captured step does with its logits.

It draws as the op `sample` does, for parameters that need no look at the tokens so far, and tells no log-probabilities.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Protocol

import torch
from torch import Tensor

from quire.core.sampling import SamplingParams
from quire.ops.choosing import choose
from quire.ops.moving import to_device
from quire.ops.op import Inputs, Op, random_int, random_tensor
from quire.ops.randomness import uniform
from quire.ops.sampling import EXACT, best, random_params

NOT_FINITE = -1
"""In the place of a token: the row's logits are not finite."""
MAX_TOP_K = 2**31 - 1
"""What an int32 holds; no vocabulary is larger."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DrawTable:
    """Sampling parameters on the device, one entry per row, in buffers that keep their addresses: all that there is to
    know of those that are `drawable`.

    `temperature` (0: greedy) and `min_p` float32, `top_k` (0: all) int32, `top_p` float64, `seed` int64, as in
    `SamplingParams`.
    """

    temperature: Tensor
    min_p: Tensor
    top_k: Tensor
    top_p: Tensor
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
            seed=full(0, torch.int64),
        )

    def __getitem__(self, rows: slice) -> DrawTable:
        """A view of some rows."""
        return DrawTable(**{field.name: getattr(self, field.name)[rows] for field in fields(self)})

    def set(self, row: int, sampling: SamplingParams) -> None:
        """On a CPU."""
        told = replace(
            sampling,
            temperature=0.0 if sampling.greedy else sampling.temperature,
            top_k=min(max(0, sampling.top_k), MAX_TOP_K),
            seed=sampling.seed or 0,
        )
        for field in fields(self):
            getattr(self, field.name)[row] = getattr(told, field.name)

    def put(self, rows_s: Tensor, other: DrawTable) -> None:
        """Copies the rows of `other` to `rows_s`, both on this device."""
        for field in fields(self):
            getattr(self, field.name).index_copy_(0, rows_s, getattr(other, field.name))

    def to(self, device: torch.device) -> DrawTable:
        return DrawTable(**{field.name: to_device(getattr(self, field.name), device) for field in fields(self)})


def table_of(samplings: Sequence[SamplingParams], device: torch.device) -> DrawTable:
    """One row for each, uploaded."""
    table = DrawTable.greedy(len(samplings), torch.device("cpu"))
    for row, sampling in enumerate(samplings):
        table.set(row, sampling)
    return table.to(device)


class Draw(Protocol):
    def __call__(self, logits_sv: Tensor, table: DrawTable, position_s: Tensor) -> Tensor:
        """int64 `[s]`: for each row of float32 logits the token at `position_s` (int64), or `NOT_FINITE`.

        Nothing is copied to or from the host, so that it can be part of a captured graph.
        """
        ...


def draw(logits_sv: Tensor, table: DrawTable, position_s: Tensor) -> Tensor:
    """The definition: row by row, on the host."""
    settings = zip(*(getattr(table, field.name).tolist() for field in fields(table)), strict=True)
    best_s, finite_s = best(logits_sv)
    drawn = []
    for row, (temperature, min_p, top_k, top_p, seed) in enumerate(settings):
        sampling = SamplingParams(temperature=temperature, min_p=min_p, top_k=top_k, top_p=top_p, seed=seed)
        if not finite_s[row]:
            drawn.append(NOT_FINITE)
        elif temperature == 0.0:
            drawn.append(best_s[row])
        else:
            values_v = logits_sv[row].cpu().numpy()
            drawn.append(choose(values_v, sampling, uniform(seed, int(position_s[row]))))
    return torch.tensor(drawn, dtype=torch.int64, device=logits_sv.device)


def _inputs(rows: int, _dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    vocab = random_int(1, 3000, generator)
    logits_sv = random_tensor(rows, vocab, dtype=torch.float32, generator=generator, scale=3.0)
    table = DrawTable.greedy(rows, torch.device("cpu"))
    for row in range(rows):
        table.set(row, random_params(vocab, generator))
    return {
        "logits_sv": logits_sv.round() if random_int(0, 1, generator) else logits_sv,  # many ties
        "table": table,
        "position_s": torch.randint(0, 1000, (rows,), generator=generator),
    }


DRAW = Op(
    name="draw", definition=draw, inputs=_inputs, row_arguments=("logits_sv", "table", "position_s"), tolerances=EXACT
)
