"""Gated activations of the feed-forward block.

Built from exp, add and divide. torch's own `silu` and `sigmoid` round differently in the last few elements of a tensor
(its scalar code) than in the others (its vector code), so that a row's bits would depend on where it stands.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quire.ops.op import Inputs, Op, random_int, random_tensor


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, elementwise; silu in float32, rounded to the dtype before the product."""
    wide = gate.float()
    activated = wide / wide.neg().exp_().add_(1.0)
    return activated.to(gate.dtype).mul_(up)


def _inputs(rows: int, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    width = random_int(1, 700, generator)
    return {
        "gate": random_tensor(rows, width, dtype=dtype, generator=generator, scale=4.0),
        "up": random_tensor(rows, width, dtype=dtype, generator=generator),
    }


SILU_MUL = Op(name="silu_mul", definition=silu_mul, inputs=_inputs, row_arguments=("gate", "up"))
