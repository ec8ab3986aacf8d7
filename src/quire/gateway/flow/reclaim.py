"""Ending requests in flight, where others of higher priority wait behind full endpoints.

Off unless asked for (`enableEviction`), and only ever for requests of negative priority: that is the contract of such a
priority. How full endpoints are is known late, so nothing is decided twice on the same knowledge: new victims are
chosen only after all before have ended, and a while has passed in which the metrics could show it.

Source: llm-d's design for eviction in flight, with its default of at most two at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from heapq import nsmallest
from typing import Final

from quire.gateway.endpoint import Endpoint
from quire.gateway.request import InferenceRequest

AT_ONCE: Final = 2
GRACE: Final = 1.0
"""Seconds after the last one ended before others are chosen: several readings of the metrics."""
PATIENCE: Final = 10.0
"""Seconds after which one that does not end is no longer waited for."""


@dataclass(frozen=True, slots=True)
class _Lease:
    request: InferenceRequest
    endpoint: Endpoint
    since: float


class Reclaimer:
    def __init__(self, end: Callable[[InferenceRequest], None]) -> None:
        """`end` breaks a request in flight off, and does not raise."""
        self._end = end
        self._leases: dict[int, _Lease] = {}
        """Of negative priority and such as can be broken off, by identity of the request."""
        self._ending: dict[int, float] = {}
        """When they were told to end."""
        self._not_before = -math.inf

    def sent(self, request: InferenceRequest, endpoint: Endpoint, now: float) -> None:
        if request.priority < 0 and request.break_off is not None:
            self._leases[id(request)] = _Lease(request, endpoint, now)

    def left(self, request: InferenceRequest, now: float) -> None:
        self._leases.pop(id(request), None)
        if self._ending.pop(id(request), None) is not None:
            self._not_before = now + GRACE

    def blocked(
        self, priority: int, endpoints: Collection[Endpoint], excess: float, footprint: float, now: float
    ) -> Sequence[InferenceRequest]:
        """A request of this priority waits for these endpoints, which are `excess` fuller than they may be for it;
        each request in flight fills `footprint` of them on average. Returns those that were told to end."""
        if not self._leases or now < self._not_before:
            return ()
        self._ending = {lease: told for lease, told in self._ending.items() if now - told < PATIENCE}
        if self._ending:
            return ()
        places = {id(endpoint) for endpoint in endpoints}
        wanted = min(max(math.ceil(excess / footprint), 1), AT_ONCE) if footprint > 0 else 1
        victims = nsmallest(
            wanted,
            (one for one in self._leases.values() if one.request.priority < priority and id(one.endpoint) in places),
            key=lambda one: (one.request.priority, -one.since),
        )
        for victim in victims:
            del self._leases[id(victim.request)]
            self._ending[id(victim.request)] = now
            self._end(victim.request)
        return [victim.request for victim in victims]
