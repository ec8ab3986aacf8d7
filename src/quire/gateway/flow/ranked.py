"""A set in order of a key that may change."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from heapq import heapify, heappop, heappush
from typing import Generic, TypeVar

T = TypeVar("T", bound=Hashable)
Key = tuple[float, ...]


class RankedSet(Generic[T]):
    """The least key first; of equal keys, the one put first. Each operation is amortised O(log n).

    Taking an item out, or giving it another key, leaves its old place in the heap behind as a stone, which is swept
    when it comes up, or with all others once they outnumber what is alive.
    """

    __slots__ = ("_heap", "_places", "_turn")

    def __init__(self) -> None:
        self._heap: list[tuple[Key, int, T]] = []
        self._places: dict[T, int] = {}
        self._turn = 0

    def put(self, item: T, key: Key) -> None:
        """Add it, or give it another key."""
        self._turn += 1
        self._places[item] = self._turn
        heappush(self._heap, (key, self._turn, item))
        self._sweep()

    def discard(self, item: T) -> None:
        if self._places.pop(item, None) is not None:
            self._sweep()

    def first(self) -> T | None:
        entry = self._first()
        return None if entry is None else entry[2]

    def first_key(self) -> Key | None:
        entry = self._first()
        return None if entry is None else entry[0]

    def pop(self) -> T:
        """Raises `KeyError` when empty."""
        entry = self._first()
        if entry is None:
            raise KeyError("pop from an empty RankedSet")
        heappop(self._heap)
        del self._places[entry[2]]
        return entry[2]

    def _first(self) -> tuple[Key, int, T] | None:
        heap, places = self._heap, self._places
        while heap and places.get(heap[0][2]) != heap[0][1]:
            heappop(heap)
        return heap[0] if heap else None

    def _sweep(self) -> None:
        if len(self._heap) > 2 * len(self._places) + 16:
            self._heap = [entry for entry in self._heap if self._places.get(entry[2]) == entry[1]]
            heapify(self._heap)

    def __contains__(self, item: object) -> bool:
        return item in self._places

    def __iter__(self) -> Iterator[T]:
        """In no order."""
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)
