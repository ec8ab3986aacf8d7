"""`linear` and its quantised forms: y = x W^T + b. Legend: t rows, k features in, n features out, g groups of k.

One arithmetic per format, whatever the number of rows: activations are quantised for one row as for a thousand.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor

from quire.ops.op import Inputs, Op, Tolerance, random_int, random_tensor
from quire.ops.weight import Fp8Weight, Int4Weight, Int8Weight, Weight, dequantize, pack_nibbles, split

FP8_MOST = 448.0
"""The largest number of float8_e4m3fn."""


class LinearKernel(Protocol):
    """What serves `linear`, `linear_int8`, `linear_int4`, `linear_fp8` or `linear_fp8_rows`."""

    def pack(self, weight: Weight) -> Any:
        """The weight in the kernel's own layout, made once at load; a copy, unless the layout is the plain one."""
        ...

    def __call__(self, x_tk: Tensor, weight: Any, bias_n: Tensor | None) -> Tensor:
        """`[t, n]` in the dtype of `x_tk`; `weight` is what `pack` gave."""
        ...

    def wide(self, x_tk: Tensor, weight: Any, bias_n: Tensor | None) -> Tensor:
        """The same in float32, before it is rounded where the kernel has it so: for logits."""
        ...


def linear(x_tk: Tensor, weight: Tensor, bias_n: Tensor | None = None) -> Tensor:
    """Accumulated in float32 or better, rounded once to the dtype of `x_tk`."""
    return _with_bias(x_tk.double() @ weight.double().T, bias_n, x_tk.dtype)


def linear_int8(x_tk: Tensor, weight: Int8Weight, bias_n: Tensor | None = None) -> Tensor:
    """W8A8: each row of x in 8 bits with one scale; products and sums of integers are exact."""
    values_tk, scale_t1 = quantize_rows(x_tk, x_tk.shape[1])
    y_tn = values_tk.double() @ weight.values_nk.double().T * scale_t1.double() * weight.scale_n.double()
    return _with_bias(y_tn, bias_n, x_tk.dtype)


def linear_int4(x_tk: Tensor, weight: Int4Weight, bias_n: Tensor | None = None) -> Tensor:
    """W4A8: each row of x in 8 bits with one scale for each of the weight's groups, or spans of groups."""
    values_tk, scale_tg = quantize_rows(x_tk, weight.row_group)
    rounded_tk = values_tk.double() * scale_tg.double().repeat_interleave(weight.row_group, dim=1)
    return _with_bias(rounded_tk @ dequantize(weight).double().T, bias_n, x_tk.dtype)


def linear_fp8(x_tk: Tensor, weight: Fp8Weight, bias_n: Tensor | None = None) -> Tensor:
    """Weights in 8-bit floating point; x stays as it is."""
    return _with_bias(x_tk.double() @ dequantize(weight).double().T, bias_n, x_tk.dtype)


def linear_fp8_rows(x_tk: Tensor, weight: Fp8Weight, bias_n: Tensor | None = None) -> Tensor:
    """W8A8 of 8-bit floats: each row of x is rounded to them too, with one scale; products are exact."""
    values_tk, scale_t1 = quantize_rows_fp8(x_tk)
    y_tn = values_tk.double() @ weight.values_nk.double().T * scale_t1.double() * weight.scale_n.double()
    return _with_bias(y_tn, bias_n, x_tk.dtype)


def quantize_rows_fp8(x_tk: Tensor) -> tuple[Tensor, Tensor]:
    """(float8_e4m3fn `[t, k]`, float32 scale `[t, 1]`) with x close to values * scale.

    The scale is a row's largest magnitude / 448; ties round to even. A row of zeros has scale 0.
    """
    wide_tk = x_tk.float()
    largest_t1 = wide_tk.abs().amax(-1, keepdim=True)
    inverse_t1 = torch.where(largest_t1 > 0, 1.0 / largest_t1 * FP8_MOST, 0.0)
    values_tk = (wide_tk * inverse_t1).clamp_(-FP8_MOST, FP8_MOST)
    return values_tk.to(torch.float8_e4m3fn), largest_t1 * (1.0 / FP8_MOST)


def quantize_rows(x_tk: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """(int8 `[t, k]` in -127..127, float32 scale `[t, k / group_size]`) with x close to values * scale.

    The scale is a group's largest magnitude / 127; ties round to even. A group of zeros has scale 0.
    """
    wide_tgj = x_tk.float().reshape(len(x_tk), -1, group_size)
    largest_tg1 = wide_tgj.abs().amax(-1, keepdim=True)
    inverse_tg1 = torch.where(largest_tg1 > 0, 127.0 / largest_tg1, 0.0)
    values_tgj = (wide_tgj * inverse_tg1).round_().clamp_(-127, 127)
    return values_tgj.flatten(1).to(torch.int8), largest_tg1[..., 0] * (1.0 / 127.0)


def _with_bias(y_tn: Tensor, bias_n: Tensor | None, dtype: torch.dtype) -> Tensor:
    return (y_tn if bias_n is None else y_tn + bias_n.double()).to(dtype)


def _x_and_bias(rows: int, k: int, n: int, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    bias = random_tensor(n, dtype=dtype, generator=generator) if random_int(0, 1, generator) else None
    return {"x_tk": random_tensor(rows, k, dtype=dtype, generator=generator), "bias_n": bias}


def _inputs(rows: int, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    k, n = random_int(1, 300, generator), random_int(1, 300, generator)
    weight = random_tensor(n, k, dtype=dtype, generator=generator, scale=k**-0.5)
    return {**_x_and_bias(rows, k, n, dtype, generator), "weight": weight}


def _int8_inputs(rows: int, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    k, n = random_int(1, 300, generator), random_int(1, 300, generator)
    weight = Int8Weight(
        values_nk=torch.randint(-127, 128, (n, k), dtype=torch.int8, generator=generator),
        scale_n=torch.rand(n, generator=generator).add_(0.5).mul_(k**-0.5 / 64),
    )
    return {**_x_and_bias(rows, k, n, dtype, generator), "weight": weight}


def _int4_inputs(rows: int, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    group_size = 32 << random_int(0, 2, generator)
    groups, n = random_int(1, 12, generator), random_int(1, 300, generator)
    k = groups * group_size
    zero = torch.randint(0, 16, (n, groups), dtype=torch.uint8, generator=generator)
    scale_ng = torch.rand(n, groups, generator=generator).add_(0.5).mul_(k**-0.5 / 4)
    match random_int(0, 2, generator):
        case 0:  # as checkpoints have them most often
            scale_ng = scale_ng.bfloat16().float()
        case 1:  # as quire makes them
            step = 2.0 ** -round(math.log2(30 * k**0.5))  # results as large as of the others
            scale_ng = step * torch.randint(-15, 16, (n, groups), generator=generator)
    plain = Int4Weight(
        nibbles_nk2=pack_nibbles(torch.randint(0, 16, (n, k), dtype=torch.uint8, generator=generator)),
        scale_ng=scale_ng,
        zero_ng=zero if random_int(0, 1, generator) else None,
        group_size=group_size,
    )
    return {**_x_and_bias(rows, k, n, dtype, generator), "weight": split(plain)}


def _fp8_inputs(rows: int, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    k, n = random_int(1, 300, generator), random_int(1, 300, generator)
    weight = Fp8Weight(
        values_nk=random_tensor(n, k, dtype=torch.float8_e4m3fn, generator=generator),
        scale_n=torch.rand(n, generator=generator).add_(0.5).mul_(k**-0.5),
    )
    return {**_x_and_bias(rows, k, n, dtype, generator), "weight": weight}


def _fp8_rows_inputs(rows: int, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    inputs = _fp8_inputs(rows, dtype, generator)
    return {**inputs, "weight": replace(inputs["weight"], rounds_rows=True)}


_TOLERANCES = {
    torch.float32: Tolerance(relative=1e-5, absolute=1e-5),
    torch.bfloat16: Tolerance(relative=1.6e-2, absolute=1e-2),
    torch.float16: Tolerance(relative=2e-3, absolute=2e-3),
}


def _op(name: str, definition: Any, inputs: Any) -> Op:
    return Op(name=name, definition=definition, inputs=inputs, row_arguments=("x_tk",), tolerances=_TOLERANCES)


LINEAR = _op("linear", linear, _inputs)
LINEAR_INT8 = _op("linear_int8", linear_int8, _int8_inputs)
LINEAR_INT4 = _op("linear_int4", linear_int4, _int4_inputs)
LINEAR_FP8 = _op("linear_fp8", linear_fp8, _fp8_inputs)
LINEAR_FP8_ROWS = _op("linear_fp8_rows", linear_fp8_rows, _fp8_rows_inputs)
LINEARS: Sequence[Op] = (LINEAR, LINEAR_INT8, LINEAR_INT4, LINEAR_FP8, LINEAR_FP8_ROWS)
