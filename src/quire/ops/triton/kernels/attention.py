"""Paged attention on the device: one step over a tile of keys, shared by a kernel for rows that decode and one for
chunks of prompts.

What a row is computed from, and in which order, is fixed by its position alone: the context is cut at multiples of
SPLIT tokens, a split at multiples of TILE tokens. Inside a split softmax is online over its tiles in order; splits are
folded left to right. A tile that a row does not see changes none of its bits. Sums over keys are matrix products too
(weights times ones), as the order of a reduction would depend on how many rows share a tile.

Numbers that change from step to step are not specialised on: no variant is compiled while requests wait.

Legend: r rows (query heads of one KV head, of one or several tokens), c keys of a tile, d head dim, padded to D.
"""

import triton
import triton.language as tl

from quire.ops.triton.kernels.common import dot

_LOG2E = tl.constexpr(1.4426950408889634)
_HIDDEN = tl.constexpr(float("-inf"))


@triton.jit
def fold(top, total, weighted, top_2, total_2, weighted_2):
    """Softmax of later keys into that of earlier ones: `[r]`, `[r, any]`, `[r, D]`. Where either is of no key, the
    other's bits stay."""
    both = tl.maximum(top, top_2)
    base = tl.where(both == _HIDDEN, 0.0, both)
    decay, gain = tl.exp2(top - base), tl.exp2(top_2 - base)
    decay, gain = decay[:, None], gain[:, None]
    return both, total * decay + total_2 * gain, weighted * decay + weighted_2 * gain


@triton.jit
def finish(top, total, weighted, sinks, head, inside, SINKS: tl.constexpr):
    """The weighted mean, sinks' share taken off; zeros for a row that saw nothing."""
    if SINKS:
        sink = tl.load(sinks + head, mask=inside, other=0.0)
        both = tl.maximum(top, sink)
        decay = tl.exp2(top - both)
        total = total * decay + tl.exp2(sink - both)
        weighted = weighted * decay[:, None]
    return weighted / tl.where(total == 0.0, 1.0, total)[:, None]


@triton.jit
def attend_tile(
    q,
    top,
    total,
    weighted,
    first,
    stop,
    position,
    limit,
    head,
    slope,
    keys,
    values,
    key_scales,
    value_scales,
    block_stride,
    scale_stride,
    table,
    bias,
    farthest,
    scale,
    cap,
    window,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    D: tl.constexpr,
    TILE: tl.constexpr,
    QUANTIZED: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SLOPES: tl.constexpr,
    BIAS: tl.constexpr,
):
    """The keys from `first` to before `stop`, a tile at most. A row sees those before its `limit`."""
    stored_dim: tl.constexpr = HEAD_DIM + HEAD_DIM % 2
    i_c, i_d = first + tl.arange(0, TILE), tl.arange(0, D)
    there = i_c < stop
    block = tl.load(table + i_c // BLOCK_SIZE, mask=there, other=0).to(tl.int64)
    offset = i_c % BLOCK_SIZE
    place = block[:, None] * block_stride + offset[:, None] * stored_dim + i_d[None, :]
    inside = there[:, None] & (i_d < HEAD_DIM)[None, :]
    k = tl.load(keys + place, mask=inside, other=0.0)
    v = tl.load(values + place, mask=inside, other=0.0)
    if QUANTIZED:
        # By way of float32, as the interpreter converts nothing else to bfloat16.
        k = k.to(tl.float32)
    scores = dot(q, tl.trans(k.to(q.dtype)), tl.zeros([q.shape[0], TILE], tl.float32))
    if QUANTIZED:
        scale_place = block * scale_stride + offset
        scores *= tl.load(key_scales + scale_place, mask=there, other=0.0)[None, :]
        v_scale = tl.load(value_scales + scale_place, mask=there, other=0.0)
        v = v.to(tl.float32) * v_scale[:, None]
    v = v.to(q.dtype)
    scores *= scale
    if SOFTCAP:
        # tanh by one exponential; cap and scale hold the factors of base 2.
        scores = cap * (1.0 - 2.0 / (tl.exp2(scores) + 1.0))
    distance = i_c[None, :] - position[:, None]
    if SLOPES:
        scores -= slope[:, None] * tl.abs(distance).to(tl.float32)
    if BIAS:
        near = tl.minimum(tl.maximum(distance, -farthest), farthest) + farthest
        added = tl.load(bias + head[:, None] * (2 * farthest + 1) + near, mask=(limit > 0)[:, None], other=0.0)
        scores += added * _LOG2E
    seen = i_c[None, :] < limit[:, None]
    if WINDOW:
        seen &= tl.abs(distance) < window
    scores = tl.where(seen, scores, _HIDDEN)
    new_top = tl.maximum(top, tl.max(scores, axis=1))
    base = tl.where(new_top == _HIDDEN, 0.0, new_top)
    weights = tl.exp2(scores - base[:, None]).to(q.dtype)
    decay = tl.exp2(top - base)
    ones = tl.full([TILE, 16], 1.0, q.dtype)
    total = dot(weights, ones, total * decay[:, None])
    weighted = dot(weights, v, weighted * decay[:, None])
    return new_top, total, weighted


@triton.jit(do_not_specialize=["table_stride", "requests", "most_items", "programs"])
def decode_kernel(
    q,
    out,
    partial,
    tops,
    totals,
    plan,
    keys,
    values,
    key_scales,
    value_scales,
    head_stride,
    block_stride,
    scale_head_stride,
    scale_stride,
    table,
    table_stride,
    bias,
    slopes,
    farthest,
    scale,
    cap,
    window,
    sinks,
    requests,
    most_items,
    programs,
    SINKS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    SPLIT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    D: tl.constexpr,
    TILE: tl.constexpr,
    QUANTIZED: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SLOPES: tl.constexpr,
    BIAS: tl.constexpr,
    MULTIPLIED: tl.constexpr,
):
    """Items of the work list, each one split of one request, for one KV head at a time. Softmax of each goes to the
    workspace, by item and query head. Of a list of whole requests, a program folds the splits itself, and writes what
    comes out. See `plan_kernel` for what `plan` holds."""
    is_whole = tl.load(plan + 4 * requests + 1 + 2 * most_items) != 0
    row_of, context_of, item_start = plan, plan + requests, plan + 3 * requests
    items = plan + 4 * requests + 1
    work = tl.load(item_start + requests) * KV_HEADS
    i_r, i_d = tl.arange(0, ROWS), tl.arange(0, D)
    for number in range(tl.program_id(0), work, programs):
        item, g = number // KV_HEADS, number % KV_HEADS
        request, split = tl.load(items + 2 * item), tl.load(items + 2 * item + 1)
        context = tl.load(context_of + request)
        head = g * GROUP + i_r
        real = i_r < GROUP
        q_place = (tl.load(row_of + request).to(tl.int64) * (KV_HEADS * GROUP) + head) * HEAD_DIM
        inside = real[:, None] & (i_d < HEAD_DIM)[None, :]
        q_rd = tl.load(q + q_place[:, None] + i_d[None, :], mask=inside, other=0.0).to(MULTIPLIED)
        slope = tl.zeros([ROWS], tl.float32)
        if SLOPES:
            slope = tl.load(slopes + head, mask=real, other=0.0)
        position = tl.zeros([ROWS], tl.int32) + (context - 1)
        limit = tl.where(real, context, 0)
        first = tl.where(is_whole, 0, split * SPLIT)
        stop = tl.where(is_whole, context, tl.minimum(split * SPLIT + SPLIT, context))
        if WINDOW:
            first = tl.maximum(first, tl.maximum(context - window, 0) // TILE * TILE)
        all_top = tl.full([ROWS], _HIDDEN, tl.float32)
        all_total = tl.zeros([ROWS, 16], tl.float32)
        all_weighted = tl.zeros([ROWS, D], tl.float32)
        top, total, weighted = all_top, all_total, all_weighted
        g_64 = tl.full([], 0, tl.int64) + g
        for tile in range(first, stop, TILE):
            top, total, weighted = attend_tile(
                q_rd,
                top,
                total,
                weighted,
                tile,
                stop,
                position,
                limit,
                head,
                slope,
                keys + g_64 * head_stride,
                values + g_64 * head_stride,
                key_scales + g_64 * scale_head_stride,
                value_scales + g_64 * scale_head_stride,
                block_stride,
                scale_stride,
                table + request.to(tl.int64) * table_stride,
                bias,
                farthest,
                scale,
                cap,
                window,
                HEAD_DIM,
                BLOCK_SIZE,
                D,
                TILE,
                QUANTIZED,
                WINDOW,
                SOFTCAP,
                SLOPES,
                BIAS,
            )
            if ((tile + TILE) % SPLIT == 0) | (tile + TILE >= stop):
                all_top, all_total, all_weighted = fold(all_top, all_total, all_weighted, top, total, weighted)
                top = tl.full([ROWS], _HIDDEN, tl.float32)
                total = tl.zeros([ROWS, 16], tl.float32)
                weighted = tl.zeros([ROWS, D], tl.float32)
        # All sixteen columns are alike.
        all_total = tl.max(all_total, axis=1)
        if is_whole:
            result = finish(all_top, all_total, all_weighted, sinks, head, real, SINKS)
            # An empty request may have no row of its own.
            written = inside & (limit > 0)[:, None]
            tl.store(out + q_place[:, None] + i_d[None, :], result.to(out.dtype.element_ty), mask=written)
        else:
            place = (tl.full([], 0, tl.int64) + item) * (KV_HEADS * GROUP) + head
            tl.store(tops + place, all_top, mask=real)
            tl.store(totals + place, all_total, mask=real)
            tl.store(partial + place[:, None] * D + i_d[None, :], all_weighted, mask=real[:, None])


@triton.jit(do_not_specialize=["requests", "most_items"])
def combine_kernel(
    out,
    partial,
    tops,
    totals,
    plan,
    sinks,
    requests,
    most_items,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    D: tl.constexpr,
    SINKS: tl.constexpr,
    HEADS_AT_ONCE: tl.constexpr,
):
    """One row of the output, some of its heads: its splits folded in order. Of whole requests the rows are there
    already, but for those that are nobody's (-1). Where no request is to be served (-2), there is no row either."""
    is_whole = tl.load(plan + 4 * requests + 1 + 2 * most_items) != 0
    request = tl.load(plan + 2 * requests + tl.program_id(0))
    head, i_d = tl.program_id(1) * HEADS_AT_ONCE + tl.arange(0, HEADS_AT_ONCE), tl.arange(0, D)
    real = head < HEADS
    top = tl.full([HEADS_AT_ONCE], _HIDDEN, tl.float32)
    total = tl.zeros([HEADS_AT_ONCE, 1], tl.float32)
    weighted = tl.zeros([HEADS_AT_ONCE, D], tl.float32)
    row = tl.program_id(0)
    if ((request >= 0) & is_whole) | (request < -1):
        return
    if request >= 0:
        row = tl.load(plan + request)
        # One split after the other, but their loads run ahead.
        first, stop = tl.load(plan + 3 * requests + request), tl.load(plan + 3 * requests + request + 1)
        for item in tl.range(first, stop, num_stages=8):
            place = tl.zeros([HEADS_AT_ONCE], tl.int64) + item
            place = place * HEADS + head
            top_2 = tl.load(tops + place, mask=real, other=0.0)
            total_2 = tl.load(totals + place, mask=real, other=0.0)[:, None]
            weighted_2 = tl.load(partial + place[:, None] * D + i_d[None, :], mask=real[:, None], other=0.0)
            top, total, weighted = fold(top, total, weighted, top_2, total_2, weighted_2)
        weighted = finish(top, tl.max(total, axis=1), weighted, sinks, head, real, SINKS)
    place = (row.to(tl.int64) * HEADS + head) * HEAD_DIM
    inside = real[:, None] & (i_d < HEAD_DIM)[None, :]
    tl.store(out + place[:, None] + i_d[None, :], weighted.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["tiles", "table_stride"])
def prefill_kernel(
    q,
    out,
    tiles,
    keys,
    values,
    key_scales,
    value_scales,
    head_stride,
    block_stride,
    scale_head_stride,
    scale_stride,
    table,
    table_stride,
    bias,
    slopes,
    sinks,
    farthest,
    scale,
    cap,
    window,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    SPLIT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    D: tl.constexpr,
    TILE: tl.constexpr,
    QUANTIZED: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SLOPES: tl.constexpr,
    BIAS: tl.constexpr,
    SINKS: tl.constexpr,
    CAUSAL: tl.constexpr,
    MULTIPLIED: tl.constexpr,
):
    """A tile of a request's tokens, with the query heads of one KV head. `tiles` has five numbers of each: request,
    first row, tokens, first token's position, context."""
    mine = tiles + 5 * tl.program_id(0)
    request, first_row, tokens = tl.load(mine), tl.load(mine + 1), tl.load(mine + 2)
    first_position, context = tl.load(mine + 3), tl.load(mine + 4)
    g = tl.program_id(1)
    g_64 = g.to(tl.int64)
    i_r, i_d = tl.arange(0, ROWS), tl.arange(0, D)
    real = i_r < tokens * GROUP
    token = tl.where(real, i_r // GROUP, 0)
    head = g * GROUP + i_r % GROUP
    q_place = ((first_row + token).to(tl.int64) * (KV_HEADS * GROUP) + head) * HEAD_DIM
    inside = real[:, None] & (i_d < HEAD_DIM)[None, :]
    q_rd = tl.load(q + q_place[:, None] + i_d[None, :], mask=inside, other=0.0).to(MULTIPLIED)
    slope = tl.zeros([ROWS], tl.float32)
    if SLOPES:
        slope = tl.load(slopes + head, mask=real, other=0.0)
    position = first_position + token
    first, stop = 0, context
    if CAUSAL:
        limit = tl.where(real, position + 1, 0)
        stop = first_position + tokens
    else:
        limit = tl.where(real, context, 0)
    if WINDOW:
        first = tl.maximum(first_position + 1 - window, 0) // TILE * TILE
        stop = tl.minimum(stop, first_position + tokens - 1 + window)
    all_top = tl.full([ROWS], _HIDDEN, tl.float32)
    all_total = tl.zeros([ROWS, 16], tl.float32)
    all_weighted = tl.zeros([ROWS, D], tl.float32)
    top, total, weighted = all_top, all_total, all_weighted
    for tile in range(first, stop, TILE):
        top, total, weighted = attend_tile(
            q_rd,
            top,
            total,
            weighted,
            tile,
            stop,
            position,
            limit,
            head,
            slope,
            keys + g_64 * head_stride,
            values + g_64 * head_stride,
            key_scales + g_64 * scale_head_stride,
            value_scales + g_64 * scale_head_stride,
            block_stride,
            scale_stride,
            table + request.to(tl.int64) * table_stride,
            bias,
            farthest,
            scale,
            cap,
            window,
            HEAD_DIM,
            BLOCK_SIZE,
            D,
            TILE,
            QUANTIZED,
            WINDOW,
            SOFTCAP,
            SLOPES,
            BIAS,
        )
        # One loop over tiles rather than one over splits with another inside: loads run ahead across splits.
        if ((tile + TILE) % SPLIT == 0) | (tile + TILE >= stop):
            all_top, all_total, all_weighted = fold(all_top, all_total, all_weighted, top, total, weighted)
            top = tl.full([ROWS], _HIDDEN, tl.float32)
            total = tl.zeros([ROWS, 16], tl.float32)
            weighted = tl.zeros([ROWS, D], tl.float32)
    result = finish(all_top, tl.max(all_total, axis=1), all_weighted, sinks, head, real, SINKS)
    tl.store(out + q_place[:, None] + i_d[None, :], result.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["requests", "most_items"])
def plan_kernel(
    query_start,
    context_lens,
    plan,
    window,
    requests,
    most_items,
    SPLIT: tl.constexpr,
    WINDOW: tl.constexpr,
    REQUESTS: tl.constexpr,
):
    """The work list of requests that decode, from lengths on the device: program i writes what concerns request i and
    row i.

    `plan`, in int32: each request's row; its context; the request of each row of the output, or -1; where each
    request's items start, and their number at the end; items: request, split; room for them up to `most_items`; whether
    items are whole requests, as they are where there are more splits than that.
    """
    mine = tl.program_id(0)
    i = tl.arange(0, REQUESTS)
    there = i < requests
    contexts = tl.load(context_lens + i, mask=there, other=0)
    rows = tl.load(query_start + i, mask=there, other=0)
    firsts = tl.zeros([REQUESTS], tl.int32)
    if WINDOW:
        firsts = tl.maximum(contexts - window, 0) // SPLIT
    counts = (contexts + SPLIT - 1) // SPLIT - firsts
    start = tl.sum(tl.where(i < mine, counts, 0), axis=0)
    count = tl.sum(tl.where(i == mine, counts, 0), axis=0)
    first = tl.sum(tl.where(i == mine, firsts, 0), axis=0)
    tl.store(plan + mine, tl.sum(tl.where(i == mine, rows, 0), axis=0))
    tl.store(plan + requests + mine, tl.sum(tl.where(i == mine, contexts, 0), axis=0))
    served = tl.max(tl.where((rows == mine) & (contexts > 0), i, -1), axis=0)
    tl.store(plan + 2 * requests + mine, served)
    is_whole = tl.sum(counts, axis=0) > most_items
    if mine == 0:
        tl.store(plan + 4 * requests + 1 + 2 * most_items, is_whole.to(tl.int32))
    if is_whole:
        start = mine
        count = 1
    tl.store(plan + 3 * requests + mine, start)
    if mine == requests - 1:
        tl.store(plan + 4 * requests, start + count)
    items = plan + 4 * requests + 1
    for done in range(0, count, 128):
        j = done + tl.arange(0, 128)
        tl.store(items + 2 * (start + j), tl.zeros([128], tl.int32) + mine, mask=j < count)
        tl.store(items + 2 * (start + j) + 1, first + j, mask=j < count)


@triton.jit(do_not_specialize=["tokens"])
def write_kernel(
    keys,
    values,
    cache,
    scales,
    slots,
    tokens,
    key_strides_t,
    key_strides_g,
    value_strides_t,
    value_strides_g,
    value_start,
    head_stride,
    block_stride,
    scale_value_start,
    scale_head_stride,
    scale_stride,
    largest,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    D: tl.constexpr,
    TOKENS: tl.constexpr,
    QUANTIZED: tl.constexpr,
    ROUNDED: tl.constexpr,
):
    """Some tokens' keys and values of one head. Values that are not finite become zero; a key that is not spoils its
    token's scale where there is one, so that its scores are NaN as they would be in full width."""
    i_t, i_d = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS), tl.arange(0, D)
    g = tl.program_id(1).to(tl.int64)
    there = i_t < tokens
    inside = there[:, None] & (i_d < HEAD_DIM)[None, :]
    slot = tl.load(slots + i_t, mask=there, other=0).to(tl.int64)
    block, offset = slot // BLOCK_SIZE, slot % BLOCK_SIZE
    stored_dim: tl.constexpr = HEAD_DIM + HEAD_DIM % 2
    place = g * head_stride + block * block_stride + offset * stored_dim
    place = place[:, None] + i_d[None, :]
    scale_place = g * scale_head_stride + block * scale_stride + offset
    t_64 = i_t.to(tl.int64)
    k = tl.load(keys + (t_64 * key_strides_t + g * key_strides_g)[:, None] + i_d[None, :], mask=inside, other=0.0)
    v = tl.load(values + (t_64 * value_strides_t + g * value_strides_g)[:, None] + i_d[None, :], mask=inside, other=0.0)
    v = tl.where(tl.abs(v.to(tl.float32)) < float("inf"), v, 0.0)
    if QUANTIZED:
        k, k_scale = quantized(k.to(tl.float32), largest, ROUNDED)
        v, v_scale = quantized(v.to(tl.float32), largest, ROUNDED)
        tl.store(scales + scale_place, k_scale, mask=there)
        tl.store(scales + scale_value_start + scale_place, v_scale, mask=there)
    tl.store(cache + place, k.to(cache.dtype.element_ty), mask=inside)
    tl.store(cache + value_start + place, v.to(cache.dtype.element_ty), mask=inside)


@triton.jit
def quantized(x, largest, ROUNDED: tl.constexpr):
    """Numbers to store, and each row's scale."""
    finite = tl.abs(x) < float("inf")
    sound = tl.min(finite.to(tl.int32), axis=1) == 1
    clean = tl.where(finite, x, 0.0)
    scale = tl.div_rn(tl.max(tl.abs(clean), axis=1), largest + tl.zeros([x.shape[0]], tl.float32))
    ones = tl.full([x.shape[0]], 1.0, tl.float32)
    inverse = tl.where(sound & (scale > 0), tl.div_rn(ones, tl.where(scale > 0, scale, 1.0)), 0.0)
    numbers = tl.minimum(tl.maximum(clean * inverse[:, None], -largest), largest)
    if ROUNDED:
        # To the nearest whole number, halves to even ones: the sum has no bits left for a fraction.
        numbers = (numbers + 12582912.0) - 12582912.0
    else:
        # To three bits after the first, or to 2**-9: the interpreter's own conversion loses a carry.
        bits = numbers.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFFF + ((bits >> 20) & 1)) & -1048576
        coarse = (numbers + 24576.0) - 24576.0
        numbers = tl.where(tl.abs(numbers) < 0.015625, coarse, bits.to(tl.float32, bitcast=True))
    return numbers, tl.where(sound, scale, float("nan"))
