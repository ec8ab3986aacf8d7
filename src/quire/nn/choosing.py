"""From a row of logits to one token: temperature, truncation, and the inverse of the distribution function.

Legend: v vocabulary, c the tokens still there. Arrays of tokens are by rising token id; `weights_c` are probabilities
but for a common factor. A row's result depends on that row alone: each row is worked on by itself, on the host; of
tokens of equal weight the lower id is kept; sums run in one order. Nothing here sorts the vocabulary's ids: which
tokens survive follows from the weight of the last one that does.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from quire.core.sampling import SamplingParams

Ids = NDArray[np.int64]
Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]

# Tokens with less than exp(-10) of the likeliest one's probability are looked at only if the nucleus reaches there.
_NUCLEUS_FLOOR = np.float32(np.exp(-10.0))
_SUM_BLOCK = 256


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
        weights = logits_v - logits_v.max()
        if sampling.temperature != 1.0:
            weights /= np.float32(sampling.temperature)
    np.exp(weights, out=weights)  # the likeliest token's weight is 1
    ids: Ids | None = None
    if sampling.min_p > 0.0:
        ids = np.flatnonzero(weights >= np.float32(sampling.min_p))
        weights = weights[ids]
    if 0 < sampling.top_k < len(weights):
        ids, weights = _narrow(ids, weights, _heaviest(weights, sampling.top_k))
    if sampling.top_p < 1.0:
        ids, weights = _narrow(ids, weights, _nucleus(weights, sampling.top_p))
    if sampling.typical_p < 1.0:
        ids, weights = _narrow(ids, weights, _typical(weights, sampling.typical_p))
    return ids, weights


def top_ids(values_v: Floats, k: int) -> Ids:
    """Ids of the k largest values, best first, of equal ones the lower id first; all of them if k is larger."""
    kept = _heaviest(values_v, k) if k < len(values_v) else np.arange(len(values_v))
    return kept[np.argsort(-values_v[kept], kind="stable")]


def _narrow(ids: Ids | None, weights_c: Floats, kept: Ids) -> tuple[Ids, Floats]:
    return (kept if ids is None else ids[kept]), weights_c[kept]


def _heaviest(weights_c: Floats, k: int) -> Ids:
    """Indices of the k heaviest, rising; k is less than there are."""
    if k == 0:
        return np.empty(0, dtype=np.int64)
    last = np.partition(weights_c, len(weights_c) - k)[len(weights_c) - k]
    return _down_to(weights_c, last, k)


def _down_to(weights_c: Floats, last: np.float32, k: int) -> Ids:
    """Indices of the k heaviest, where the lightest of them weighs `last`."""
    at_least = np.flatnonzero(weights_c >= last)
    if len(at_least) == k:
        return at_least
    ties = np.flatnonzero(weights_c[at_least] == last)
    return np.delete(at_least, ties[k - len(at_least) :])


def _nucleus(weights_c: Floats, top_p: float) -> Ids:
    """Indices of the fewest tokens that together reach `top_p` of all weight (Holtzman et al., 2019)."""
    goal = top_p * float(_block_sums(weights_c)[-1])
    # Most often few tokens make up the nucleus. Looking at these first gives what looking at all would give.
    heavy = weights_c[weights_c > _NUCLEUS_FLOOR]
    for candidates in (heavy, weights_c):
        falling = np.sort(candidates)[::-1]
        cumulative = np.cumsum(falling, dtype=np.float64)
        if cumulative[-1] >= goal or candidates is weights_c:
            break
    k = min(int(np.searchsorted(cumulative, goal, side="left")) + 1, len(falling))
    return _down_to(weights_c, falling[k - 1], k)


def _typical(weights_c: Floats, typical_p: float) -> Ids:
    """Locally typical sampling (Meister et al., 2022): the tokens whose surprise is nearest to the entropy."""
    there = np.flatnonzero(weights_c)
    probabilities = weights_c[there] / np.cumsum(weights_c[there], dtype=np.float64)[-1]
    surprise = -np.log(probabilities)
    entropy = np.cumsum(probabilities * surprise)[-1]
    order = np.argsort(np.abs(surprise - entropy), kind="stable")
    cumulative = np.cumsum(probabilities[order])
    k = min(int(np.searchsorted(cumulative, typical_p, side="left")) + 1, len(order))
    kept: Ids = np.sort(there[order[:k]])
    return kept


def _block_sums(weights_c: Floats) -> Doubles:
    """What blocks of tokens weigh up to and with each: the last entry is the sum of all."""
    whole = len(weights_c) // _SUM_BLOCK * _SUM_BLOCK
    sums = weights_c[:whole].reshape(-1, _SUM_BLOCK).sum(axis=1, dtype=np.float64)
    return np.cumsum(np.append(sums, weights_c[whole:].sum(dtype=np.float64)))


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
