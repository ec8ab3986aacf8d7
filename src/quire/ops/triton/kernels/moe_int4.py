"""Experts in 4 bits. Legend: f features of a tile, m places in a tile, s spans of k, g groups, as in `int4`."""

import triton
import triton.language as tl

from quire.ops.triton.kernels.common import rounded
from quire.ops.triton.kernels.int4 import int4_product
from quire.ops.triton.kernels.moe import gated


@triton.jit
def one_product(
    tables,
    expert,
    experts,
    x_m,
    x_scale_m,
    k,
    n,
    safe_f,
    ALIGN: tl.constexpr,
    GROUP: tl.constexpr,
    SPAN: tl.constexpr,
    ZEROS: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """`[f, m]` of one weight of an expert. `tables` `[4, experts]`: of nibbles, scales, zeros, multipliers."""
    w = tl.multiple_of(tl.load(tables + expert).to(tl.pointer_type(tl.uint8)), ALIGN)
    scale = tl.load(tables + experts + expert).to(tl.pointer_type(tl.float32))
    zero = tl.load(tables + 2 * experts + expert).to(tl.pointer_type(tl.uint8))
    multiplier = tl.load(tables + 3 * experts + expert).to(tl.pointer_type(tl.int8))
    w_f = w + safe_f.to(tl.int64)[:, None] * (k // 2)
    return int4_product(
        w_f, x_m, x_scale_m, scale, zero, multiplier, 0, k // SPAN, n, safe_f, GROUP, SPAN, ZEROS, BLOCK_F, BLOCK_M
    )


@triton.jit
def int4_expert_kernel(
    x,
    x_scale,
    tables,
    second_tables,
    experts,
    places,
    tile_experts,
    num_tiles,
    out,
    k,
    n,
    GATED: tl.constexpr,
    TOP_K: tl.constexpr,
    ALIGN: tl.constexpr,
    GROUP: tl.constexpr,
    SPAN: tl.constexpr,
    ZEROS: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """As `expert_kernel`, of rows that `quantize_rows_kernel` has made, spans in halves. k is not cut into parts, so
    that a row's sum is the same however many pairs its expert has."""
    feature_tiles = tl.cdiv(n, BLOCK_F)
    tile = tl.program_id(0) // feature_tiles
    if tile >= tl.load(num_tiles):
        return
    expert = tl.load(tile_experts + tile)
    features_f = tl.program_id(0) % feature_tiles * BLOCK_F + tl.arange(0, BLOCK_F)
    safe_f = tl.minimum(features_f, n - 1)
    pair_m = tl.load(places + tile.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M))
    row_m = tl.maximum(pair_m, 0).to(tl.int64) // TOP_K
    x_m, x_scale_m = x + row_m[None, :] * k, x_scale + row_m * (k // SPAN)
    y = one_product(tables, expert, experts, x_m, x_scale_m, k, n, safe_f, ALIGN, GROUP, SPAN, ZEROS, BLOCK_F, BLOCK_M)
    if GATED:
        up = one_product(
            second_tables, expert, experts, x_m, x_scale_m, k, n, safe_f, ALIGN, GROUP, SPAN, ZEROS, BLOCK_F, BLOCK_M
        )
        y = gated(y, up, out.dtype.element_ty)
    spots = out + pair_m.to(tl.int64)[None, :] * n + features_f[:, None]
    tl.store(spots, rounded(y, out.dtype.element_ty), mask=(pair_m >= 0)[None, :] & (features_f < n)[:, None])
