"""Rows of a tensor of any shape, as kernels address them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_ALIGNED = 16
"""Triton compiles a kernel anew for an address or a number that is a multiple of this."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RowView:
    """Row r of `[..., d]` begins at (r // inner) * outer_stride + (r % inner) * inner_stride, and is dense."""

    tensor: Tensor
    rows: int
    inner: int
    outer_stride: int
    inner_stride: int


def row_view(x: Tensor) -> RowView:
    """x itself where its strides allow, else a copy.

    How a row is summed up may hang on how the kernel reads it, and that on what is aligned. So everything is aligned
    when d is, and then only: a row's bits follow from d (promise P1).
    """
    d = x.shape[-1]
    strides = _merged(x)
    if strides is not None:
        inner, outer_stride, inner_stride = strides
        aligned = outer_stride % _ALIGNED == 0 and inner_stride % _ALIGNED == 0
        if aligned == (d % _ALIGNED == 0) and (not aligned or x.data_ptr() % _ALIGNED == 0):
            return RowView(
                tensor=x, rows=x.numel() // d, inner=inner, outer_stride=outer_stride, inner_stride=inner_stride
            )
    dense = x.clone(memory_format=torch.contiguous_format)
    return RowView(tensor=dense, rows=x.numel() // d, inner=1, outer_stride=d, inner_stride=0)


def two_dimensional(x: Tensor) -> Tensor:
    """`[t, d]` with dense rows; a view where that is possible."""
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    return rows if rows.stride(-1) == 1 or rows.shape[-1] == 1 else rows.contiguous()


def next_power_of_2(number: int) -> int:
    return 1 << max(0, number - 1).bit_length()


def _merged(x: Tensor) -> tuple[int, int, int] | None:
    """(inner, outer stride, inner stride) of x's rows, if two strides are enough."""
    d = x.shape[-1]
    if d > 1 and x.stride(-1) != 1:
        return None
    levels: list[tuple[int, int]] = []  # (size, stride), the outermost first
    for size, stride in zip(x.shape[:-1], x.stride()[:-1]):
        if size == 1:
            continue
        if levels and levels[-1][1] == size * stride:
            levels[-1] = (levels[-1][0] * size, stride)
        else:
            levels.append((size, stride))
    match levels:
        case []:
            return 1, d, 0
        case [(_, stride)]:
            return 1, stride, 0
        case [(_, outer_stride), (inner, inner_stride)]:
            return inner, outer_stride, inner_stride
        case _:
            return None
