"""Ops that work row by row, by Triton."""

from __future__ import annotations

import torch
from torch import Tensor

from quire.ops.target import Target
from quire.ops.triton.kernels.rows import rms_norm_kernel
from quire.ops.triton.launch import Launch


class TritonNorm:
    def __init__(self, target: Target) -> None:
        self._launch: Launch = target.launch

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, weight_offset: float = 0.0) -> Tensor:
        out, _ = self._rms_norm(x, None, weight, eps, weight_offset)
        return out

    def add_rms_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float, weight_offset: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        out, total = self._rms_norm(x, residual, weight, eps, weight_offset)
        assert total is not None
        return out, total

    def _rms_norm(
        self, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, weight_offset: float
    ) -> tuple[Tensor, Tensor | None]:
        x = x.contiguous()
        d = x.shape[-1]
        out = torch.empty_like(x)
        total = None if residual is None else torch.empty_like(x)
        rows = x.numel() // d
        if rows:
            self._launch(
                rms_norm_kernel,
                (rows,),
                x,
                x if residual is None else residual.contiguous(),
                weight,
                out,
                out if total is None else total,
                d,
                eps,
                weight_offset,
                BLOCK=max(16, 1 << (d - 1).bit_length()),
                ADDS=residual is not None,
            )
        return out, total
