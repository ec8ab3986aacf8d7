"""Weights of a linear layer, as plain data: what a checkpoint holds or a quantiser makes, before a back end packs it.

Legend: n output features, k input features, g groups of input features.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from quire.ops.spans import span_of

LARGEST_MULTIPLIER = 15
"""15 times -8..7 is a signed byte."""
_SLICE_ROWS = 256
"""Whose scales stay in the cache."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Int8Weight:
    """`w = values * scale`, with one scale per output feature. `values_nk` int8 in -127..127, `scale_n` float32."""

    values_nk: Tensor
    scale_n: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitScales:
    """Scales that are whole multiples, -15..15, of one step within each `span` of input features, so that the groups
    of a span can be added up in whole numbers. `step_ns` float32 `[n, spans]`, `multiplier_ng` int8."""

    step_ns: Tensor
    multiplier_ng: Tensor
    span: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Int4Weight:
    """`w = (value - zero) * scale`, with a scale and a zero point per output feature and group of input features.

    `nibbles_nk2` uint8 `[n, k / 2]`: two values of 0..15 to a byte, the lower k in the lower nibble (the byte order of
    compressed-tensors' "pack-quantized"). `scale_ng` float32. `zero_ng` uint8 in 0..15, or None where all are 8, which
    is the symmetric format. k is a multiple of `group_size`: 32, 64 or 128.

    `split_scales` holds the same scales again, where they are such; `split` finds it.
    """

    nibbles_nk2: Tensor
    scale_ng: Tensor
    zero_ng: Tensor | None
    group_size: int
    split_scales: SplitScales | None = None

    @property
    def row_group(self) -> int:
        """Input features that share a scale of the row they come from."""
        return self.group_size if self.split_scales is None else self.split_scales.span


@dataclass(frozen=True, slots=True, kw_only=True)
class Fp8Weight:
    """`w = value * scale`, with one scale per output feature. `values_nk` float8_e4m3fn, `scale_n` float32.

    `rounds_rows`: rows that it multiplies are rounded to such floats as well, which is the op `linear_fp8_rows`.
    """

    values_nk: Tensor
    scale_n: Tensor
    rounds_rows: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedWeight:
    """A weight that kernels have packed before: `value` is what `LinearKernel.pack` gave them, and has a `format`:
    bf16, int8, int4 or fp8."""

    value: Any


QuantizedWeight = Int8Weight | Int4Weight | Fp8Weight
Weight = Tensor | QuantizedWeight
"""A plain tensor `[n, k]`, or one of the formats above."""


def weight_shape(weight: Weight) -> tuple[int, int]:
    """(n, k)."""
    match weight:
        case Int4Weight():
            n, half = weight.nibbles_nk2.shape
            return n, 2 * half
        case Int8Weight() | Fp8Weight():
            n, k = weight.values_nk.shape
        case _:
            n, k = weight.shape
    return n, k


def weight_bytes(weight: Weight) -> int:
    match weight:
        case Int4Weight():
            zero = 0 if weight.zero_ng is None else weight.zero_ng.nbytes
            return weight.nibbles_nk2.nbytes + weight.scale_ng.nbytes + zero
        case Int8Weight() | Fp8Weight():
            return weight.values_nk.nbytes + weight.scale_n.nbytes
        case _:
            return weight.nbytes


def dequantize(weight: Weight) -> Tensor:
    """The weight's values, `[n, k]`: a plain tensor as it is, others in float32."""
    match weight:
        case Int4Weight():
            return _dequantize_int4(weight)
        case Int8Weight() | Fp8Weight():
            return weight.values_nk.float() * weight.scale_n[:, None]
        case _:
            return weight


def split(weight: Int4Weight) -> Int4Weight:
    """The same numbers, with `split_scales` where its scales are such."""
    span = 0 if weight.zero_ng is not None else span_of(2 * weight.nibbles_nk2.shape[1], weight.group_size)
    if not span:
        return weight
    step_ns = torch.empty(len(weight.scale_ng), weight.scale_ng.shape[1] * weight.group_size // span)
    multiplier_ng = torch.empty(weight.scale_ng.shape, dtype=torch.int8)
    for first in range(0, len(step_ns), _SLICE_ROWS):
        rows = slice(first, first + _SLICE_ROWS)
        parts = _split_rows(weight.scale_ng[rows].view(-1, step_ns.shape[1], span // weight.group_size))
        if parts is None:
            return weight
        step_ns[rows], multiplier_ng[rows] = parts
    return replace(weight, split_scales=SplitScales(step_ns=step_ns, multiplier_ng=multiplier_ng, span=span))


def _split_rows(scale_msp: Tensor) -> tuple[Tensor, Tensor] | None:
    """Steps `[m, s]` and multipliers `[m, g]`: the smallest step that does for a span, or None if one has none."""
    largest_ms = scale_msp.abs().amax(-1)
    step_ms, found_ms = torch.zeros_like(largest_ms), largest_ms == 0
    for most in range(LARGEST_MULTIPLIER, 0, -1):
        tried_ms = torch.where(found_ms, step_ms, largest_ms / most)
        fits_ms = (_multiples(scale_msp, tried_ms) * tried_ms[..., None] == scale_msp).all(-1)
        step_ms = torch.where(fits_ms, tried_ms, step_ms)
        found_ms |= fits_ms
        if bool(found_ms.all()):
            return step_ms, _multiples(scale_msp, step_ms).flatten(1).to(torch.int8)
    return None


def _multiples(scale_msp: Tensor, step_ms: Tensor) -> Tensor:
    return torch.where(step_ms != 0, 1.0 / step_ms, 0.0)[..., None].mul(scale_msp).round_()


def unpack_nibbles(nibbles_nk2: Tensor) -> Tensor:
    """uint8 `[n, k]` of 0..15."""
    return torch.stack((nibbles_nk2 & 15, nibbles_nk2 >> 4), dim=-1).flatten(-2)


def pack_nibbles(values_nk: Tensor) -> Tensor:
    """uint8 `[n, k / 2]` of values 0..15."""
    values = values_nk.to(torch.uint8)
    return values[:, 0::2] | (values[:, 1::2] << 4)


def _dequantize_int4(weight: Int4Weight) -> Tensor:
    values_nk = unpack_nibbles(weight.nibbles_nk2)
    values_ngj = values_nk.float().view(len(values_nk), -1, weight.group_size)
    zero = 8.0 if weight.zero_ng is None else weight.zero_ng.float()[:, :, None]
    return ((values_ngj - zero) * weight.scale_ng[:, :, None]).view(len(values_nk), -1)
