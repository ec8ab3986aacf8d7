"""From a row of logits to one token: temperature, truncation, and the inverse of the distribution function.

Legend: v vocabulary, c the tokens still there. Arrays of tokens are by rising token id; `weights_c` are probabilities
but for a common factor. A row's result depends on that row alone; of tokens of equal weight the lower id is kept.
Nothing here sorts the vocabulary: which tokens survive follows from the last one that does.

Every operation is one that all machines round alike (no fused products, sums in one stated order), so that compiled
code gives the same tokens, not similar ones.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from quire.core.sampling import SamplingParams

Ids = NDArray[np.int64]
Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]

_SUM_BLOCK = 256
_SUM_LANES = 16
_RANKS_PER_BUCKET_LOG2 = 18
_BITS_OF_ONE = np.uint32(0x3F800000)


def choose(logits_v: Floats, sampling: SamplingParams, uniform: float) -> int:
    """The token at `uniform` in [0, 1) of the truncated distribution.

    The surviving tokens stand in order of their ids, each as wide as its probability. min_p, top_k, top_p and
    typical_p apply in this order, each to what the one before has left, as if renormalised. `logits_v` has a finite
    maximum.
    """
    ids_c, weights_c = survivors(logits_v, sampling)
    index = _invert(weights_c, uniform)
    return index if ids_c is None else int(ids_c[index])


def survivors(logits_v: Floats, sampling: SamplingParams) -> tuple[Ids | None, Floats]:
    """The tokens that truncation leaves, by rising id (None for all of them), and their weights."""
    # The difference may be below what float32 holds: such tokens get weight 0.
    with np.errstate(over="ignore"):
        depths = logits_v - logits_v.max()
        if sampling.temperature != 1.0:
            depths /= np.float32(sampling.temperature)
    weights = exp(depths)  # the likeliest token's weight is 1
    ids: Ids | None = None
    if sampling.min_p > 0.0:
        ids, weights = _narrow(ids, weights, np.flatnonzero(weights >= np.float32(sampling.min_p)))
    if 0 < sampling.top_k < len(weights):
        ids, weights = _narrow(ids, weights, _heaviest(weights, sampling.top_k))
    if sampling.top_p < 1.0:
        ids, weights = _narrow(ids, weights, _nucleus(weights, sampling.top_p))
    if sampling.typical_p < 1.0:
        kept = _typical(weights, depths if ids is None else depths[ids], sampling.typical_p)
        ids, weights = _narrow(ids, weights, kept)
    return ids, weights


def top_ids(values_v: Floats, k: int) -> Ids:
    """Ids of the k largest values, best first, of equal ones the lower id first; all of them if k is larger."""
    kept = _heaviest(values_v, k) if k < len(values_v) else np.arange(len(values_v))
    return kept[np.argsort(-values_v[kept], kind="stable")]


def exp(values: Floats) -> Floats:
    """e^x of numbers up to 0, within 2 units in the last place; 0 below -88.

    2^n times a polynomial of the rest (coefficients: Cephes). Written out because libraries differ in the last bit.
    """
    f32 = np.float32
    clipped = np.maximum(values, f32(-88.0))
    n = np.rint(clipped * f32(1.44269504088896341))
    rest = n * f32(-0.693359375) + clipped
    rest += n * f32(2.12194440e-4)
    result: Floats = np.full_like(rest, 1.9875691500e-4)
    for coefficient in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
        result *= rest
        result += f32(coefficient)
    result = result * (rest * rest) + (rest + f32(1.0))
    result *= ((n.astype(np.int32) + 127) << 23).view(f32)
    result[values < f32(-88.0)] = 0.0
    return result


def weight_of_all(weights_c: Floats) -> float:
    return float(_block_sums(weights_c)[-1])


def _narrow(ids: Ids | None, weights_c: Floats, kept: Ids) -> tuple[Ids, Floats]:
    return (kept if ids is None else ids[kept]), weights_c[kept]


def _heaviest(weights_c: Floats, k: int) -> Ids:
    """Indices of the k heaviest, rising; k is less than there are."""
    if k == 0:
        return np.empty(0, dtype=np.int64)
    last = np.partition(weights_c, len(weights_c) - k)[len(weights_c) - k]
    at_least = np.flatnonzero(weights_c >= last)
    if len(at_least) == k:
        return at_least
    ties = np.flatnonzero(weights_c[at_least] == last)
    return np.delete(at_least, ties[k - len(at_least) :])


def _nucleus(weights_c: Floats, top_p: float) -> Ids:
    """Indices of the fewest tokens that together reach `top_p` of all weight (Holtzman et al., 2019)."""
    ranks = _BITS_OF_ONE - weights_c.view(np.uint32)
    return _leading(ranks, weights_c, top_p * weight_of_all(weights_c))


def _typical(weights_c: Floats, depths_c: Floats, typical_p: float) -> Ids:
    """Locally typical sampling (Meister et al., 2022): the tokens whose surprise is nearest to the entropy.

    A token's surprise is a constant less its depth, the entropy is that constant less the mean depth.
    """
    there = np.flatnonzero(weights_c)
    weights, depths = weights_c[there], depths_c[there]
    whole = weight_of_all(weights)
    mean = np.float32(float(_block_sums(weights.astype(np.float64) * depths)[-1]) / whole)
    ranks = np.abs(depths - mean).view(np.uint32)
    return there[_leading(ranks, weights, typical_p * whole)]


def _leading(ranks_c: NDArray[np.uint32], weights_c: Floats, goal: float) -> Ids:
    """Indices, rising, of the tokens of lowest rank that together weigh `goal`; all if they do not.

    Ranks are bits of floats without sign, so that a bucket is a thirty-second part of a power of two. Buckets are added
    up in order of id; in the one where the goal is reached, by rank and then id.
    """
    buckets = ranks_c >> _RANKS_PER_BUCKET_LOG2
    sums = np.cumsum(np.bincount(buckets, weights=weights_c))
    edge = int(np.searchsorted(sums, goal, side="left"))
    if edge == len(sums):
        return np.arange(len(weights_c))
    before = float(sums[edge - 1]) if edge else 0.0
    at_edge = np.flatnonzero(buckets == edge)
    at_edge = at_edge[np.argsort(ranks_c[at_edge], kind="stable")]
    cumulative = before + np.cumsum(weights_c[at_edge], dtype=np.float64)
    count = min(int(np.searchsorted(cumulative, goal, side="left")) + 1, len(at_edge))
    kept: Ids = np.sort(np.concatenate((np.flatnonzero(buckets < edge), at_edge[:count])))
    return kept


def _block_sums(weights_c: Floats | Doubles) -> Doubles:
    """What blocks of tokens weigh up to and with each: the last entry is the sum of all.

    In a block, 16 lanes are added up row by row, then halved again and again.
    """
    num_blocks = -(-len(weights_c) // _SUM_BLOCK)
    padded = np.zeros(num_blocks * _SUM_BLOCK)
    padded[: len(weights_c)] = weights_c
    lanes = np.zeros((num_blocks, _SUM_LANES))
    for row in np.moveaxis(padded.reshape(num_blocks, -1, _SUM_LANES), 1, 0):
        lanes += row
    while lanes.shape[1] > 1:
        half = lanes.shape[1] // 2
        lanes = lanes[:, :half] + lanes[:, half:]
    return np.cumsum(lanes[:, 0])


def _invert(weights_c: Floats, uniform: float) -> int:
    """The index where the sum of weights passes `uniform` of the whole: first its block, then the place in it."""
    sums = _block_sums(weights_c)
    goal = uniform * float(sums[-1])
    block = min(int(np.searchsorted(sums, goal, side="right")), int(np.searchsorted(sums, sums[-1], side="left")))
    before = float(sums[block - 1]) if block else 0.0
    inside = weights_c[block * _SUM_BLOCK : (block + 1) * _SUM_BLOCK]
    cumulative = before + np.cumsum(inside, dtype=np.float64)
    index = int(np.searchsorted(cumulative, goal, side="right"))
    # By rounding the goal may lie past the last token that has any weight; then it is that one.
    return block * _SUM_BLOCK + min(index, int(np.flatnonzero(inside)[-1]))
