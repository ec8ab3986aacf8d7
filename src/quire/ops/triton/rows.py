"""Ops that work row by row, by Triton. Signatures and shapes as in the ops' definitions."""

from __future__ import annotations

import torch
from torch import Tensor

from quire.ops.target import Target
from quire.ops.triton.kernels.norms import layer_norm_kernel, rms_norm_kernel
from quire.ops.triton.kernels.rows import activation_kernel, embedding_kernel, rope_kernel
from quire.ops.triton.launch import Launch
from quire.ops.triton.row_view import next_power_of_2, row_view, two_dimensional

_WIDEST_ROW = 1 << 15
"""That fits into a program's registers."""
_PIECE = 2048
"""Elements of a row that one program works on where rows can be cut: two 16-byte loads of a thread."""
_ROWS_TILE = 1024
_HEADS_TILE = 2048
"""Elements of a program that has several rows, or heads, whose halves are loaded apart: a 16-byte load of a thread."""


class TritonNorm:
    def __init__(self, target: Target) -> None:
        self._launch: Launch = target.launch

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, weight_offset: float = 0.0) -> Tensor:
        return self._rms_norm(x, None, weight, eps, weight_offset)[0]

    def add_rms_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float, weight_offset: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        return self._rms_norm(x, residual, weight, eps, weight_offset)

    def layer_norm(self, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
        return self._layer_norm(x, None, weight, bias, eps)[0]

    def add_layer_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor]:
        return self._layer_norm(x, residual, weight, bias, eps)

    def _rms_norm(
        self, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, weight_offset: float
    ) -> tuple[Tensor, Tensor]:
        """(normed, x + residual); without a residual the second is the first."""
        out, total = _results(x, residual)
        view, d = row_view(x), x.shape[-1]
        if view.rows:
            rows, block, warps = _norm_tile(d)
            self._launch(
                rms_norm_kernel,
                (-(-view.rows // rows),),
                view.tensor,
                x if residual is None else residual.contiguous(),
                weight,
                out,
                total,
                view.rows,
                view.inner,
                view.outer_stride,
                view.inner_stride,
                d,
                eps,
                weight_offset,
                ROWS=rows,
                BLOCK=block,
                ADDS=residual is not None,
                OFFSETS=weight_offset != 0.0,
                num_warps=warps,
            )
        return out, total

    def _layer_norm(
        self, x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor]:
        out, total = _results(x, residual)
        view, d = row_view(x), x.shape[-1]
        if view.rows:
            rows, block, warps = _norm_tile(d)
            self._launch(
                layer_norm_kernel,
                (-(-view.rows // rows),),
                view.tensor,
                x if residual is None else residual.contiguous(),
                weight,
                weight if bias is None else bias,
                out,
                total,
                view.rows,
                view.inner,
                view.outer_stride,
                view.inner_stride,
                d,
                eps,
                ROWS=rows,
                BLOCK=block,
                ADDS=residual is not None,
                BIASED=bias is not None,
                num_warps=warps,
            )
        return out, total


class TritonActivation:
    def __init__(self, target: Target) -> None:
        self._launch: Launch = target.launch

    def activation(self, x: Tensor, name: str) -> Tensor:
        return self._activate(x, None, name)

    def gated_activation(self, gate: Tensor, up: Tensor, name: str) -> Tensor:
        return self._activate(gate, up, name)

    def _activate(self, x: Tensor, up: Tensor | None, name: str) -> Tensor:
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        x_td = two_dimensional(x)
        up_td = x_td if up is None else two_dimensional(up)
        rows, d = x_td.shape
        if rows:
            block = min(_PIECE, next_power_of_2(d))
            self._launch(
                activation_kernel,
                (rows, -(-d // block)),
                x_td,
                up_td,
                out,
                d,
                x_td.stride(0),
                up_td.stride(0),
                NAME=name,
                GATED=up is not None,
                BLOCK=block,
            )
        return out


class TritonRope:
    def __init__(self, target: Target) -> None:
        self._launch: Launch = target.launch

    def __call__(self, x_thd: Tensor, cos_tr: Tensor, sin_tr: Tensor) -> Tensor:
        x_thd, cos_tr, sin_tr = (x if x.stride(-1) == 1 else x.contiguous() for x in (x_thd, cos_tr, sin_tr))
        t, h, d = x_thd.shape
        out_thd = torch.empty(x_thd.shape, dtype=x_thd.dtype, device=x_thd.device)
        half = cos_tr.shape[-1]
        rest = d - 2 * half
        block = next_power_of_2(half)
        heads = heads_per_program(h, 2 * block)
        if t:
            self._launch(
                rope_kernel,
                (t, -(-h // heads)),
                x_thd,
                cos_tr,
                sin_tr,
                out_thd,
                h,
                d,
                x_thd.stride(0),
                x_thd.stride(1),
                cos_tr.stride(0),
                sin_tr.stride(0),
                HALF=half,
                REST=rest,
                HEADS=heads,
                BLOCK=block,
                REST_BLOCK=next_power_of_2(rest),
            )
        return out_thd


class TritonEmbedding:
    def __init__(self, target: Target) -> None:
        self._launch: Launch = target.launch

    def __call__(self, ids_t: Tensor, table_vd: Tensor) -> Tensor:
        v, d = table_vd.shape
        out_td = torch.empty(len(ids_t), d, dtype=table_vd.dtype, device=table_vd.device)
        if len(ids_t):
            table_vd = two_dimensional(table_vd)
            block = min(_PIECE, next_power_of_2(d))
            self._launch(
                embedding_kernel,
                (len(ids_t), -(-d // block)),
                ids_t.contiguous(),
                table_vd,
                out_td,
                v,
                d,
                table_vd.stride(0),
                BLOCK=block,
            )
        return out_td


def heads_per_program(heads: int, block: int) -> int:
    """A power of 2; `block` elements of each."""
    return max(1, min(next_power_of_2(heads), _HEADS_TILE // block))


def _results(x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return out, out if residual is None else torch.empty_like(out)


def _norm_tile(d: int) -> tuple[int, int, int]:
    """(rows of a program, elements of each, warps): from d alone, so that a row is added up in one order always."""
    assert d <= _WIDEST_ROW, f"a row of {d} elements, of {_WIDEST_ROW} at most"
    block = max(16, next_power_of_2(d))
    return max(1, _ROWS_TILE // block), block, min(16, max(4, block // 256))
