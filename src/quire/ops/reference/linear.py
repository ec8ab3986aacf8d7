"""`linear` by torch's own product, in pieces that keep promise P1. Legend: t rows, k features in, n features out."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from quire.ops.reference.row_invariance import RowSplit


class ReferenceLinear:
    """Remembers, per shape, which row counts may be used. The weight stays as it lies in the checkpoint: no packing."""

    def __init__(self) -> None:
        self._splits: dict[tuple[int, int, bool, torch.dtype], RowSplit] = {}

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


def _padded(x_mk: Tensor, rows: int) -> Tensor:
    if x_mk.shape[0] == rows:
        return x_mk
    padded = x_mk.new_zeros(rows, x_mk.shape[1])
    padded[: x_mk.shape[0]] = x_mk
    return padded
