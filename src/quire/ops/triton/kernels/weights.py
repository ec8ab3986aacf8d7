"""What tokens weigh, and sums of it, as `ops/choosing.py` defines them, bit for bit: see `kernels/sampling.py`."""

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
