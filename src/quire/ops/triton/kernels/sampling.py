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

from quire.ops.triton.kernels.common import INTERPRETED

BLOCK = tl.constexpr(256)  # of a sum; `_SUM_BLOCK` in the definition
LANES = tl.constexpr(16)
GROUP = tl.constexpr(8)  # blocks of a chunk, or of a tile of a list
BUCKETS = tl.constexpr(4096)
NEAR = tl.constexpr(512)  # buckets of weights above 2^-16, all that most rows need
FAR_DEPTH = tl.constexpr(-11.2)  # below -16 ln 2, by more than exp() may err
ONE = tl.constexpr(0x3F800000)  # bits of 1.0
ALL = tl.constexpr(0x7FFFFFFF)  # a rank that no token is beyond
COUNTED = tl.constexpr(1 << 40)  # one token in a bucket
NOT_FINITE = tl.constexpr(-1)


@triton.jit
def weigh(logits, most, temperature):
    """`choosing.exp` of how far logits are below the largest, operation by operation."""
    depth = tl.div_rn(logits - most, temperature)
    clipped = tl.maximum(depth, -88.0)
    n = (clipped * 1.44269504088896341 + 12582912.0) - 12582912.0  # to the nearest, ties to even
    rest = n * -0.693359375 + clipped
    rest = rest + n * 2.12194440e-4
    result = rest * 1.9875691500e-4 + 1.3981999507e-3
    result = result * rest + 8.3334519073e-3
    result = result * rest + 4.1665795894e-2
    result = result * rest + 1.6666665459e-1
    result = result * rest + 5.0000001201e-1
    result = result * (rest * rest) + (rest + 1.0)
    result = result * ((n.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)
    return tl.where(depth < -88.0, 0.0, result)


@triton.jit
def rank_of(weights):
    return ONE - weights.to(tl.int32, bitcast=True)


@triton.jit
def weights_at(logits, ids, place, inside, most, temperature, LISTED: tl.constexpr):
    """Weights of tokens, or with `LISTED` of those that a list of ids has there; 0 outside."""
    if LISTED:
        token = tl.load(ids + place, mask=inside, other=0)
    else:
        token = place
    return weigh(tl.load(logits + token, mask=inside, other=-float("inf")), most, temperature)


@triton.jit
def mix(value):
    """SplitMix64's finaliser, of uint64."""
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB
    return value ^ (value >> 31)


@triton.jit
def uniform(seed, position):
    """`randomness.uniform` of int64 numbers."""
    key = mix(seed.to(tl.uint64, bitcast=True) + 0x9E3779B97F4A7C15)
    drawn = mix(key + (position + 1).to(tl.uint64, bitcast=True) * 0x9E3779B97F4A7C15)
    return (drawn >> 11).to(tl.int64).to(tl.float64) * 1.1102230246251565e-16


@triton.jit
def row_best(chunk_max, chunk_id, row, chunks, CHUNKS: tl.constexpr):
    """(largest logit, its lowest id, whether it is a finite number) from what `best_kernel` left."""
    i = tl.arange(0, CHUNKS)
    most_c = tl.load(chunk_max + row * chunks + i, mask=i < chunks, other=-float("inf"))
    id_c = tl.load(chunk_id + row * chunks + i, mask=i < chunks, other=ALL)
    broken = tl.sum((most_c != most_c).to(tl.int32), axis=0)
    most = tl.max(tl.where(most_c == most_c, most_c, -float("inf")), axis=0)
    best = tl.min(tl.where(most_c == most, id_c, ALL), axis=0)
    return most, best, (broken == 0) & (most > -float("inf")) & (most < float("inf"))


@triton.jit
def sum_blocks(logits, ids, sums, first_block, n, most, temperature, LISTED: tl.constexpr, COUNT: tl.constexpr):
    """What each of `COUNT` blocks weighs: 16 lanes added up line by line, then halved again and again."""
    block = first_block + tl.arange(0, COUNT)
    lane = tl.arange(0, LANES)
    lanes = tl.zeros([COUNT, LANES], tl.float64)
    if INTERPRETED:  # all at once: it takes its time for each operation, however large
        line = tl.arange(0, BLOCK // LANES)[None, :, None]
        place = block[:, None, None] * BLOCK + line * LANES + lane[None, None, :]
        weights = weights_at(logits, ids, place, place < n, most, temperature, LISTED).to(tl.float64)
        for number in tl.static_range(BLOCK // LANES):
            lanes += tl.sum(tl.where(line == number, weights, 0.0), axis=1)
    else:
        for number in tl.static_range(BLOCK // LANES):
            place = block[:, None] * BLOCK + number * LANES + lane[None, :]
            lanes += weights_at(logits, ids, place, place < n, most, temperature, LISTED).to(tl.float64)
    lanes = tl.sum(tl.reshape(lanes, [COUNT, 2, 8]), axis=1)  # two of them: the order does not matter
    lanes = tl.sum(tl.reshape(lanes, [COUNT, 2, 4]), axis=1)
    lanes = tl.sum(tl.reshape(lanes, [COUNT, 2, 2]), axis=1)
    tl.store(sums + block, tl.sum(lanes, axis=1))


@triton.jit
def tally(hist, weights, inside, first, end):
    """Adds tokens to their buckets, those of `first` to `end`."""
    rank = rank_of(weights)
    bucket = rank >> 18
    one = (rank & 0x3FFFF).to(tl.int64) + COUNTED
    tl.atomic_add(hist + bucket, one, mask=inside & (bucket >= first) & (bucket < end), sem="relaxed")


@triton.jit
def clear(hist, first, COUNT: tl.constexpr):
    tl.store(hist + first + tl.arange(0, COUNT), tl.zeros([COUNT], tl.int64))


@triton.jit
def unit_of(bucket):
    """(the first weight of a bucket, the step to the next), both exact."""
    top = tl.maximum(ONE - (bucket << 18), 0)
    below = tl.maximum(top - 1, 0)
    first = top.to(tl.float32, bitcast=True).to(tl.float64)
    return first, first - below.to(tl.float32, bitcast=True).to(tl.float64)


@triton.jit
def weight_of(packed, first, step):
    """What the tokens of a bucket weigh together."""
    return (packed >> 40).to(tl.float64) * first - (packed & (COUNTED - 1)).to(tl.float64) * step


@triton.jit
def weigh_buckets(hist, out, end):
    """What each bucket up to `end` weighs, to `out`."""
    for start in range(0, end, NEAR):
        i = start + tl.arange(0, NEAR)
        first, step = unit_of(i)
        tl.store(out + i, weight_of(tl.load(hist + i, cache_modifier=".cg"), first, step))
    tl.debug_barrier()


@triton.jit
def find_bucket(hist, shares, end, top_k, goal):
    """The bucket where top_k, or else the weight `goal`, is reached (`end` or more: it is not), and what is before."""
    edge = tl.full([], 0, tl.int32)
    before = tl.full([], 0.0, tl.float64)
    if top_k > 0:
        passed = tl.full([], 0, tl.int64)
        upto = tl.full([], 0, tl.int64)
        for start in range(0, end, NEAR):
            number = tl.load(hist + start + tl.arange(0, NEAR), cache_modifier=".cg") >> 40
            short = upto + tl.cumsum(number, axis=0) < top_k
            edge += tl.sum(short.to(tl.int32), axis=0)
            passed += tl.sum(tl.where(short, number, 0), axis=0)
            upto += tl.sum(number, axis=0)
        before = passed.to(tl.float64)
    else:
        weigh_buckets(hist, shares, end)
        edge, before = pass_over(shares, end, 0.0, goal, goal, True)
    return edge, before


@triton.jit
def total_of(values, n):
    """Their sum, one by one. There are zeros up to a multiple of `GROUP`."""
    total = tl.full([], 0.0, tl.float64)
    i = tl.full([], 0, tl.int32)
    while i < n:
        for j in tl.static_range(GROUP):  # the loads do not wait for the sums
            total += tl.load(values + i + j)
        i += GROUP
    return total


@triton.jit
def pass_over(values, n, start, goal, last, STRICT: tl.constexpr):
    """(how many running sums are `start` less than up to `goal`, or with `STRICT` not up to it, and below `last`;
    the last of them, or 0). More than n: all of them. There are zeros up to a multiple of `GROUP`."""
    total = tl.full([], 0.0, tl.float64)
    i = tl.full([], 0, tl.int32)
    more = i < n
    while more:
        upto = total
        for j in tl.static_range(GROUP):
            upto += tl.load(values + i + j)
        if STRICT:
            passes = start + upto < goal
        else:
            passes = (start + upto <= goal) & (upto < last)
        total = tl.where(passes, upto, total)
        i = tl.where(passes, i + GROUP, i)
        more = passes & (i < n)
    index = i
    upto = total
    for j in tl.static_range(GROUP):
        upto += tl.load(values + i + j, mask=i < n, other=0.0)
        if STRICT:
            passes = start + upto < goal
        else:
            passes = (start + upto <= goal) & (upto < last)
        total = tl.where(passes, upto, total)
        index += passes.to(tl.int32)
    return index, total


@triton.jit
def invert(logits, ids, sums, inner, n, drawn, most, temperature, LISTED: tl.constexpr):
    """The place of the token where the running sum of weights passes `drawn` of the whole."""
    blocks = (n + BLOCK - 1) // BLOCK
    whole = total_of(sums, blocks)
    goal = drawn * whole
    block, before = pass_over(sums, blocks, 0.0, goal, whole, False)
    i = tl.arange(0, BLOCK)
    place = block * BLOCK + i
    weights = weights_at(logits, ids, place, place < n, most, temperature, LISTED)
    tl.store(inner + i, weights.to(tl.float64))
    tl.debug_barrier()
    index, _ = pass_over(inner, BLOCK, before, goal, float("inf"), False)
    # By rounding the goal may lie past the last token that has any weight; then it is that one.
    return block * BLOCK + tl.minimum(index, tl.max(tl.where(weights > 0, i, 0), axis=0))


@triton.jit
def reached(packed, before, goal, first, step, counted):
    """Whether that many tokens of a bucket take what is before it to the goal, in number or in weight."""
    number = (packed >> 40).to(tl.float64)
    return before + tl.where(counted, number, weight_of(packed, first, step)) >= goal


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
