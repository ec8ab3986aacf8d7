"""`linear`: y = x W^T + b. Legend: t rows, k features in, n features out."""

from __future__ import annotations

import torch
from torch import Tensor

from quire.ops.op import Inputs, Op, Tolerance, random_int, random_tensor


def linear(x_tk: Tensor, weight_nk: Tensor, bias_n: Tensor | None = None) -> Tensor:
    """Accumulated in float32 or better, rounded once to the dtype of `x_tk`."""
    y_tn = x_tk.double() @ weight_nk.double().T
    return (y_tn if bias_n is None else y_tn + bias_n.double()).to(x_tk.dtype)


def _inputs(rows: int, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    k, n = random_int(1, 300, generator), random_int(1, 300, generator)
    bias = random_tensor(n, dtype=dtype, generator=generator) if random_int(0, 1, generator) else None
    return {
        "x_tk": random_tensor(rows, k, dtype=dtype, generator=generator),
        "weight_nk": random_tensor(n, k, dtype=dtype, generator=generator, scale=k**-0.5),
        "bias_n": bias,
    }


LINEAR = Op(
    name="linear",
    definition=linear,
    inputs=_inputs,
    row_arguments=("x_tk",),
    tolerances={
        torch.float32: Tolerance(relative=1e-5, absolute=1e-5),
        torch.bfloat16: Tolerance(relative=1.6e-2, absolute=1e-2),
        torch.float16: Tolerance(relative=2e-3, absolute=2e-3),
    },
)
