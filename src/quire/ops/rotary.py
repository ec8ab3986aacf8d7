"""Rotary position embedding (Su et al., 2021), in the layout that pairs dimension i with i + r/2.

Legend: t tokens, h heads, d head dim, r rotated dimensions (r <= d; the others pass through).
"""

from __future__ import annotations

import torch
from torch import Tensor

from quire.ops.op import Inputs, Op, random_int, random_tensor


def rope(x_thd: Tensor, cos_tr: Tensor, sin_tr: Tensor) -> Tensor:
    """Rotates each head. `cos_tr` and `sin_tr` are float32 `[t, r/2]`, one angle per pair."""
    half = cos_tr.shape[-1]
    cos, sin = cos_tr.unsqueeze(1), sin_tr.unsqueeze(1)
    first, second = x_thd[..., :half].float(), x_thd[..., half : 2 * half].float()
    out_thd = torch.empty_like(x_thd)
    out_thd[..., :half] = first * cos - second * sin
    out_thd[..., half : 2 * half] = second * cos + first * sin
    out_thd[..., 2 * half :] = x_thd[..., 2 * half :]
    return out_thd


def _inputs(rows: int, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    half = random_int(1, 64, generator)
    head_dim = 2 * half + random_int(0, 16, generator)
    angle = random_tensor(rows, half, dtype=torch.float32, generator=generator, scale=10.0)
    return {
        "x_thd": random_tensor(rows, random_int(1, 9, generator), head_dim, dtype=dtype, generator=generator),
        "cos_tr": angle.cos(),
        "sin_tr": angle.sin(),
    }


ROPE = Op(name="rope", definition=rope, inputs=_inputs, row_arguments=("x_thd", "cos_tr", "sin_tr"))
