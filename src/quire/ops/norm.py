"""Root mean square normalisation (Zhang and Sennrich, 2019), over the last dimension.

Computed in float32 and rounded to the dtype of `x` before the weight is applied, as `transformers` does.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quire.ops.op import Inputs, Op, random_int, random_tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float, weight_offset: float = 0.0) -> Tensor:
    """`x` is `[..., d]`, `weight` `[d]`. Also the norm of each query and key head, with `x` as `[t, h, d]`.

    Models that store the weight less one have `weight_offset` 1; theirs is applied in float32 and rounded once.
    """
    wide = x.float()
    scale = wide.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
    if weight_offset:
        return (wide * scale * (weight.float() + weight_offset)).to(x.dtype)
    return (wide * scale).to(x.dtype).mul_(weight)


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, weight_offset: float = 0.0
) -> tuple[Tensor, Tensor]:
    """The norm of `x + residual`, and `x + residual` itself: the residual stream of the next block."""
    total = x + residual
    return rms_norm(total, weight, eps, weight_offset), total


def _rms_norm_inputs(rows: int, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    width = random_int(1, 1500, generator)
    heads = (random_int(1, 5, generator),) if random_int(0, 1, generator) else ()
    return {
        "x": random_tensor(rows, *heads, width, dtype=dtype, generator=generator),
        "weight": random_tensor(width, dtype=dtype, generator=generator),
        "eps": 1e-6,
        "weight_offset": float(random_int(0, 1, generator)),
    }


def _add_rms_norm_inputs(rows: int, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    inputs = _rms_norm_inputs(rows, dtype, generator)
    x = inputs.pop("x")
    return {"x": x, "residual": random_tensor(*x.shape, dtype=dtype, generator=generator), **inputs}


RMS_NORM = Op(name="rms_norm", definition=rms_norm, inputs=_rms_norm_inputs, row_arguments=("x",))
ADD_RMS_NORM = Op(
    name="add_rms_norm", definition=add_rms_norm, inputs=_add_rms_norm_inputs, row_arguments=("x", "residual")
)
