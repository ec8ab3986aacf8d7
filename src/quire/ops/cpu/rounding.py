"""Rounding a bfloat16 matrix to a quantised format by compiled kernels: at the speed of memory, while a model loads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from quire.ops.cpu.library import kernels_module
from quire.ops.spans import span_of
from quire.ops.weight import Fp8Weight, Int4Weight, Int8Weight


class CpuRounding:
    """Over one engine's threads (`Target.cpu`). What it computes is defined in `models.quantization.rounding`."""

    def __init__(self, backend: Any) -> None:
        self._backend = backend
        self._module: Any = kernels_module()

    def int8(self, weight_nk: Tensor) -> Int8Weight:
        values_nk, scale_n = self._rows(self._module.round_int8, weight_nk, torch.int8)
        return Int8Weight(values_nk=values_nk, scale_n=scale_n)

    def fp8(self, weight_nk: Tensor) -> Fp8Weight:
        values_nk, scale_n = self._rows(self._module.round_fp8, weight_nk, torch.float8_e4m3fn)
        return Fp8Weight(values_nk=values_nk, scale_n=scale_n)

    def _rows(self, kernel: Callable[..., None], weight_nk: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        n, k = weight_nk.shape
        values_nk, scale_n = torch.empty(n, k, dtype=dtype), torch.empty(n)
        kernel(
            self._backend,
            weight=weight_nk.data_ptr(),
            n=n,
            k=k,
            values=values_nk.data_ptr(),
            scale=scale_n.data_ptr(),
        )
        return values_nk, scale_n

    def int4(self, weight_nk: Tensor, group_size: int) -> Int4Weight:
        """Symmetric groups; k is a multiple of `group_size`."""
        n, k = weight_nk.shape
        nibbles_nk2 = torch.empty(n, k // 2, dtype=torch.uint8)
        scale_ng = torch.empty(n, k // group_size)
        self._module.round_int4(
            self._backend,
            weight=weight_nk.data_ptr(),
            n=n,
            k=k,
            group_size=group_size,
            span=span_of(k, group_size),
            nibbles=nibbles_nk2.data_ptr(),
            scale=scale_ng.data_ptr(),
        )
        return Int4Weight(nibbles_nk2=nibbles_nk2, scale_ng=scale_ng, zero_ng=None, group_size=group_size)
