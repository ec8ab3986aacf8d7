"""From the joint product of a layer to queries and the KV cache. Legend: t tokens, h query heads, g KV heads, d head
dim (e with an odd one padded), s tokens per block, r rotated dimensions."""

import triton
import triton.language as tl

from quire.ops.triton.kernels.common import rounded
from quire.ops.triton.kernels.kv_numbers import finite_or_zero, largest_of, scales_of, stored
from quire.ops.triton.kernels.norms import root_mean_square_scale, scaled
from quire.ops.triton.kernels.rows import rotated


@triton.jit
def _loaded(at, i, present, width):
    return tl.load(at + i, mask=present & (i < width), other=0.0).to(tl.float32)


@triton.jit
def _turned(
    at,
    present,
    weight,
    cos,
    sin,
    d,
    eps,
    offset,
    HALF: tl.constexpr,
    REST: tl.constexpr,
    NORMED: tl.constexpr,
    OFFSETS: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
    REST_BLOCK: tl.constexpr,
):
    """Heads at `at` `[HEADS, 1]` as `rms_norm` and `rope` leave them: both halves and what is not turned, in the dtype
    of x. They are loaded apart, and once more as a whole to be added up: it is in the cache then."""
    TYPE: tl.constexpr = at.dtype.element_ty
    i = tl.arange(0, HALF_BLOCK)[None, :]
    j = tl.arange(0, REST_BLOCK)[None, :]
    first = _loaded(at, i, present, HALF)
    second = _loaded(at + HALF, i, present, HALF)
    rest = _loaded(at + 2 * HALF, j, present, REST)
    if NORMED:
        whole = _loaded(at, tl.arange(0, BLOCK)[None, :], present, d)
        scale = root_mean_square_scale(whole, d, eps, HEADS, BLOCK)[:, None]
        first = scaled(first, scale, _loaded(weight, i, True, HALF), offset, TYPE, OFFSETS).to(tl.float32)
        second = scaled(second, scale, _loaded(weight + HALF, i, True, HALF), offset, TYPE, OFFSETS).to(tl.float32)
        rest = scaled(rest, scale, _loaded(weight + 2 * HALF, j, True, REST), offset, TYPE, OFFSETS).to(tl.float32)
    first, second = rotated(first, second, _loaded(cos, i, True, HALF), _loaded(sin, i, True, HALF))
    return rounded(first, TYPE), rounded(second, TYPE), rounded(rest, TYPE)


@triton.jit
def _store(at, i, value, present, width):
    tl.store(at + i, value, mask=present & (i < width))


@triton.jit
def qkv_kernel(
    q,
    k,
    v,
    q_weight,
    k_weight,
    cos,
    sin,
    positions,
    slots,
    out,
    cache,
    scales,
    h,
    g,
    d,
    e,
    s,
    eps,
    offset,
    q_row_stride,
    q_head_stride,
    k_row_stride,
    k_head_stride,
    v_row_stride,
    v_head_stride,
    angle_stride,
    cache_part_stride,
    cache_head_stride,
    cache_block_stride,
    HALF: tl.constexpr,
    REST: tl.constexpr,
    NORMED: tl.constexpr,
    OFFSETS: tl.constexpr,
    KV: tl.constexpr,
    Q_PARTS: tl.constexpr,
    KV_PARTS: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
    REST_BLOCK: tl.constexpr,
):
    """Some heads of a token's queries, keys or values. `cache` is of the stored dtype and `scales` the same memory in
    float32; cache strides are in bytes, over 8 bits, and else in elements. `KV` is "wide", "int8" or "fp8"."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    position = tl.load(positions + row).to(tl.int64)
    slot = tl.load(slots + row).to(tl.int64)
    cos += position * angle_stride
    sin += position * angle_stride
    i = tl.arange(0, HALF_BLOCK)[None, :]
    j = tl.arange(0, REST_BLOCK)[None, :]
    w = tl.arange(0, BLOCK)[None, :]
    n = tl.arange(0, HEADS)[:, None]
    TYPE: tl.constexpr = cache.dtype.element_ty
    if part < Q_PARTS:
        head = part * HEADS + n
        present = head < h
        at = q + row * q_row_stride + head * q_head_stride
        first, second, rest = _turned(
            at, present, q_weight, cos, sin, d, eps, offset,
            HALF, REST, NORMED, OFFSETS, HEADS, BLOCK, HALF_BLOCK, REST_BLOCK,
        )  # fmt: skip
        out_at = out + row * (h * d) + head * d
        _store(out_at, i, first, present, HALF)
        _store(out_at + HALF, i, second, present, HALF)
        _store(out_at + 2 * HALF, j, rest, present, REST)
    elif part < Q_PARTS + KV_PARTS:
        head = (part - Q_PARTS) * HEADS + n
        present = (head < g) & (slot >= 0)
        at = k + row * k_row_stride + head * k_head_stride
        first, second, rest = _turned(
            at, present, k_weight, cos, sin, d, eps, offset,
            HALF, REST, NORMED, OFFSETS, HEADS, BLOCK, HALF_BLOCK, REST_BLOCK,
        )  # fmt: skip
        largest = tl.maximum(tl.maximum(largest_of(first), largest_of(second)), largest_of(rest))
        scale, inverse = scales_of(largest, KV)
        head_at = slot // s * cache_block_stride + head.to(tl.int64) * cache_head_stride
        if KV != "wide":
            tl.store(scales + (head_at + s * e) // 4 + slot % s, scale, mask=present)
        token_at = cache + head_at + slot % s * e
        _store(token_at, i, stored(first, inverse, KV, TYPE), present, HALF)
        _store(token_at + HALF, i, stored(second, inverse, KV, TYPE), present, HALF)
        _store(token_at + 2 * HALF, j, stored(rest, inverse, KV, TYPE), present, REST)
    else:
        head = (part - Q_PARTS - KV_PARTS) * HEADS + n
        present = (head < g) & (slot >= 0)
        at = v + row * v_row_stride + head * v_head_stride
        value = finite_or_zero(tl.load(at + w, mask=present & (w < d), other=0.0))
        scale, inverse = scales_of(largest_of(value), KV)
        head_at = cache_part_stride + slot // s * cache_block_stride + head.to(tl.int64) * cache_head_stride
        if KV != "wide":
            tl.store(scales + (head_at + s * e) // 4 + slot % s, scale, mask=present)
        _store(cache + head_at + slot % s * e, w, stored(value, inverse, KV, TYPE), present, d)
