"""Round to nearest: from a plain matrix to a quantised one, with no data but the matrix.

Scales are rounded to bfloat16 before anything is divided by them: checkpoints store them so, and a weight that is
written and read again has the same bits as one that is quantised while it loads.

A matrix is worked through in slices of rows that stay in the cache, so that a pass over it costs little more than
reading it, and no float32 copy of it is ever in memory.

Legend: n output features, k input features, g groups of input features, j features of a group.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from quire.models.quantization.scheme import Scheme
from quire.ops.cpu.rounding import CpuRounding
from quire.ops.weight import Fp8Weight, Int4Weight, Int8Weight, QuantizedWeight

_SLICE_ELEMENTS = 1 << 18
_FP8_LARGEST = 448.0
_INT4_REACH = 8.25
"""A quarter of a step beyond the range's end: one value is cut off by that, and all of a group have smaller steps. Of
bell-shaped weights, heavy-tailed or not, about the least squared error."""
_Parts = tuple[Tensor, ...]


def round_weight(weight_nk: Tensor, scheme: Scheme, compiled: CpuRounding | None = None) -> QuantizedWeight:
    """`weight_nk` (any float type) in the format of `scheme`. A row or group of zeros has scale 0.

    Values that are not finite give scales that are not; the caller looks at those. With `compiled`, a bfloat16 matrix
    takes a fraction of the time, and gets the same bits.
    """
    if compiled is not None and weight_nk.dtype == torch.bfloat16 and weight_nk.is_contiguous():
        return _round_compiled(weight_nk, scheme, compiled)
    n, k = weight_nk.shape
    match scheme.format:
        case "int8":
            int8 = Int8Weight(values_nk=torch.empty(n, k, dtype=torch.int8), scale_n=torch.empty(n))
            _in_slices(weight_nk, (int8.values_nk, int8.scale_n), _int8_rows)
            return int8
        case "fp8":
            fp8 = Fp8Weight(values_nk=torch.empty(n, k, dtype=torch.float8_e4m3fn), scale_n=torch.empty(n))
            _in_slices(weight_nk, (fp8.values_nk, fp8.scale_n), _fp8_rows)
            return fp8
        case "int4":
            assert not scheme.zero_point, "weights are rounded to symmetric groups only"
            size = scheme.group_size
            int4 = Int4Weight(
                nibbles_nk2=torch.empty(n, k // 2, dtype=torch.uint8),
                scale_ng=torch.empty(n, k // size),
                zero_ng=None,
                group_size=size,
            )
            _in_slices(weight_nk, (int4.nibbles_nk2, int4.scale_ng), lambda rows_mk: _int4_rows(rows_mk, size))
            return int4


def _round_compiled(weight_nk: Tensor, scheme: Scheme, compiled: CpuRounding) -> QuantizedWeight:
    match scheme.format:
        case "int8":
            return compiled.int8(weight_nk)
        case "fp8":
            return compiled.fp8(weight_nk)
        case "int4":
            assert not scheme.zero_point, "weights are rounded to symmetric groups only"
            return compiled.int4(weight_nk, scheme.group_size)


def scales_of(weight: QuantizedWeight) -> Tensor:
    """`[n]` or `[n, g]`."""
    return weight.scale_ng if isinstance(weight, Int4Weight) else weight.scale_n


def inverse(scale: Tensor) -> Tensor:
    """1 / scale, and 0 where the scale is 0."""
    return torch.where(scale != 0, 1.0 / scale, 0.0)


def round_scale(scale: Tensor) -> Tensor:
    """The nearest values that bfloat16 has, in float32."""
    return scale.bfloat16().float()


def pack_offset_nibbles(values_nk: Tensor) -> Tensor:
    """uint8 `[n, k / 2]` of whole numbers -8..7 in a float tensor, which is overwritten."""
    pairs = values_nk.add_(8).to(torch.uint8).view(torch.int16)  # a pair is low + 256 * high
    return (pairs | (pairs >> 4)).to(torch.uint8)


def _in_slices(weight_nk: Tensor, results: _Parts, round_rows: Callable[[Tensor], _Parts]) -> None:
    """Fills `results`. They are there before the slices are: memory that these leave can be used again."""
    n, k = weight_nk.shape
    step = max(1, _SLICE_ELEMENTS // max(1, k))
    for first in range(0, n, step):
        parts = round_rows(weight_nk[first : first + step].float())
        for all_rows, part in zip(results, parts, strict=True):
            all_rows[first : first + step] = part


def _int8_rows(rows_mk: Tensor) -> _Parts:
    scale_m = round_scale(rows_mk.abs().amax(1) / 127)
    values_mk = (rows_mk * inverse(scale_m)[:, None]).round_().clamp_(-127, 127)
    return values_mk.to(torch.int8), scale_m


def _fp8_rows(rows_mk: Tensor) -> _Parts:
    scale_m = round_scale(rows_mk.abs().amax(1) / _FP8_LARGEST)
    values_mk = (rows_mk * inverse(scale_m)[:, None]).clamp_(-_FP8_LARGEST, _FP8_LARGEST)
    return values_mk.to(torch.float8_e4m3fn), scale_m


def _int4_rows(rows_mk: Tensor, group_size: int) -> _Parts:
    """The value of the largest magnitude goes to the end of the range that reaches further, -8: the scale has its
    sign."""
    rows_gj = rows_mk.view(-1, group_size)
    low_g1, high_g1 = rows_gj.amin(1, keepdim=True), rows_gj.amax(1, keepdim=True)
    scale_g1 = round_scale(torch.where(high_g1 > -low_g1, high_g1, low_g1) / -_INT4_REACH)
    values_gj = (rows_gj * inverse(scale_g1)).round_().clamp_(-8, 7)
    return pack_offset_nibbles(values_gj).view(len(rows_mk), -1), scale_g1.view(len(rows_mk), -1)
