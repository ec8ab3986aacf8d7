"""Numbers as the KV cache has them: see `ops.reference.kv_layout`."""

import triton
import triton.language as tl

from quire.ops.triton.kernels.common import rounded


@triton.jit
def largest_of(value):
    """Of each row the largest; infinite where one is not a number."""
    wide = value.to(tl.float32)
    return tl.max(tl.where(wide == wide, tl.abs(wide), float("inf")), axis=1)[:, None]


@triton.jit
def scales_of(largest, KV: tl.constexpr):
    """(scale, inverse) of rows `[HEADS, 1]`, as `ops.reference.kv_layout` has them."""
    MOST: tl.constexpr = 127.0 if KV == "int8" else 448.0
    scale = tl.div_rn(largest, tl.full(largest.shape, MOST, tl.float32))
    sound = scale < float("inf")
    inverse = tl.div_rn(tl.full(largest.shape, 1.0, tl.float32), tl.where(sound & (scale > 0.0), scale, 1.0))
    return tl.where(sound, scale, float("nan")), tl.where(sound & (scale > 0.0), inverse, 0.0)


@triton.jit
def stored(value, inverse, KV: tl.constexpr, TYPE: tl.constexpr):
    """As the cache has it, in TYPE, which is int8 for the bytes of e4m3 too."""
    wide = value.to(tl.float32)
    # Rows that are not sound become zeros.
    number = tl.where(inverse > 0.0, wide * inverse, 0.0)
    if KV == "wide":
        return rounded(wide, TYPE)
    elif KV == "int8":
        number = tl.minimum(tl.maximum(number, -127.0), 127.0)
        # To the nearest whole number, ties to even: there are no others so far from zero.
        return ((number + 12582912.0) - 12582912.0).to(tl.int8)
    else:
        number = tl.minimum(tl.maximum(number, -448.0), 448.0)
        magnitude = tl.abs(number)
        bits = magnitude.to(tl.int32, bitcast=True)
        normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - ((127 - 7) << 3)
        below_normal = ((magnitude * 512.0 + 12582912.0) - 12582912.0).to(tl.int32)
        code = tl.where(magnitude < 0.015625, below_normal, normal)
        return tl.where(number.to(tl.int32, bitcast=True) < 0, code | 0x80, code).to(tl.uint8).to(tl.int8, bitcast=True)


@triton.jit
def finite_or_zero(value):
    wide = value.to(tl.float32)
    return tl.where(tl.abs(wide) < float("inf"), value, 0.0).to(value.dtype)


@triton.jit
def wide_of(number, KV: tl.constexpr):
    """What `stored` has made int8 of, in float32, before it is multiplied by its scale."""
    if KV == "int8":
        return number.to(tl.float32)
    else:
        code = number.to(tl.int32) & 0xFF
        magnitude = code & 0x7F
        normal = ((magnitude << 20) + ((127 - 7) << 23)).to(tl.float32, bitcast=True)
        value = tl.where(magnitude < 8, magnitude.to(tl.float32) * 0.001953125, normal)
        return tl.where(code > 127, -value, value)
