"""Round to nearest: from a plain matrix to a quantised one, with no data but the matrix.

Scales are rounded to bfloat16 before anything is divided by them: checkpoints store them so, and a weight that is
written and read again has the same bits as one that is quantised while it loads.

A matrix is worked through in slices of rows that stay in the cache, so that a pass over it costs little more than
reading it, and no float32 copy of it is ever in memory.

Legend: n output features, k input features, g groups of input features, j features of a group.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from quire.models.quantization.scheme import Scheme
from quire.ops.cpu.rounding import CpuRounding
from quire.ops.spans import span_of
from quire.ops.weight import LARGEST_MULTIPLIER, Fp8Weight, Int4Weight, Int8Weight, QuantizedWeight, split

_SLICE_ELEMENTS = 1 << 18
_FP8_LARGEST = 448.0
_INT4_REACH = 8.25
"""A quarter of a step beyond the range's end: one value is cut off by that, and all of a group have smaller steps. Of
bell-shaped weights, heavy-tailed or not, about the least squared error."""
_MULTIPLE_REACH = 0.625
"""Multiples are rounded up from 3/8 on: a scale too small cuts off more than one too large makes coarse."""
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
            fp8 = Fp8Weight(
                values_nk=torch.empty(n, k, dtype=torch.float8_e4m3fn),
                scale_n=torch.empty(n),
                rounds_rows=scheme.rounds_rows,
            )
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
            return split(int4)


def _round_compiled(weight_nk: Tensor, scheme: Scheme, compiled: CpuRounding) -> QuantizedWeight:
    match scheme.format:
        case "int8":
            return compiled.int8(weight_nk)
        case "fp8":
            return replace(compiled.fp8(weight_nk), rounds_rows=scheme.rounds_rows)
        case "int4":
            assert not scheme.zero_point, "weights are rounded to symmetric groups only"
            return split(compiled.int4(weight_nk, scheme.group_size))


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


def int4_scales(wanted_ng: Tensor, group_size: int) -> Tensor:
    """Of the scales that kernels add up in whole numbers, those nearest to what is wanted, `[n, g]`: within a span of
    groups, multiples of one step. The step has four significant bits and its multiples are at most 15, so that bfloat16
    holds the product. Where there are no spans, just values of bfloat16."""
    span = span_of(wanted_ng.shape[1] * group_size, group_size)
    if not span:
        return round_scale(wanted_ng)
    wanted_nsp = wanted_ng.view(len(wanted_ng), -1, span // group_size)
    least_ns1 = wanted_nsp.abs().amax(-1, keepdim=True) / LARGEST_MULTIPLIER
    step_ns1 = ((least_ns1.view(torch.int32) + 0xFFFFF) & ~0xFFFFF).view(torch.float32)
    multiple_nsp = (wanted_nsp.abs() * inverse(step_ns1) + _MULTIPLE_REACH).floor_()
    multiple_nsp = multiple_nsp.clamp_(min=1.0).mul_(wanted_nsp.sign())
    return multiple_nsp.mul_(step_ns1).flatten(1)


def _int4_rows(rows_mk: Tensor, group_size: int) -> _Parts:
    """The value of the largest magnitude goes to the end of the range that reaches further, -8: the scale has its
    sign."""
    rows_mgj = rows_mk.view(len(rows_mk), -1, group_size)
    low_mg, high_mg = rows_mgj.amin(-1), rows_mgj.amax(-1)
    scale_mg = int4_scales(torch.where(high_mg > -low_mg, high_mg, low_mg) / -_INT4_REACH, group_size)
    values_mgj = (rows_mgj * inverse(scale_mg)[..., None]).round_().clamp_(-8, 7)
    return pack_offset_nibbles(values_mgj.flatten(1)), scale_mg
