"""What an op is: a definition in plain torch, an input generator, and tolerances.

The definition is written to be read. A back end's implementation may go about it in any way that stays within the
tolerances, and that keeps promise P1: an output row has the same bits whatever other rows stand in the call.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from quire.ops.target import Target

Inputs = dict[str, Any]
"""Keyword arguments of one call."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tolerance:
    relative: float
    absolute: float


def default_tolerances() -> Mapping[torch.dtype, Tolerance]:
    """A few roundings' worth."""
    return {
        torch.float32: Tolerance(relative=1e-5, absolute=1e-5),
        torch.bfloat16: Tolerance(relative=2e-2, absolute=2e-2),
        torch.float16: Tolerance(relative=2e-3, absolute=2e-3),
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class Op:
    """`inputs(rows, dtype, generator)` makes the arguments of a call over `rows` rows, of otherwise random shape.

    `row_arguments` are the arguments whose first dimension is the row, as it is of every result: a call over some of
    the rows must give those rows' results bit for bit. An op without row arguments (one that sees a whole batch, such
    as attention) has a row test of its own.
    """

    name: str
    definition: Callable[..., Any]
    inputs: Callable[[int, torch.dtype, torch.Generator], Inputs]
    row_arguments: tuple[str, ...] = ()
    tolerances: Mapping[torch.dtype, Tolerance] = field(default_factory=default_tolerances)


@dataclass(frozen=True, slots=True, kw_only=True)
class Implementation:
    """One back end's way to compute an op.

    `unfit(target)` says why it cannot serve there, or None when it can. `build(target)` makes the
    callable that one engine uses; whatever it learns about the machine it keeps to itself. Of the implementations that
    fit, the one with the highest `preference` serves; `note` says in `quire kernels` what it is.
    """

    op: str
    backend: str
    build: Callable[[Target], Any]
    unfit: Callable[[Target], str | None]
    preference: int
    note: str


def random_tensor(*shape: int, dtype: torch.dtype, generator: torch.Generator, scale: float = 1.0) -> Tensor:
    """Normally distributed numbers, for input generators."""
    return torch.randn(*shape, generator=generator).mul_(scale).to(dtype)


def random_int(low: int, high: int, generator: torch.Generator) -> int:
    """A number in low..high, both included, for input generators."""
    return int(torch.randint(low, high + 1, (1,), generator=generator).item())
