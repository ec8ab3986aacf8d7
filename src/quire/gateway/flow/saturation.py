"""How full endpoints are: below 1 they take more requests, from 1 on requests wait here.

A detector sees what the endpoints said last, what this gateway has open at them, and what is on its way: requests that
flow control let go but that are not counted at an endpoint yet, which nothing else would show.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final, Literal

from quire.gateway.endpoint import Clock, Endpoint, EndpointMetrics
from quire.gateway.plugin import Filter, Plugin
from quire.gateway.request import InferenceRequest


@dataclass(slots=True)
class OnTheWay:
    """Requests let go, not yet sent, for a set of endpoints; their share of each if they spread evenly."""

    requests: float = 0.0
    tokens: float = 0.0


NOTHING: Final = OnTheWay()


@dataclass(slots=True)
class Shares:
    """How many requests on their way each endpoint is to expect, if every request spreads over its candidates."""

    requests: dict[int, float] = field(default_factory=dict)
    """By identity of the endpoint; those on their way hold it."""
    tokens: dict[int, float] = field(default_factory=dict)
    count: int = 0

    def add(self, places: Sequence[Endpoint], tokens: int, sign: int) -> None:
        """With `sign` -1, they have arrived or come to nothing."""
        self.count += sign
        if not self.count:  # also gets rid of rounding errors, and of endpoints that are no more
            self.requests.clear()
            self.tokens.clear()
            return
        share = sign / len(places)
        requests, held = self.requests, self.tokens
        for place in places:
            key = id(place)
            requests[key] = requests.get(key, 0.0) + share
            held[key] = held.get(key, 0.0) + share * tokens

    def of(self, endpoints: Sequence[Endpoint]) -> OnTheWay:
        if not self.count:
            return NOTHING
        requests, tokens = self.requests, self.tokens
        return OnTheWay(
            sum(requests.get(id(endpoint), 0.0) for endpoint in endpoints),
            sum(tokens.get(id(endpoint), 0.0) for endpoint in endpoints),
        )


class SaturationDetector(Plugin):
    @abstractmethod
    def saturation(self, endpoints: Sequence[Endpoint], now: float, on_the_way: OnTheWay = NOTHING) -> float:
        """Of these endpoints together; at least one. `on_the_way` is to all of them together."""


BURST: Final = 256
"""Requests that an endpoint without a queue gets between two readings of its metrics: more than engines run at once, so
that no burst is held back for want of news, and few enough that a long queue here does not all go to the first endpoint
that has a moment's room."""
_SEEN: Final = "flow-control/seen"
"""Endpoint attribute: (time of its metrics, requests that this gateway had open there when they came)."""


def waiting_now(endpoint: Endpoint, metrics: EndpointMetrics, on_the_way: float) -> float:
    """Requests in an endpoint's queue: what it said, plus what this gateway sent there since, less what has come back.
    Other gateways' requests are in what it said. Where none waited there is room, and nobody knows how much: what was
    sent since is taken to run, up to `BURST` or as many as ran already.
    """
    seen = endpoint.attributes.get(_SEEN)
    if not isinstance(seen, tuple) or seen[0] != metrics.time:
        seen = endpoint.attributes[_SEEN] = (metrics.time, endpoint.load.requests)
    since: float = endpoint.load.requests - seen[1] + on_the_way
    if not metrics.waiting:
        since -= max(BURST, metrics.running)
    return max(metrics.waiting + since, 0.0)


class EngineQueues(SaturationDetector):
    """`engine-queue-detector`, quire's default: a pool is full when requests wait at every one of its endpoints.

    An engine without waiting requests gets what there is (up to `BURST`), so that at low load nothing is ever held
    back. Where requests wait, whatever was sent since it said so waits too, and from `queue_depth` on the endpoint is
    full; that keeps enough in its queue that it never runs dry before the next one comes. The KV cache's use says
    nothing: full caches are what caches are for, and an engine that lacks blocks shows waiting requests.

    An endpoint whose metrics were never read, or not for `staleness` seconds, counts as one with room: a page that
    vanishes costs queueing here, not the service. Beside endpoints that can be read it has room for `BURST` requests.
    """

    name = "engine-queue-detector"

    def __init__(self, queue_depth: int = 5, staleness: float = 2.0) -> None:
        self._depth, self._staleness = queue_depth, staleness

    def saturation(self, endpoints: Sequence[Endpoint], now: float, on_the_way: OnTheWay = NOTHING) -> float:
        total, read, full, share = 0.0, 0, 0, on_the_way.requests / len(endpoints)
        for endpoint in endpoints:
            metrics = endpoint.metrics
            if metrics is not None and now - metrics.time <= self._staleness:
                read += 1
                total += min(waiting_now(endpoint, metrics, share) / self._depth, 1.0)
            elif endpoint.load.requests + share >= BURST:
                full += 1
        return (total + full) / len(endpoints) if read else 0.0


class Utilization(SaturationDetector, Filter):
    """`utilization-detector`: the mean over endpoints of max(waiting / queue_depth, kv / kv_use).

    Metrics older than
    `staleness` count as a full endpoint, or not at all with `stale="ignore"`; and not at all when no endpoint has newer
    ones: then it is the readings that fail, not every endpoint at once.
    As a filter it takes out endpoints above the thresholds times 1 + `headroom`, unless all are.
    """

    def __init__(
        self,
        *,
        queue_depth: int = 5,
        kv_use: float = 0.8,
        staleness: float = 2.0,
        stale: Literal["saturated", "ignore"] = "saturated",
        headroom: float = 0.0,
        now: Clock | None = None,
    ) -> None:
        self._depth, self._kv, self._staleness, self._stale = queue_depth, kv_use, staleness, stale
        self._headroom = headroom
        self._now = now

    def saturation(self, endpoints: Sequence[Endpoint], now: float, on_the_way: OnTheWay = NOTHING) -> float:
        total, fresh, share = 0.0, 0, on_the_way.requests / len(endpoints)
        for endpoint in endpoints:
            metrics = endpoint.metrics
            if metrics is None or now - metrics.time > self._staleness:
                continue
            fresh += 1
            total += max(waiting_now(endpoint, metrics, share) / self._depth, metrics.kv_usage / self._kv)
        if not fresh:
            return 0.0
        if self._stale == "ignore":
            return total / fresh
        return (total + len(endpoints) - fresh) / len(endpoints)

    def filter(self, request: InferenceRequest, candidates: Sequence[Endpoint]) -> Sequence[Endpoint]:
        assert self._now is not None, "a filter needs the clock"
        now = self._now()
        depth, kv = self._depth * (1 + self._headroom), min(self._kv * (1 + self._headroom), 1.0)
        left = [
            endpoint
            for endpoint in candidates
            if (metrics := endpoint.metrics) is not None
            and now - metrics.time <= self._staleness
            and metrics.waiting < depth
            and metrics.kv_usage < kv
        ]
        return left or candidates


class Concurrency(SaturationDetector, Filter):
    """`concurrency-detector`: what this gateway has open, of what the endpoints may have together: `requests` and
    `tokens` at each, whichever is not None; the fuller of both. As a filter it takes out endpoints that have as much
    times 1 + `headroom`, unless all do."""

    def __init__(self, requests: int | None = 100, tokens: int | None = None, headroom: float = 0.0) -> None:
        self._requests, self._tokens, self._headroom = requests, tokens, headroom

    def saturation(self, endpoints: Sequence[Endpoint], now: float, on_the_way: OnTheWay = NOTHING) -> float:
        full = 0.0
        if self._requests is not None:
            requests = sum(endpoint.load.requests for endpoint in endpoints) + on_the_way.requests
            full = requests / (self._requests * len(endpoints))
        if self._tokens is not None:
            tokens = sum(endpoint.load.tokens for endpoint in endpoints) + on_the_way.tokens
            full = max(full, tokens / (self._tokens * len(endpoints)))
        return full

    def filter(self, request: InferenceRequest, candidates: Sequence[Endpoint]) -> Sequence[Endpoint]:
        room = 1 + self._headroom
        return [
            endpoint
            for endpoint in candidates
            if (self._requests is None or endpoint.load.requests < self._requests * room)
            and (self._tokens is None or endpoint.load.tokens < self._tokens * room)
        ] or candidates


class Highest(SaturationDetector):
    """`max-saturation-detector`: the fullest of what several detectors say."""

    def __init__(self, detectors: Sequence[SaturationDetector]) -> None:
        self._detectors = tuple(detectors)

    def saturation(self, endpoints: Sequence[Endpoint], now: float, on_the_way: OnTheWay = NOTHING) -> float:
        return max(detector.saturation(endpoints, now, on_the_way) for detector in self._detectors)
