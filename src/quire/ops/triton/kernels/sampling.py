"""From a row of logits to one token, as `ops/choosing.py` defines it, bit for bit.

Legend: s rows, v vocabulary, `most` a row's largest logit. A token's weight is e to the power of its depth below it;
its rank is the number of float32 steps from its weight up to 1, so that the likeliest have rank 0. Tokens fall into
buckets of 2^18 ranks, a thirty-second of a power of two each.

What makes the definition's sums cheap here: in a bucket all weights are multiples of one unit, few enough of them that
float64 holds any sum exactly, in any order. A bucket is therefore kept as one whole number, how many tokens it has
above 40 bits of how far their ranks together are below its first; atomic additions to it always give the same. Only
sums over buckets, over blocks and in the block of the drawn token round, and these are made one by one.

min_p, top_k and top_p all keep a first part of the tokens by (rank, id): a cut is a last rank and how many tokens of
that rank there are yet. Programs of one row meet in memory, between launches or across barriers.
"""

import triton
import triton.language as tl

from quire.ops.triton.kernels.weights import (
    ALL,
    BLOCK,
    BUCKETS,
    COUNTED,
    FAR_DEPTH,
    NEAR,
    ONE,
    clear,
    find_bucket,
    invert,
    rank_of,
    reached,
    row_best,
    sum_blocks,
    tally,
    total_of,
    uniform,
    unit_of,
    weigh,
    weights_at,
)

NOT_FINITE = tl.constexpr(-1)


@triton.jit
def refine(logits, ids, hist, n, edge, before, goal, counted, most, temperature, TILE: tl.constexpr):
    """The cut in bucket `edge` of a list: (the last rank, how many tokens of that rank are kept)."""
    first, step = unit_of(edge)
    i = tl.arange(0, NEAR)
    prefix = tl.full([], 0, tl.int64)
    found = edge
    missing = edge >= BUCKETS
    room = tl.full([], 0, tl.int64)
    for level in tl.static_range(2):  # nine bits of the rank at a time
        tl.debug_barrier()
        clear(hist, 0, NEAR)
        tl.debug_barrier()
        for start in range(0, n, TILE):
            place = start + tl.arange(0, TILE)
            rank = rank_of(weights_at(logits, ids, place, place < n, most, temperature, True))
            if level == 0:
                matches = (place < n) & ((rank >> 18) == found)
                part = (rank >> 9) & 0x1FF
            else:
                matches = (place < n) & ((rank >> 9) == found)
                part = rank & 0x1FF
            one = (rank & 0x3FFFF).to(tl.int64) + COUNTED
            tl.atomic_add(hist + part, one, mask=matches, sem="relaxed")
        tl.debug_barrier()
        packed = tl.load(hist + i, cache_modifier=".cg")
        upto = prefix + tl.cumsum(packed, axis=0)
        short = tl.sum(tl.where(reached(upto, before, goal, first, step, counted), 0, 1), axis=0)
        missing = missing | (short >= NEAR)
        prefix += tl.sum(tl.where(i < short, packed, 0), axis=0)
        room = tl.sum(tl.where(i == short, packed, 0), axis=0) >> 40
        found = (found << 9) | tl.minimum(short, NEAR - 1)
    unit = COUNTED + (found & 0x3FFFF).to(tl.int64)
    low = tl.full([], 1, tl.int64)
    while low < room:
        middle = (low + room) // 2
        enough = reached(prefix + middle * unit, before, goal, first, step, counted)
        low = tl.where(enough, low, middle + 1)
        room = tl.where(enough, middle, room)
    return tl.where(missing, ALL, found), tl.where(missing, 0, low).to(tl.int32)


@triton.jit
def keep(logits, ids, n, last, ties, most, temperature, TILE: tl.constexpr):
    """Moves what a cut leaves of a list to its front; how many these are."""
    kept = tl.full([], 0, tl.int32)
    seen = tl.full([], 0, tl.int32)
    for start in range(0, n, TILE):
        place = start + tl.arange(0, TILE)
        inside = place < n
        token = tl.load(ids + place, mask=inside, other=0)
        rank = rank_of(weigh(tl.load(logits + token, mask=inside, other=-float("inf")), most, temperature))
        tie = (inside & (rank == last)).to(tl.int32)
        number = seen + tl.cumsum(tie, axis=0)
        stays = inside & ((rank < last) | ((tie > 0) & (number <= ties)))
        to = kept + tl.cumsum(stays.to(tl.int32), axis=0) - 1
        tl.debug_barrier()  # all have read what is written over now
        tl.store(ids + to, token, mask=stays)
        kept += tl.sum(stays.to(tl.int32), axis=0)
        seen += tl.sum(tie, axis=0)
    tl.debug_barrier()
    return kept


@triton.jit
def best_kernel(logits, stride, v, chunk_max, chunk_id, hist, chunks, CHUNK: tl.constexpr):
    """(row, part): of each chunk of the part the largest logit, NaN if one is there, and the lowest id that has it."""
    row = tl.program_id(0).to(tl.int64)
    if tl.program_id(1) == 0:
        clear(hist + row * BUCKETS, 0, NEAR)
    for chunk in range(tl.program_id(1), chunks, tl.num_programs(1)):
        token = chunk * CHUNK + tl.arange(0, CHUNK)
        x = tl.load(logits + row * stride + token, mask=token < v, other=-float("inf"))
        broken = tl.sum((x != x).to(tl.int32), axis=0) > 0
        most = tl.max(x, axis=0)
        best = tl.min(tl.where((x == most) & (token < v), token, ALL), axis=0)
        tl.store(chunk_max + row * chunks + chunk, tl.where(broken, float("nan"), most))
        tl.store(chunk_id + row * chunks + chunk, best)


@triton.jit
def weigh_kernel(
    logits, stride, v, temperature_s, top_k_s, top_p_s, chunk_max, chunk_id, sums, hist, chunks, blocks,
    CHUNK: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """(row, part): what each block weighs, and the near tokens into their buckets where truncation wants them."""
    row = tl.program_id(0).to(tl.int64)
    temperature = tl.load(temperature_s + row)
    if temperature <= 0.0:
        return
    most, _, finite = row_best(chunk_max, chunk_id, row, chunks, CHUNKS)
    if finite == 0:
        return
    logits += row * stride
    truncates = (tl.load(top_k_s + row) > 0) | (tl.load(top_p_s + row) < 1.0)
    for chunk in range(tl.program_id(1), chunks, tl.num_programs(1)):
        first_block = chunk * (CHUNK // BLOCK)
        sum_blocks(
            logits, logits, sums + row * blocks, first_block, v, most, temperature, False, CHUNK // BLOCK
        )  # fmt: skip
        depth = (tl.load(chunk_max + row * chunks + chunk) - most) / temperature
        if truncates & (depth > FAR_DEPTH):
            token = chunk * CHUNK + tl.arange(0, CHUNK)
            weights = weights_at(logits, logits, token, token < v, most, temperature, False)
            tally(hist + row * BUCKETS, weights, token < v, 0, NEAR)


@triton.jit
def bound_row(logits, v, hist, shares, sums, blocks, top_k, top_p, most, temperature, TILE: tl.constexpr):
    """The bucket where top_k, or else top_p, cuts the whole row: (bucket, what is before it, the goal)."""
    goal = top_k.to(tl.float64)
    if top_k <= 0:
        goal = top_p * total_of(sums, blocks)
    edge, before = find_bucket(hist, shares, NEAR, top_k, goal)
    if edge >= NEAR:
        for first in range(NEAR, BUCKETS, NEAR):
            clear(hist, first, NEAR)
        tl.debug_barrier()
        for start in range(0, v, TILE):
            token = start + tl.arange(0, TILE)
            tally(
                hist, weights_at(logits, logits, token, token < v, most, temperature, False), token < v, NEAR, BUCKETS
            )
        tl.debug_barrier()
        edge, before = find_bucket(hist, shares, BUCKETS, top_k, goal)
    return edge, before, goal


@triton.jit
def start_kernel(
    logits, stride, v, temperature_s, min_p_s, top_k_s, top_p_s, seed_s, position_s, chunk_max, chunk_id, sums, hist,
    shares, inner, limit_s, edge_s, before_s, goal_s, out_s, chunks, blocks, CHUNKS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """(row): the token of a row that is greedy, broken or not truncated; else where its first cut lies."""
    row = tl.program_id(0).to(tl.int64)
    most, best, finite = row_best(chunk_max, chunk_id, row, chunks, CHUNKS)
    temperature = tl.load(temperature_s + row)
    tl.store(limit_s + row, -1)
    if (temperature <= 0.0) | (not finite):
        tl.store(out_s + row, tl.where(finite, best, NOT_FINITE).to(tl.int64))
        return
    min_p = tl.load(min_p_s + row)
    top_k = tl.load(top_k_s + row)
    top_p = tl.load(top_p_s + row)
    logits += row * stride
    sums += row * blocks
    if (min_p > 0.0) | (top_k > 0) | (top_p < 1.0):
        limit = tl.where(min_p > 0.0, rank_of(min_p), ALL)
        if (top_k > 0) | (min_p <= 0.0):
            edge, before, goal = bound_row(
                logits, v, hist + row * BUCKETS, shares + row * BUCKETS, sums, blocks, top_k, top_p, most, temperature,
                TILE,
            )  # fmt: skip
            tl.store(edge_s + row, edge)
            tl.store(before_s + row, before)
            tl.store(goal_s + row, goal)
            limit = tl.where(edge < BUCKETS, tl.minimum(limit, (edge << 18) | 0x3FFFF), limit)
        else:
            tl.store(edge_s + row, BUCKETS)
        tl.store(limit_s + row, limit)
    else:
        drawn = uniform(tl.load(seed_s + row), tl.load(position_s + row))
        place = invert(logits, logits, sums, inner + row * BLOCK, v, drawn, most, temperature, False)
        tl.store(out_s + row, place.to(tl.int64))


@triton.jit
def list_kernel(
    logits, stride, v, temperature_s, chunk_max, chunk_id, limit_s, number, ids, chunks, CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr, COUNTS: tl.constexpr,
):  # fmt: skip
    """(row, part): how many tokens of each chunk are within the row's limit; without `COUNTS` their ids, rising."""
    row = tl.program_id(0).to(tl.int64)
    limit = tl.load(limit_s + row)
    if limit < 0:
        return
    most, _, _ = row_best(chunk_max, chunk_id, row, chunks, CHUNKS)
    temperature = tl.load(temperature_s + row)
    lightest = tl.maximum(ONE - limit, 0).to(tl.float32, bitcast=True)
    number += row * chunks
    i = tl.arange(0, CHUNKS)
    if not COUNTS:
        number_c = tl.load(number + i, mask=i < chunks, other=0)
    for chunk in range(tl.program_id(1), chunks, tl.num_programs(1)):
        token = chunk * CHUNK + tl.arange(0, CHUNK)
        inside = token < v
        if COUNTS:
            heaviest = weigh(tl.load(chunk_max + row * chunks + chunk), most, temperature)
            count = tl.full([], 0, tl.int32)
            # exp() errs by two units at most, so that this passes over no chunk that has a token.
            if (heaviest * 1.000001 >= lightest) | (lightest < 1e-30):
                rank = rank_of(weights_at(logits + row * stride, ids, token, inside, most, temperature, False))
                count = tl.sum((inside & (rank <= limit)).to(tl.int32), axis=0)
            tl.store(number + chunk, count)
        else:
            if tl.load(number + chunk) > 0:
                rank = rank_of(weights_at(logits + row * stride, ids, token, inside, most, temperature, False))
                stays = inside & (rank <= limit)
                to = tl.sum(tl.where(i < chunk, number_c, 0), axis=0) + tl.cumsum(stays.to(tl.int32), axis=0) - 1
                tl.store(ids + row * v + to, token, mask=stays)


@triton.jit
def finish_kernel(
    logits, stride, v, temperature_s, min_p_s, top_k_s, top_p_s, seed_s, position_s, chunk_max, chunk_id, sums, hist,
    shares, inner, limit_s, edge_s, before_s, goal_s, number, ids, out_s, chunks, blocks, CHUNKS: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """(row): from the list of a truncated row the cuts to the rank, and the token."""
    row = tl.program_id(0).to(tl.int64)
    if tl.load(limit_s + row) < 0:
        return
    most, _, _ = row_best(chunk_max, chunk_id, row, chunks, CHUNKS)
    i = tl.arange(0, CHUNKS)
    n = tl.sum(tl.load(number + row * chunks + i, mask=i < chunks, other=0), axis=0)
    temperature = tl.load(temperature_s + row)
    min_p = tl.load(min_p_s + row)
    top_k = tl.load(top_k_s + row)
    top_p = tl.load(top_p_s + row)
    logits += row * stride
    hist += row * BUCKETS
    shares += row * BUCKETS
    sums += row * blocks
    ids += row * v
    edge = tl.load(edge_s + row)
    if edge < BUCKETS:
        before, goal = tl.load(before_s + row), tl.load(goal_s + row)
        last, ties = refine(logits, ids, hist, n, edge, before, goal, top_k > 0, most, temperature, TILE)
        n = keep(logits, ids, n, last, ties, most, temperature, TILE)
    if (top_p < 1.0) & ((top_k > 0) | (min_p > 0.0)):
        sum_list(logits, ids, sums, n, most, temperature, TILE)
        goal = top_p * total_of(sums, (n + BLOCK - 1) // BLOCK)
        for first in range(0, BUCKETS, NEAR):
            clear(hist, first, NEAR)
        tl.debug_barrier()
        for start in range(0, n, TILE):
            place = start + tl.arange(0, TILE)
            tally(hist, weights_at(logits, ids, place, place < n, most, temperature, True), place < n, 0, BUCKETS)
        tl.debug_barrier()
        edge, before = find_bucket(hist, shares, BUCKETS, 0, goal)
        if edge < BUCKETS:
            last, ties = refine(logits, ids, hist, n, edge, before, goal, False, most, temperature, TILE)
            n = keep(logits, ids, n, last, ties, most, temperature, TILE)
    sum_list(logits, ids, sums, n, most, temperature, TILE)
    drawn = uniform(tl.load(seed_s + row), tl.load(position_s + row))
    place = invert(logits, ids, sums, inner + row * BLOCK, n, drawn, most, temperature, True)
    tl.store(out_s + row, tl.load(ids + place).to(tl.int64))


@triton.jit
def sum_list(logits, ids, sums, n, most, temperature, TILE: tl.constexpr):
    """What each block of a list weighs."""
    tl.debug_barrier()
    for start in range(0, n, TILE):
        sum_blocks(logits, ids, sums, start // BLOCK, n, most, temperature, True, TILE // BLOCK)
    tl.debug_barrier()


@triton.jit
def total_kernel(chunk_max, chunk_id, sums, most_s, total_s, chunks, blocks, CHUNKS: tl.constexpr):
    """(row): the largest logit, NaN where it is not finite, and what all tokens weigh."""
    row = tl.program_id(0).to(tl.int64)
    most, _, finite = row_best(chunk_max, chunk_id, row, chunks, CHUNKS)
    tl.store(most_s + row, tl.where(finite, most, float("nan")).to(tl.float64))
    if finite:
        tl.store(total_s + row, total_of(sums + row * blocks, blocks))
