"""Which endpoints hold which prefixes: keys of blocks that chain, so that who has one has those before it, too.

Holders of a key are the bits of an integer. Along a prompt they only become fewer, so that where they do is found by
bisection: a prompt of thousands of blocks takes a few dozen look-ups, whatever the number of endpoints.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Sequence
from typing import Final

MAX_KEYS: Final = 2_000_000
"""Over all endpoints: some 400 MB."""


class PrefixIndex:
    """Of each endpoint the last `capacity` keys that it was sent."""

    def __init__(self, max_keys: int = MAX_KEYS) -> None:
        self._holders: dict[int, int] = {}
        self._kept: dict[str, OrderedDict[int, None]] = {}
        self._bits: dict[str, int] = {}
        self._names: dict[int, str] = {}
        self._max_keys = max_keys
        self._num_keys = 0

    def __len__(self) -> int:
        return self._num_keys

    def size(self, endpoint: str) -> int:
        """Keys that are kept for it."""
        return len(self._kept.get(endpoint, ()))

    def match(self, keys: Sequence[int]) -> dict[str, int]:
        """By endpoint: how many of the keys it has, from the first on. `keys` chain."""
        found: dict[str, int] = {}
        holders = self._holders.get
        start, alive = 0, holders(keys[0], 0) if keys else 0
        while alive:
            count = alive.bit_count()
            end = bisect_left(keys, 1 - count, lo=start, key=lambda key: -holders(key, 0).bit_count())
            still = holders(keys[end], 0) if end < len(keys) else 0
            lost = alive & ~still
            while lost:
                bit = lost & -lost
                found[self._names[bit]] = end
                lost ^= bit
            start, alive = end, still
        return found

    def add(self, endpoint: str, keys: Sequence[int], capacity: int) -> None:
        """The endpoint has these now, used last. The end of a prompt goes before its beginning."""
        kept = self._kept.get(endpoint)
        if kept is None:
            kept = self._arrive(endpoint)
        bit, holders = self._bits[endpoint], self._holders
        before = len(kept)
        for key in reversed(keys):
            if key in kept:
                kept.move_to_end(key)
            else:
                kept[key] = None
                holders[key] = holders.get(key, 0) | bit
        self._num_keys += len(kept) - before
        self._trim(endpoint, capacity)
        if self._num_keys > self._max_keys:
            fair = self._max_keys // len(self._kept)
            for name in self._kept:
                self._trim(name, fair)

    def remove(self, endpoint: str) -> None:
        if endpoint in self._kept:
            self._trim(endpoint, 0)
            del self._kept[endpoint]
            del self._names[self._bits.pop(endpoint)]

    def _arrive(self, endpoint: str) -> OrderedDict[int, None]:
        bit = 1
        while bit in self._names:
            bit <<= 1
        self._bits[endpoint], self._names[bit] = bit, endpoint
        kept = self._kept[endpoint] = OrderedDict()
        return kept

    def _trim(self, endpoint: str, size: int) -> None:
        kept, bit, holders = self._kept[endpoint], self._bits[endpoint], self._holders
        excess = len(kept) - size
        for _ in range(excess):
            key, _ = kept.popitem(last=False)
            left = holders[key] & ~bit
            if left:
                holders[key] = left
            else:
                del holders[key]
        self._num_keys -= max(excess, 0)
