"""Rows in 8 bits, as `quantize_rows` and `quantize_rows_fp8` of `ops.linear` have them."""

from __future__ import annotations

import torch
from torch import Tensor

from quire.ops.triton.kernels.quantize import quantize_rows_kernel
from quire.ops.triton.launch import Launch


def quantize(
    launch: Launch, x_tk: Tensor, dtype: torch.dtype, group_size: int = 0, *, halves: bool = False
) -> tuple[Tensor, Tensor]:
    """(values `[t, k]` in `dtype`, scale float32 `[t, k / group_size]`). `group_size` 0: the whole row.

    `halves`: within a group, the features of even number come first and then the odd ones.
    """
    t, k = x_tk.shape
    size, floats = group_size or k, dtype == torch.float8_e4m3fn
    x = x_tk if x_tk.stride(1) == 1 else x_tk.contiguous()
    values = torch.empty(t, k, dtype=dtype, device=x.device)
    scales = torch.empty(t, k // size, dtype=torch.float32, device=x.device)
    if t:
        block = max(16, 1 << (size - 1).bit_length())
        launch(
            quantize_rows_kernel,
            (t, k // size),
            x,
            values.view(torch.int8) if floats else values,
            scales,
            k,
            x.stride(0),
            GROUP=group_size,
            BLOCK=block,
            HALVES=halves,
            FLOATS=floats,
            num_warps=max(1, min(16, block // 512)),
        )
    return values, scales
