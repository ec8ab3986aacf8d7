"""A whole stack of standard decoder layers as one call.

Not an op with a definition of its own: what it computes is what the ops compute one by one, to the bit, and that is
how it is tested. A back end may offer it where the calls themselves cost; a model whose layers are of another build
goes op by op.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec
from torch import Tensor

from quire.ops.attention import AttentionShape, PagedRequests


@dataclass(frozen=True, slots=True, kw_only=True)
class StackLinear:
    """`weight` as the back end's own linear kernel packed it."""

    weight: Any
    bias: Tensor | None


@dataclass(frozen=True, slots=True, kw_only=True)
class StackLayer:
    """Pre-norm attention and gated feed-forward block around a residual stream."""

    attention_norm: Tensor
    q: StackLinear
    k: StackLinear
    v: StackLinear
    o: StackLinear
    q_norm: Tensor | None
    k_norm: Tensor | None
    mlp_norm: Tensor
    gate: StackLinear
    up: StackLinear
    down: StackLinear


@dataclass(frozen=True, slots=True, kw_only=True)
class StackDescription:
    """`cos` and `sin` are the whole table, float32 `[positions, r / 2]`."""

    layers: Sequence[StackLayer]
    embedding: Tensor
    norm: Tensor
    cos: Tensor
    sin: Tensor
    eps: float
    attention: AttentionShape


class StackInputs(msgspec.Struct, frozen=True, kw_only=True):
    """One step; fields as in `ForwardBatch`. `kv` is the cache of all layers."""

    token_ids_t: Tensor
    positions_t: Tensor
    slots_t: Tensor
    rows_s: Tensor
    requests: PagedRequests
    kv: Tensor


class Stack(Protocol):
    @property
    def reads_lengths(self) -> bool:
        """As of `AttentionKernel`."""
        ...

    def __call__(self, inputs: StackInputs) -> Tensor:
        """Writes K and V of all tokens; the normed hidden states `[s, e]` of `rows_s`, which rise."""
        ...


BuildStack = Callable[[StackDescription], Stack | None]
"""None for a description that the back end's stack does not cover."""
