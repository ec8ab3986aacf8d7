"""Linear layers by torch's own product, in pieces that keep promise P1.

Legend: t rows, k features in, n features out.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from quire.ops.linear import quantize_rows, quantize_rows_fp8
from quire.ops.reference.row_invariance import RowSplit
from quire.ops.weight import Fp8Weight, Int4Weight, QuantizedWeight, dequantize, weight_shape


class ReferenceLinear:
    """Remembers, per shape, which row counts may be used. The weight stays as it lies in the checkpoint: no packing."""

    def __init__(self) -> None:
        self._splits: dict[tuple[int, int, bool, torch.dtype], RowSplit] = {}

    def pack(self, weight: Tensor) -> Tensor:
        return weight

    def __call__(self, x_tk: Tensor, weight_nk: Tensor, bias_n: Tensor | None = None) -> Tensor:
        rows, (n, k) = x_tk.shape[0], weight_nk.shape
        split = self._splits.setdefault((n, k, bias_n is not None, weight_nk.dtype), RowSplit())

        def multiply(x_mk: Tensor) -> Tensor:
            return functional.linear(x_mk, weight_nk, bias_n)

        pieces = split.pieces(rows, multiply, x_tk[:1])
        if pieces == (rows,):
            return multiply(x_tk)
        y_tn = x_tk.new_empty(rows, n)
        start = 0
        for piece in pieces:
            stop = min(start + piece, rows)
            y_mn = multiply(_padded(x_tk[start:stop], piece))
            y_tn[start:stop] = y_mn[: stop - start]
            start = stop
        return y_tn

    def wide(self, x_tk: Tensor, weight_nk: Tensor, bias_n: Tensor | None) -> Tensor:
        return self(x_tk, weight_nk, bias_n).float()


class ReferenceQuantizedLinear:
    """The weight stays quantised, and is written out in float32 for each call: right, small and slow."""

    def __init__(self) -> None:
        self._linear = ReferenceLinear()

    def pack(self, weight: QuantizedWeight) -> QuantizedWeight:
        return weight

    def __call__(self, x_tk: Tensor, weight: QuantizedWeight, bias_n: Tensor | None = None) -> Tensor:
        return self.wide(x_tk, weight, bias_n).to(x_tk.dtype)

    def wide(self, x_tk: Tensor, weight: QuantizedWeight, bias_n: Tensor | None) -> Tensor:
        wide_tk = x_tk.float()
        if isinstance(weight, Fp8Weight):
            if weight.rounds_rows:
                values_tk, scale_t1 = quantize_rows_fp8(x_tk)
                wide_tk = values_tk.float() * scale_t1
        else:
            group_size = weight.row_group if isinstance(weight, Int4Weight) else weight_shape(weight)[1]
            values_tk, scale_tg = quantize_rows(x_tk, group_size)
            wide_tk = values_tk * scale_tg.repeat_interleave(group_size, dim=1)
        bias = None if bias_n is None else bias_n.float()
        return self._linear(wide_tk, dequantize(weight), bias)


def _padded(x_mk: Tensor, rows: int) -> Tensor:
    if x_mk.shape[0] == rows:
        return x_mk
    padded = x_mk.new_zeros(rows, x_mk.shape[1])
    padded[: x_mk.shape[0]] = x_mk
    return padded
