"""Attention over the paged cache.

A context is cut at fixed positions into splits, and a split into tiles. Within a split, softmax goes from tile to tile;
splits are folded together from left to right. Whoever computes a row, and with whatever other rows, does this in the
same order with the same functions, so that its bits are its own. What a row cannot see weighs exactly nothing: walking
over more tiles than it needs changes no bit.

Legend: m rows of a tile (tokens times the query heads of one KV head), d head dim, s tokens per block, w tokens of a
tile of keys.
"""

import triton
import triton.language as tl

from quire.ops.triton.kernels.common import dot, rounded
from quire.ops.triton.kernels.kv_numbers import finite_or_zero, largest_of, scales_of, stored, wide_of

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _load_tile(
    cache,
    scales,
    block_w,
    within_w,
    d,
    stride_block,
    there_w,
    KV: tl.constexpr,
    E,
    D: tl.constexpr,
    S: tl.constexpr,
    TO: tl.constexpr,
):
    """`[w, D]` of keys or values; zeros where there are none."""
    i = tl.arange(0, D)
    there = there_w[:, None] & (i[None, :] < d)
    numbers = tl.load(
        cache + block_w[:, None] * stride_block + within_w[:, None] * E + i[None, :], mask=there, other=0.0
    )
    if KV == "wide":
        return numbers
    else:
        scale_w = tl.load(scales + (block_w * stride_block + S * E) // 4 + within_w, mask=there_w, other=0.0)
        return rounded(wide_of(numbers, KV) * scale_w[:, None], TO)


@triton.jit
def _tanh(x):
    """Of any float: what overflows is 1 or -1."""
    return 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0)


@triton.jit
def _shrink(m):
    """A maximum to subtract: of a row that has seen nothing, 0."""
    return tl.where(m == float("-inf"), 0.0, m)


@triton.jit
def fold(m_m, l_m, acc_md, other_m, other_l, other_acc):
    """(maximum, sum, weighted values) of what has been seen so far and of what comes next."""
    new_m = tl.maximum(m_m, other_m)
    safe_m = _shrink(new_m)
    old = tl.exp2(m_m - safe_m)
    now = tl.exp2(other_m - safe_m)
    return new_m, l_m * old + other_l * now, acc_md * old[:, None] + other_acc * now[:, None]


@triton.jit
def _attend_split(
    q_md,
    k_cache,
    v_cache,
    k_scales,
    v_scales,
    table,
    position_m,
    head_m,
    slopes,
    bias,
    first,
    end,
    d,
    stride_block,
    scale,
    softcap,
    window,
    farthest,
    E,
    S: tl.constexpr,
    TILE: tl.constexpr,
    D: tl.constexpr,
    M: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SLOPES: tl.constexpr,
    BIAS: tl.constexpr,
    KV: tl.constexpr,
):
    """One split: keys `first` to `end`, in tiles. Scores in base 2."""
    m_m = tl.full((M,), float("-inf"), tl.float32)
    l_m = tl.zeros((M,), tl.float32)
    acc_md = tl.zeros((M, D), tl.float32)
    for start in range(first, end, TILE):
        token_w = start + tl.arange(0, TILE)
        there_w = token_w < end
        block_w = tl.load(table + token_w // S, mask=there_w, other=0).to(tl.int64)
        within_w = token_w % S
        k_wd = _load_tile(k_cache, k_scales, block_w, within_w, d, stride_block, there_w, KV, E, D, S, q_md.dtype)
        score_mw = dot(q_md, tl.trans(k_wd), tl.zeros((M, TILE), tl.float32)) * scale
        if SOFTCAP:
            score_mw = softcap * _tanh(score_mw / softcap)
        distance_mw = token_w[None, :] - position_m[:, None]
        if SLOPES:
            slope_m = tl.load(slopes + head_m)
            score_mw = score_mw - slope_m[:, None] * tl.abs(distance_mw).to(tl.float32)
        if BIAS:
            near_mw = tl.minimum(tl.maximum(distance_mw, -farthest), farthest) + farthest
            score_mw = score_mw + tl.load(bias + head_m[:, None] * (2 * farthest + 1) + near_mw)
        seen_mw = there_w[None, :]
        if CAUSAL:
            seen_mw = seen_mw & (distance_mw <= 0)
        if WINDOW:
            seen_mw = seen_mw & (tl.abs(distance_mw) < window)
        score_mw = tl.where(seen_mw, score_mw * LOG2E, float("-inf"))
        new_m = tl.maximum(m_m, tl.max(score_mw, axis=1))
        safe_m = _shrink(new_m)
        p_mw = tl.exp2(score_mw - safe_m[:, None])
        old_m = tl.exp2(m_m - safe_m)
        v_wd = _load_tile(v_cache, v_scales, block_w, within_w, d, stride_block, there_w, KV, E, D, S, q_md.dtype)
        p_mw = rounded(p_mw, v_wd.dtype)
        # Added up as the products are: the order of `tl.sum` depends on how a tile lies in registers.
        sum_mc = dot(p_mw, tl.full((TILE, 16), 1.0, v_wd.dtype), tl.zeros((M, 16), tl.float32))
        l_m = l_m * old_m + tl.max(sum_mc, axis=1)
        acc_md = dot(p_mw, v_wd, acc_md * old_m[:, None])
        m_m = new_m
    return m_m, l_m, acc_md


@triton.jit
def _beginning(sinks, head_m, real_m, M: tl.constexpr, D: tl.constexpr, SINKS: tl.constexpr):
    """What has been seen before the first key: nothing, or a score without a value."""
    if SINKS:
        m_m = tl.load(sinks + head_m, mask=real_m, other=0.0) * LOG2E
        l_m = tl.full((M,), 1.0, tl.float32)
    else:
        m_m = tl.full((M,), float("-inf"), tl.float32)
        l_m = tl.zeros((M,), tl.float32)
    return m_m, l_m, tl.zeros((M, D), tl.float32)


@triton.jit
def _quotient(l_m, acc_md):
    """Zeros for a row that has seen nothing."""
    return acc_md / tl.where(l_m == 0.0, 1.0, l_m)[:, None]


@triton.jit
def plan_kernel(
    context_lens,
    request_ids,
    header,
    item_request,
    item_split,
    first_item,
    first_split,
    n,
    window,
    most_items,
    SPLIT: tl.constexpr,
    WINDOW: tl.constexpr,
    N: tl.constexpr,
):
    """The work of a step's decoding requests, `request_ids`; a program for each of the n. With more splits than
    `most_items`, an item is a whole request: `header` is (items, whether they are whole)."""
    me = tl.program_id(0)
    i = tl.arange(0, N)
    ids = tl.load(request_ids + i, mask=i < n, other=0)
    context = tl.load(context_lens + ids, mask=i < n, other=0)
    begin = context * 0
    if WINDOW:
        begin = tl.maximum(context - window, 0) // SPLIT
    splits = tl.where(context > 0, (context + SPLIT - 1) // SPLIT - begin, 0)
    total = tl.sum(splits, axis=0)
    start = tl.sum(tl.where(i < me, splits, 0), axis=0)
    mine = tl.sum(tl.where(i == me, splits, 0), axis=0)
    my_first = tl.sum(tl.where(i == me, begin, 0), axis=0)
    is_whole = total > most_items
    if me == 0:
        tl.store(header, tl.where(is_whole, n, total))
        tl.store(header + 1, is_whole.to(tl.int32))
    tl.store(first_item + me, start)
    tl.store(first_split + me, my_first)
    if is_whole:
        tl.store(item_request + me, me)
    else:
        for split in range(0, mine):
            tl.store(item_request + start + split, me)
            tl.store(item_split + start + split, my_first + split)


@triton.jit
def decode_kernel(
    q,
    k_cache,
    v_cache,
    k_scales,
    v_scales,
    table,
    query_start,
    context_lens,
    request_ids,
    header,
    item_request,
    item_split,
    first_split,
    slopes,
    bias,
    sinks,
    out,
    part_ml,
    part_acc,
    d,
    stride_qt,
    stride_qh,
    stride_ot,
    stride_oh,
    stride_head,
    stride_block,
    stride_table,
    scale,
    softcap,
    window,
    farthest,
    E,
    GROUP: tl.constexpr,
    HEADS: tl.constexpr,
    S: tl.constexpr,
    SPLIT: tl.constexpr,
    TILE: tl.constexpr,
    D: tl.constexpr,
    M: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SLOPES: tl.constexpr,
    BIAS: tl.constexpr,
    SINKS: tl.constexpr,
    KV: tl.constexpr,
):
    """Takes items, each for each of the KV heads (`HEADS` of them), as many as there are programs at a time."""
    count = tl.load(header) * HEADS
    is_whole = tl.load(header + 1)
    i = tl.arange(0, M)
    j = tl.arange(0, D)
    real_m = i < GROUP
    for number in range(tl.program_id(0), count, tl.num_programs(0)):
        index = count * 0 + number
        item = index // HEADS
        head = index % HEADS
        me = tl.load(item_request + item)
        request = tl.load(request_ids + me).to(tl.int64)
        context = tl.load(context_lens + request)
        row = tl.load(query_start + request).to(tl.int64)
        head_m = head * GROUP + tl.where(real_m, i, 0)
        inside = real_m[:, None] & (j[None, :] < d)
        q_md = tl.load(q + row * stride_qt + head_m[:, None] * stride_qh + j[None, :], mask=inside, other=0.0)
        if is_whole:
            first = tl.load(first_split + me)
            last = (context + SPLIT - 1) // SPLIT
        else:
            first = tl.load(item_split + item)
            last = first + 1
        m_m, l_m, acc_md = _beginning(sinks, head_m, real_m, M, D, SINKS)
        if SINKS:  # they come in where splits are folded
            m_m = tl.where(is_whole != 0, m_m, float("-inf"))
            l_m = tl.where(is_whole != 0, l_m, 0.0)
        position_m = tl.zeros((M,), tl.int32) + context - 1
        for split in range(first, last):
            other_m, other_l, other_acc = _attend_split(
                q_md,
                k_cache + head.to(tl.int64) * stride_head,
                v_cache + head.to(tl.int64) * stride_head,
                k_scales + head.to(tl.int64) * stride_head // 4,
                v_scales + head.to(tl.int64) * stride_head // 4,
                table + request * stride_table,
                position_m,
                head_m,
                slopes,
                bias,
                split * SPLIT,
                tl.minimum(split * SPLIT + SPLIT, context),
                d,
                stride_block,
                scale,
                softcap,
                window,
                farthest,
                E,
                S,
                TILE,
                D,
                M,
                CAUSAL,
                WINDOW,
                SOFTCAP,
                SLOPES,
                BIAS,
                KV,
            )
            m_m, l_m, acc_md = fold(m_m, l_m, acc_md, other_m, other_l, other_acc)
        if is_whole:
            value = rounded(_quotient(l_m, acc_md), out.dtype.element_ty)
            tl.store(out + row * stride_ot + head_m[:, None] * stride_oh + j[None, :], value, mask=inside)
        else:
            place = index.to(tl.int64)
            tl.store(part_ml + place * (2 * M) + i, m_m)
            tl.store(part_ml + place * (2 * M) + M + i, l_m)
            tl.store(part_acc + place * (M * D) + i[:, None] * D + j[None, :], acc_md, mask=real_m[:, None])


@triton.jit
def combine_kernel(
    query_start,
    context_lens,
    request_ids,
    header,
    first_item,
    first_split,
    sinks,
    out,
    part_ml,
    part_acc,
    d,
    stride_ot,
    stride_oh,
    GROUP: tl.constexpr,
    HEADS: tl.constexpr,
    SPLIT: tl.constexpr,
    D: tl.constexpr,
    M: tl.constexpr,
    SINKS: tl.constexpr,
):
    """One request and KV head: folds its splits. Rows of empty requests are zeros."""
    if tl.load(header + 1) != 0:
        return
    me = tl.program_id(0)
    head = tl.program_id(1)
    i = tl.arange(0, M)
    j = tl.arange(0, D)
    real_m = i < GROUP
    request = tl.load(request_ids + me).to(tl.int64)
    context = tl.load(context_lens + request)
    row = tl.load(query_start + request).to(tl.int64)
    start = tl.load(first_item + me)
    count = tl.where(context > 0, (context + SPLIT - 1) // SPLIT - tl.load(first_split + me), 0)
    head_m = head * GROUP + tl.where(real_m, i, 0)
    m_m, l_m, acc_md = _beginning(sinks, head_m, real_m, M, D, SINKS)
    for split in range(0, count):
        place = ((start + split) * HEADS + head).to(tl.int64)
        other_m = tl.load(part_ml + place * (2 * M) + i)
        other_l = tl.load(part_ml + place * (2 * M) + M + i)
        other_acc = tl.load(part_acc + place * (M * D) + i[:, None] * D + j[None, :], mask=real_m[:, None], other=0.0)
        m_m, l_m, acc_md = fold(m_m, l_m, acc_md, other_m, other_l, other_acc)
    value = rounded(_quotient(l_m, acc_md), out.dtype.element_ty)
    inside = real_m[:, None] & (j[None, :] < d)
    tl.store(out + row * stride_ot + head_m[:, None] * stride_oh + j[None, :], value, mask=inside)


@triton.jit
def prefill_kernel(
    q,
    k_cache,
    v_cache,
    k_scales,
    v_scales,
    table,
    query_start,
    context_lens,
    tile_request,
    tile_row,
    slopes,
    bias,
    sinks,
    out,
    d,
    stride_qt,
    stride_qh,
    stride_ot,
    stride_oh,
    stride_head,
    stride_block,
    stride_table,
    scale,
    softcap,
    window,
    farthest,
    E,
    GROUP: tl.constexpr,
    S: tl.constexpr,
    SPLIT: tl.constexpr,
    TILE: tl.constexpr,
    D: tl.constexpr,
    M: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SLOPES: tl.constexpr,
    BIAS: tl.constexpr,
    SINKS: tl.constexpr,
    KV: tl.constexpr,
):
    """One tile of a request's rows, for one KV head: M // GROUP tokens, each with the heads that share it."""
    head = tl.program_id(0)
    tile = tl.program_id(1)
    request = tl.load(tile_request + tile).to(tl.int64)
    first_row = tl.load(tile_row + tile)
    end_row = tl.load(query_start + request + 1)
    context = tl.load(context_lens + request)
    i = tl.arange(0, M)
    j = tl.arange(0, D)
    TOKENS: tl.constexpr = M // GROUP
    row_m = first_row + i // GROUP
    real_m = (i < TOKENS * GROUP) & (row_m < end_row)
    head_m = head * GROUP + i % GROUP
    position_m = tl.where(real_m, context - end_row + row_m, context - end_row + first_row)
    inside = real_m[:, None] & (j[None, :] < d)
    q_md = tl.load(
        q + row_m[:, None].to(tl.int64) * stride_qt + head_m[:, None] * stride_qh + j[None, :], mask=inside, other=0.0
    )
    lowest = context - end_row + first_row
    highest = context - end_row + tl.minimum(first_row + TOKENS, end_row) - 1
    begin = 0
    end = context
    if CAUSAL:
        end = highest + 1
    if WINDOW:
        begin = tl.maximum(lowest - window + 1, 0)
        end = tl.minimum(end, highest + window)
    m_m, l_m, acc_md = _beginning(sinks, head_m, real_m, M, D, SINKS)
    for split in range(begin // SPLIT, (end + SPLIT - 1) // SPLIT):
        other_m, other_l, other_acc = _attend_split(
            q_md,
            k_cache + head.to(tl.int64) * stride_head,
            v_cache + head.to(tl.int64) * stride_head,
            k_scales + head.to(tl.int64) * stride_head // 4,
            v_scales + head.to(tl.int64) * stride_head // 4,
            table + request * stride_table,
            position_m,
            head_m,
            slopes,
            bias,
            split * SPLIT,
            tl.minimum(split * SPLIT + SPLIT, end),
            d,
            stride_block,
            scale,
            softcap,
            window,
            farthest,
            E,
            S,
            TILE,
            D,
            M,
            CAUSAL,
            WINDOW,
            SOFTCAP,
            SLOPES,
            BIAS,
            KV,
        )
        m_m, l_m, acc_md = fold(m_m, l_m, acc_md, other_m, other_l, other_acc)
    value = rounded(_quotient(l_m, acc_md), out.dtype.element_ty)
    tl.store(
        out + row_m[:, None].to(tl.int64) * stride_ot + head_m[:, None] * stride_oh + j[None, :], value, mask=inside
    )


@triton.jit
def write_kernel(
    k,
    v,
    cache,
    scales,
    slots,
    d,
    e,
    s,
    stride_kt,
    stride_kh,
    stride_vt,
    stride_vh,
    stride_plane,
    stride_head,
    stride_block,
    D: tl.constexpr,
    KV: tl.constexpr,
):
    """One token, of one KV head: its key (plane 0) or its value (plane 1). `KV` and `scales` as in `kernels.fused`."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    plane = tl.program_id(2).to(tl.int64)
    TYPE: tl.constexpr = cache.dtype.element_ty
    j = tl.arange(0, D)[None, :]
    inside = j < d
    slot = tl.load(slots + token)
    if plane == 0:
        x = tl.load(k + token * stride_kt + head * stride_kh + j, mask=inside, other=0.0)
    else:
        x = finite_or_zero(tl.load(v + token * stride_vt + head * stride_vh + j, mask=inside, other=0.0))
    scale, inverse = scales_of(largest_of(x), KV)
    block_at = plane * stride_plane + head * stride_head + slot // s * stride_block
    if KV != "wide":
        tl.store(scales + (block_at + s * e) // 4 + slot % s + tl.zeros((1, 1), tl.int64), scale)
    tl.store(cache + block_at + slot % s * e + j, stored(x, inverse, KV, TYPE), mask=inside)
