"""Layer normalisation (Ba et al., 2016), over the last dimension: in float32, rounded once."""

from __future__ import annotations

import torch
from torch import Tensor

from quire.ops.op import Inputs, Op, random_int, random_tensor


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """`x` is `[..., d]`, `weight` and `bias` `[d]`."""
    wide = x.float()
    centered = wide - wide.mean(-1, keepdim=True)
    scale = centered.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
    normed = centered.mul_(scale).mul_(weight.float())
    return (normed if bias is None else normed.add_(bias.float())).to(x.dtype)


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """The norm of `x + residual`, and `x + residual` itself: the residual stream of the next block."""
    total = x + residual
    return layer_norm(total, weight, bias, eps), total


def _layer_norm_inputs(rows: int, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    width = random_int(1, 1500, generator)
    bias = random_tensor(width, dtype=dtype, generator=generator) if random_int(0, 1, generator) else None
    return {
        "x": random_tensor(rows, width, dtype=dtype, generator=generator) + 1,
        "weight": random_tensor(width, dtype=dtype, generator=generator),
        "bias": bias,
        "eps": 1e-5,
    }


def _add_layer_norm_inputs(rows: int, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    inputs = _layer_norm_inputs(rows, dtype, generator)
    x = inputs.pop("x")
    return {"x": x, "residual": random_tensor(*x.shape, dtype=dtype, generator=generator), **inputs}


LAYER_NORM = Op(name="layer_norm", definition=layer_norm, inputs=_layer_norm_inputs, row_arguments=("x",))
ADD_LAYER_NORM = Op(
    name="add_layer_norm",
    definition=add_layer_norm,
    inputs=_add_layer_norm_inputs,
    row_arguments=("x", "residual"),
)
