"""Linear layers by compiled kernels: weights in four formats, packed once; rows in bfloat16.

Legend: t rows, k features in, n features out.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from quire.ops.cpu.library import kernels_module
from quire.ops.op import Implementation
from quire.ops.target import Target
from quire.ops.weight import Fp8Weight, Int4Weight, Int8Weight, Weight, weight_shape

_NOTES = {
    "linear": "bf16 by bf16, summed in float32; weights packed in panels",
    "linear_int8": "8-bit rows by 8-bit weights, summed in whole numbers",
    "linear_int4": "8-bit rows by 4-bit weights, summed in whole numbers within a group or span of groups",
    "linear_fp8": "bf16 rows by 8-bit floats, widened on the way",
}


class CpuLinear:
    """`LinearKernel` of all four formats, over one engine's threads."""

    def __init__(self, target: Target) -> None:
        self._backend = target.cpu
        self._module: Any = kernels_module()

    def pack(self, weight: Weight) -> Any:
        """A `PackedWeight` of the compiled module. A dense tensor is read where it lies, a mapped file included."""
        n, k = weight_shape(weight)
        match weight:
            case Int8Weight():
                values, scale = _dense(weight.values_nk, torch.int8), _dense(weight.scale_n, torch.float32)
                return self._module.pack_int8(self._backend, values.data_ptr(), scale.data_ptr(), n, k)
            case Fp8Weight():
                values, scale = _dense(weight.values_nk, torch.float8_e4m3fn), _dense(weight.scale_n, torch.float32)
                return self._module.pack_fp8(self._backend, values.data_ptr(), scale.data_ptr(), n, k)
            case Int4Weight():
                return self._pack_int4(weight, n, k)
            case _:
                values = _dense(weight, torch.bfloat16)
                return self._module.pack_bf16(self._backend, values.data_ptr(), n, k)

    def _pack_int4(self, weight: Int4Weight, n: int, k: int) -> Any:
        nibbles, scale = _dense(weight.nibbles_nk2, torch.uint8), _dense(weight.scale_ng, torch.float32)
        zero = None if weight.zero_ng is None else _dense(weight.zero_ng, torch.uint8)
        parts = weight.split_scales
        scale, multiplier = (scale, None) if parts is None else (parts.step_ns, parts.multiplier_ng)
        return self._module.pack_int4(
            self._backend,
            nibbles.data_ptr(),
            scale.data_ptr(),
            _address(zero),
            _address(multiplier),
            n,
            k,
            group_size=weight.row_group,
            sub_size=weight.group_size,
        )

    def __call__(self, x_tk: Tensor, weight: Any, bias_n: Tensor | None = None) -> Tensor:
        """`[..., n]` for rows of any leading shape and layout."""
        return self._multiply(x_tk, weight, bias_n, torch.bfloat16, self._module.Epilogue.STORE)

    def wide(self, x_tk: Tensor, weight: Any, bias_n: Tensor | None) -> Tensor:
        """The same before it is rounded: float32."""
        return self._multiply(x_tk, weight, bias_n, torch.float32, self._module.Epilogue.STORE_FLOAT)

    def _multiply(self, x_tk: Tensor, weight: Any, bias_n: Tensor | None, dtype: torch.dtype, epilogue: Any) -> Tensor:
        x, bias = _rows(x_tk), None if bias_n is None else _dense(bias_n, torch.bfloat16)
        t, k = x.shape
        out = torch.empty(*x_tk.shape[:-1], weight.n, dtype=dtype)
        product = self._module.Product(weight, out.data_ptr(), weight.n, epilogue=epilogue, bias=_address(bias))
        self._module.linear(self._backend, x.data_ptr(), t, k, x.stride(0), product)
        return out


def implementations() -> list[Implementation]:
    return [
        Implementation(
            op=op, backend="cpu", build=CpuLinear, unfit=Target.unfit_for_cpu_kernels, preference=100, note=note
        )
        for op, note in _NOTES.items()
    ]


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _dense(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype).contiguous()


def _rows(x: Tensor) -> Tensor:
    """bf16 `[t, k]` whose rows are dense; a copy only where x is not so laid out already."""
    rows = x if x.dtype == torch.bfloat16 else x.to(torch.bfloat16)
    if rows.dim() != 2:
        rows = rows.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()
