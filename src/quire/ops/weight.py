"""Weights of a linear layer, as plain data: what a checkpoint holds or a quantiser makes, before a back end packs it.

Legend: n output features, k input features, g groups of input features.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Int8Weight:
    """`w = values * scale`, with one scale per output feature. `values_nk` int8 in -127..127, `scale_n` float32."""

    values_nk: Tensor
    scale_n: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Int4Weight:
    """`w = (value - zero) * scale`, with a scale and a zero point per output feature and group of input features.

    `nibbles_nk2` uint8 `[n, k / 2]`: two values of 0..15 to a byte, the lower k in the lower nibble (the byte order of
    compressed-tensors' "pack-quantized"). `scale_ng` float32. `zero_ng` uint8 in 0..15, or None where all are 8, which
    is the symmetric format. k is a multiple of `group_size`: 32, 64 or 128.
    """

    nibbles_nk2: Tensor
    scale_ng: Tensor
    zero_ng: Tensor | None
    group_size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Fp8Weight:
    """`w = value * scale`, with one scale per output feature. `values_nk` float8_e4m3fn, `scale_n` float32."""

    values_nk: Tensor
    scale_n: Tensor


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
