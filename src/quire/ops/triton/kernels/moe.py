"""A sparse feed-forward block. Legend: t rows, n experts, k experts of a row, f features of a tile, m places in a tile.

A pair is a row and one of its experts, numbered row * k + rank, ranks by rising number of the expert. Pairs are put in
order of their experts; each expert's begin at a new tile, and places of a tile that stay empty hold -1.
"""

import triton
import triton.language as tl

from quire.ops.triton.kernels.common import rounded
from quire.ops.triton.kernels.linear import multiply_add, product


@triton.jit
def route_kernel(
    logits, probabilities, experts, n, TOP_K: tl.constexpr, BLOCK_N: tl.constexpr, RENORMALIZE: tl.constexpr
):
    """One row's experts, of equally likely ones the first. What is no number is taken last, so that all differ."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK_N)
    inside = i < n
    logit = tl.load(logits + row * n + i, mask=inside, other=-float("inf")).to(tl.float32)
    weight = tl.exp(logit - tl.max(logit, axis=0))
    share = weight / tl.sum(weight, axis=0)
    key = tl.where(logit == logit, logit, -float("inf"))
    free = inside
    total = 0.0
    for _ in tl.static_range(TOP_K):
        best = tl.max(tl.where(free, key, -float("inf")), axis=0)
        taken = tl.min(tl.where(free & (key == best), i, BLOCK_N), axis=0)
        total += tl.sum(tl.where(i == taken, share, 0.0), axis=0)
        free = free & (i != taken)
    chosen = inside & (free == 0)
    if RENORMALIZE:
        share = share / total
    place = row * TOP_K + tl.cumsum(chosen.to(tl.int32), axis=0) - 1
    tl.store(probabilities + place, share, mask=chosen)
    tl.store(experts + place, i, mask=chosen)


@triton.jit(do_not_specialize=["pairs"])
def count_kernel(experts, counts, pairs, BLOCK: tl.constexpr):
    """How many pairs the program's expert has."""
    expert = tl.program_id(0)
    count = 0
    for start in range(0, pairs, BLOCK):
        i = start + tl.arange(0, BLOCK)
        count += tl.sum((tl.load(experts + i, mask=i < pairs, other=-1) == expert).to(tl.int32), axis=0)
    tl.store(counts + expert, count)


@triton.jit(do_not_specialize=["pairs"])
def arrange_kernel(
    experts,
    counts,
    places,
    tile_experts,
    num_tiles,
    pairs,
    n,
    COUNTED: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The places and tiles of the program's expert. COUNTED: by `count_kernel`; otherwise all pairs fit in BLOCK."""
    expert = tl.program_id(0)
    e = tl.arange(0, BLOCK_N)
    j = tl.arange(0, BLOCK)
    if COUNTED:
        count_e = tl.load(counts + e, mask=e < n, other=0)
    else:
        count_e = tl.histogram(tl.load(experts + j, mask=j < pairs, other=BLOCK_N - 1), BLOCK_N)
    tiles_e = tl.where(e < n, (count_e + TILE - 1) // TILE, 0)
    first = tl.sum(tl.where(e < expert, tiles_e, 0), axis=0)
    last = first + tl.sum(tl.where(e == expert, tiles_e, 0), axis=0)
    if expert == 0:
        tl.store(num_tiles, tl.sum(tiles_e, axis=0))
    for tile in range(first, last, BLOCK):
        tl.store(tile_experts + tile + j, expert + j * 0, mask=tile + j < last)
    next_place = first * TILE
    for start in range(0, pairs, BLOCK):
        i = start + j
        mine = tl.load(experts + i, mask=i < pairs, other=-1) == expert
        rank = tl.cumsum(mine.to(tl.int32), axis=0)
        tl.store(places + next_place + rank - 1, i, mask=mine)
        next_place += tl.sum(mine.to(tl.int32), axis=0)
    empty = next_place + tl.arange(0, TILE)
    tl.store(places + empty, tl.full((TILE,), -1, tl.int32), mask=empty < last * TILE)


@triton.jit
def expert_rows(table, expert, features_f, k, W_TYPE: tl.constexpr, ALIGN: tl.constexpr):
    """`[f, 1]` of pointers to the rows of an expert's weight, whose address stands in a table."""
    w = tl.load(table + expert).to(tl.pointer_type(W_TYPE))
    return tl.multiple_of(w, ALIGN) + features_f.to(tl.int64)[:, None] * k


@triton.jit
def two_products(
    w, v, x, steps, k, BLOCK_F: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr
):
    """`product` of two weights over the same rows, in one loop."""
    i = tl.arange(0, BLOCK_K)
    w_ptrs, v_ptrs, x_ptrs = w + i[None, :], v + i[None, :], x + i[:, None]
    if x.dtype.element_ty == tl.int8:
        w_acc = tl.zeros((BLOCK_F, BLOCK_M), tl.int32)
        v_acc = tl.zeros((BLOCK_F, BLOCK_M), tl.int32)
    else:
        w_acc = tl.zeros((BLOCK_F, BLOCK_M), tl.float32)
        v_acc = tl.zeros((BLOCK_F, BLOCK_M), tl.float32)
    for step in range(steps):
        if EVEN_K:
            w_fk, v_fk, x_km = tl.load(w_ptrs), tl.load(v_ptrs), tl.load(x_ptrs)
        else:
            inside = step * BLOCK_K + i < k
            w_fk = tl.load(w_ptrs, mask=inside[None, :], other=0.0)
            v_fk = tl.load(v_ptrs, mask=inside[None, :], other=0.0)
            x_km = tl.load(x_ptrs, mask=inside[:, None], other=0.0)
        w_acc = multiply_add(w_fk, x_km, w_acc)
        v_acc = multiply_add(v_fk, x_km, v_acc)
        w_ptrs += BLOCK_K
        v_ptrs += BLOCK_K
        x_ptrs += BLOCK_K
    return w_acc, v_acc


@triton.jit
def scaled(acc_fm, table, expert, features_f, scale_m, SCALES: tl.constexpr):
    """In float32. SCALES as in `store_rows` of the linear layers."""
    y = acc_fm.to(tl.float32)
    if SCALES > 0:
        y *= tl.load(tl.load(table + expert).to(tl.pointer_type(tl.float32)) + features_f)[:, None]
    if SCALES > 1:
        y *= scale_m[None, :]
    return y


@triton.jit
def gated(gate, up, TYPE: tl.constexpr):
    """silu(gate) * up in float32, of both rounded to TYPE, and the first factor too."""
    gate = rounded(gate, TYPE).to(tl.float32)
    up = rounded(up, TYPE).to(tl.float32)
    return rounded(gate / (tl.exp(-gate) + 1.0), TYPE).to(tl.float32) * up


@triton.jit
def expert_kernel(
    x,
    x_scale,
    weights,
    second_weights,
    scales,
    second_scales,
    places,
    tile_experts,
    num_tiles,
    out,
    k,
    n,
    x_stride,
    GATED: tl.constexpr,
    TOP_K: tl.constexpr,
    W_TYPE: tl.constexpr,
    ALIGN: tl.constexpr,
    SCALES: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A tile of pairs by a tile of an expert's n output features, from x `[pairs / TOP_K, k]` to out `[pairs, n]`.

    GATED: silu(x W^T) * (x V^T), rounded after each of the three. The grid is for the most tiles there can be.
    """
    feature_tiles = tl.cdiv(n, BLOCK_F)
    tile = tl.program_id(0) // feature_tiles
    if tile >= tl.load(num_tiles):
        return
    expert = tl.load(tile_experts + tile)
    features_f = tl.program_id(0) % feature_tiles * BLOCK_F + tl.arange(0, BLOCK_F)
    safe_f = tl.minimum(features_f, n - 1)
    pair_m = tl.load(places + tile.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M))
    row_m = tl.maximum(pair_m, 0).to(tl.int64) // TOP_K
    x_m = x + row_m[None, :] * x_stride
    w_f = expert_rows(weights, expert, safe_f, k, W_TYPE, ALIGN)
    scale_m = row_m.to(tl.float32)
    if SCALES > 1:
        scale_m = tl.load(x_scale + row_m)
    steps = tl.cdiv(k, BLOCK_K)
    if GATED:
        v_f = expert_rows(second_weights, expert, safe_f, k, W_TYPE, ALIGN)
        gate, up = two_products(w_f, v_f, x_m, steps, k, BLOCK_F, BLOCK_M, BLOCK_K, EVEN_K)
        gate = scaled(gate, scales, expert, safe_f, scale_m, SCALES)
        up = scaled(up, second_scales, expert, safe_f, scale_m, SCALES)
        y = gated(gate, up, out.dtype.element_ty)
    else:
        acc = product(w_f, x_m, 0, steps, k, BLOCK_F, BLOCK_M, BLOCK_K, EVEN_K)
        y = scaled(acc, scales, expert, safe_f, scale_m, SCALES)
    spots = out + pair_m.to(tl.int64)[None, :] * n + features_f[:, None]
    tl.store(spots, rounded(y, out.dtype.element_ty), mask=(pair_m >= 0)[None, :] & (features_f < n)[:, None])


@triton.jit
def add_experts_kernel(shares, probabilities, out, d, TOP_K: tl.constexpr, BLOCK: tl.constexpr):
    """A row's sum over its pairs, by rising rank, in float32."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for rank in tl.static_range(TOP_K):
        pair = row * TOP_K + rank
        share = tl.load(shares + pair * d + i, mask=i < d, other=0.0).to(tl.float32)
        total += share * tl.load(probabilities + pair)
    tl.store(out + row * d + i, total.to(out.dtype.element_ty), mask=i < d)
