"""From the joint product of a layer to queries and the KV cache. Legend: t tokens, h query heads, g KV heads, d head
dim (e with an odd one padded), s tokens per block, r rotated dimensions."""

import triton
import triton.language as tl

from quire.ops.triton.kernels.common import rounded
from quire.ops.triton.kernels.kv_numbers import finite_or_zero, largest_of, scales_of, stored
from quire.ops.triton.kernels.norms import root_mean_square_scale, scaled


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
    TURNS_ALL: tl.constexpr,
    NORMED: tl.constexpr,
    OFFSETS: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Heads at `at` `[HEADS, 1]` as `rms_norm` and `rope` leave them, in the dtype of x.

    What each element is paired with is loaded beside it: it is in the cache then, and one tile is one layout.
    """
    TYPE: tl.constexpr = at.dtype.element_ty
    i = tl.arange(0, BLOCK)[None, :]
    # In this form the compiler sees that neighbours have neighbours for partners, and loads 16 bytes at once.
    partner = (i + HALF) % (2 * HALF)
    if not TURNS_ALL:
        partner = tl.where(i < 2 * HALF, partner, i)
    wide = tl.load(at + i, mask=present & (i < d), other=0.0).to(tl.float32)
    other = tl.load(at + partner, mask=present & (i < d), other=0.0).to(tl.float32)
    if NORMED:
        scale = root_mean_square_scale(wide, d, eps, HEADS, BLOCK)[:, None]
        w = tl.load(weight + i, mask=i < d, other=0.0).to(tl.float32)
        other_w = tl.load(weight + partner, mask=i < d, other=0.0).to(tl.float32)
        wide = scaled(wide, scale, w, offset, TYPE, OFFSETS).to(tl.float32)
        other = scaled(other, scale, other_w, offset, TYPE, OFFSETS).to(tl.float32)
    c = tl.load(cos + i % HALF, mask=i < 2 * HALF, other=0.0)
    s = tl.load(sin + i % HALF, mask=i < 2 * HALF, other=0.0)
    # The same roundings as `rotated`: x - y is x + -y.
    turned = wide * c + other * tl.where(i < HALF, -s, s)
    return rounded(tl.where(i < 2 * HALF, turned, wide), TYPE)


@triton.jit
def _store(
    cache, scales, block_at, place, value, head, written, head_stride, d, e, s, KV: tl.constexpr, BLOCK: tl.constexpr
):
    """Heads `[HEADS, 1]` of a token at `place` in its block, of which head 0's begins at `block_at`."""
    i = tl.arange(0, BLOCK)[None, :]
    head_at = block_at + head.to(tl.int64) * head_stride
    scale, inverse = scales_of(largest_of(value), KV)
    if KV != "wide":
        tl.store(scales + (head_at + s * e) // 4 + place, scale, mask=head < written)
    numbers = stored(value, inverse, KV, cache.dtype.element_ty)
    tl.store(cache + head_at + place * e + i, numbers, mask=(head < written) & (i < d))


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
    TURNS_ALL: tl.constexpr,
    NORMED: tl.constexpr,
    OFFSETS: tl.constexpr,
    KV: tl.constexpr,
    Q_PARTS: tl.constexpr,
    KV_PARTS: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Some heads of a token's queries, keys or values. `cache` is of the stored dtype and `scales` the same memory in
    float32; cache strides are in elements of `cache`. `KV` is "wide", "int8" or "fp8". `HALF` is r/2."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    position = tl.load(positions + row).to(tl.int64)
    slot = tl.load(slots + row).to(tl.int64)
    cos += position * angle_stride
    sin += position * angle_stride
    n = tl.arange(0, HEADS)[:, None]
    i = tl.arange(0, BLOCK)[None, :]
    if part < Q_PARTS:
        head = part * HEADS + n
        at = q + row * q_row_stride + head * q_head_stride
        turned = _turned(
            at, head < h, q_weight, cos, sin, d, eps, offset, HALF, TURNS_ALL, NORMED, OFFSETS, HEADS, BLOCK
        )
        tl.store(out + row * (h * d) + head * d + i, turned, mask=(head < h) & (i < d))
    else:
        block_at = slot // s * cache_block_stride
        written = tl.where(slot >= 0, g, 0)
        if part < Q_PARTS + KV_PARTS:
            head = (part - Q_PARTS) * HEADS + n
            at = k + row * k_row_stride + head * k_head_stride
            value = _turned(
                at, head < written, k_weight, cos, sin, d, eps, offset, HALF, TURNS_ALL, NORMED, OFFSETS, HEADS, BLOCK
            )
            _store(cache, scales, block_at, slot % s, value, head, written, cache_head_stride, d, e, s, KV, BLOCK)
        else:
            head = (part - Q_PARTS - KV_PARTS) * HEADS + n
            at = v + row * v_row_stride + head * v_head_stride
            value = finite_or_zero(tl.load(at + i, mask=(head < written) & (i < d), other=0.0))
            block_at += cache_part_stride
            _store(cache, scales, block_at, slot % s, value, head, written, cache_head_stride, d, e, s, KV, BLOCK)
