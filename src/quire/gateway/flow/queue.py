"""The queue behind the gate: a plain state machine that is told the time.

Requests for one model (and one subset of endpoints) wait in a `Lane`, since they wait for the same endpoints: a model
that is full or scaled to zero holds up no other. Within a lane the higher priority band goes strictly first, within a
band the fairness policy chooses the flow, and the ordering policy the request. Bounds are on the bands over all lanes,
and on everything together. Every operation is amortised O(log n) in the waiting requests, plus the few bands.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from math import inf
from typing import Final

from quire.gateway.flow.limits import StaticLimit, UsageLimitPolicy
from quire.gateway.flow.policies import (
    BandQueue,
    FairnessPolicy,
    FirstComeFirstServed,
    GlobalStrict,
    LaneKey,
    OrderingPolicy,
    Waiting,
    flow_of,
    lane_key,
)
from quire.gateway.request import InferenceRequest

MAX_LANES: Final = 256
"""Different models (and subsets) that may wait at once: their number is in the hands of the callers."""


class Rejection(Enum):
    """Why the queue let a request go unserved."""

    CAPACITY = "capacity"
    """Its band, or the whole queue, was full when it came."""
    SATURATED = "saturated"
    """Of negative priority, and there was no room at once."""
    DISPLACED = "displaced"
    """A higher priority came while the whole queue was full."""
    EXPIRED = "expired"
    """It waited out its time for room at the endpoints …"""
    NO_ENDPOINT = "no-endpoint"
    """… or for there to be an endpoint."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BandSettings:
    max_requests: int = 5_000
    max_bytes: int = 1_000_000_000
    fairness: FairnessPolicy = field(default_factory=GlobalStrict)
    ordering: OrderingPolicy = field(default_factory=FirstComeFirstServed)


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueSettings:
    """Times in seconds."""

    max_requests: int = 20_000
    max_bytes: int = 4_000_000_000
    ttl: float = 60.0
    """How long a request waits for room at endpoints."""
    no_endpoint_ttl: float = 60.0
    """How long it waits for an endpoint to be there at all."""
    default_band: BandSettings = field(default_factory=BandSettings)
    default_negative_band: BandSettings | None = None
    """Of negative priorities; as `default_band` if None."""
    bands: Mapping[int, BandSettings] = field(default_factory=dict)
    """By priority."""
    limits: UsageLimitPolicy = field(default_factory=StaticLimit)
    shed_negative: bool = True
    """Requests of negative priority are turned away rather than queued when there is no room for them at once."""

    def band(self, priority: int) -> BandSettings:
        settings = self.bands.get(priority)
        if settings is not None:
            return settings
        if priority < 0 and self.default_negative_band is not None:
            return self.default_negative_band
        return self.default_band


class _Total:
    """What waits in one band over all lanes, the oldest first."""

    __slots__ = ("size", "waiting")

    def __init__(self) -> None:
        self.waiting: OrderedDict[Waiting, None] = OrderedDict()
        self.size = 0


class Lane:
    """What waits for one model."""

    def __init__(self, key: LaneKey, now: float) -> None:
        self.key = key
        self.has_endpoints = True
        self.since = now
        """When `has_endpoints` last changed."""
        self.turn = 0
        """When it was last served, in dispatches: lanes of equal priority take turns."""
        self.saturation = 0.0
        self.ceiling = inf
        """Of its highest priority; both as of when it was last to be dispatched."""
        self.bands: dict[int, BandQueue] = {}
        """Without empty ones."""
        self.waiting: OrderedDict[Waiting, None] = OrderedDict()
        """The oldest first."""

    @property
    def priority(self) -> int:
        """The highest one that waits."""
        return max(self.bands)

    @property
    def oldest(self) -> Waiting:
        return next(iter(self.waiting))


class FlowQueue:
    def __init__(self, settings: QueueSettings) -> None:
        self._settings = settings
        self._lanes: dict[LaneKey, Lane] = {}
        self._totals: dict[int, _Total] = {}
        self._count = 0
        self._size = 0
        self._turn = 0

    def __len__(self) -> int:
        return self._count

    @property
    def size(self) -> int:
        """Bytes that are held."""
        return self._size

    @property
    def lanes(self) -> Sequence[Lane]:
        """Those where something waits."""
        return tuple(self._lanes.values())

    def lane(self, key: LaneKey) -> Lane | None:
        return self._lanes.get(key)

    def totals(self) -> Iterator[tuple[int, int, int]]:
        """(priority, requests, bytes) of each band where something waits."""
        for priority, total in self._totals.items():
            yield priority, len(total.waiting), total.size

    # --- coming ---------------------------------------------------------------------------------------------

    def offer(
        self, request: InferenceRequest, now: float, *, has_endpoints: bool = True
    ) -> tuple[Waiting | Rejection, Sequence[Waiting]]:
        """Queue a request that cannot go at once. Returns its place or why there is none, and the requests of lower
        priority that had to go for it."""
        priority = request.priority
        if self._settings.shed_negative and priority < 0 and has_endpoints:
            return Rejection.SATURATED, ()
        key, size = lane_key(request), request.size
        if not self._fits_band(priority, size) or (key not in self._lanes and len(self._lanes) >= MAX_LANES):
            return Rejection.CAPACITY, ()
        displaced = self._make_room(priority, size)
        if displaced is None:
            return Rejection.CAPACITY, ()
        waiting = Waiting(request, key, priority, flow_of(request), now, now + self._settings.ttl, size)
        self._add(waiting, now, has_endpoints=has_endpoints)
        return waiting, displaced

    def _fits_band(self, priority: int, size: int) -> bool:
        band, total = self._settings.band(priority), self._totals.get(priority)
        count, held = (0, 0) if total is None else (len(total.waiting), total.size)
        return count + 1 <= band.max_requests and held + size <= band.max_bytes

    def _make_room(self, priority: int, size: int) -> Sequence[Waiting] | None:
        """Take out what a request of this priority and size may displace: of the lowest priority the newest first.
        None, and nothing taken, if that would not do."""
        count_over = self._count + 1 - self._settings.max_requests
        size_over = self._size + size - self._settings.max_bytes
        if count_over <= 0 and size_over <= 0:
            return ()
        lower = sorted(other for other in self._totals if other < priority)
        if sum(len(self._totals[other].waiting) for other in lower) < count_over:
            return None
        if sum(self._totals[other].size for other in lower) < size_over:
            return None
        displaced: list[Waiting] = []
        for other in lower:
            total = self._totals[other]
            while total.waiting and (count_over > 0 or size_over > 0):
                victim = next(reversed(total.waiting))
                self.cancel(victim)
                displaced.append(victim)
                count_over -= 1
                size_over -= victim.size
        return displaced

    def _add(self, waiting: Waiting, now: float, *, has_endpoints: bool) -> None:
        key, priority = waiting.lane, waiting.priority
        lane = self._lanes.get(key)
        if lane is None:
            lane = self._lanes[key] = Lane(key, now)
            lane.has_endpoints = has_endpoints
            lane.turn = self._turn
        queue = lane.bands.get(priority)
        if queue is None:
            band = self._settings.band(priority)
            queue = lane.bands[priority] = band.fairness.queue(band.ordering)
        queue.add(waiting)
        lane.waiting[waiting] = None
        total = self._totals.setdefault(priority, _Total())
        total.waiting[waiting] = None
        total.size += waiting.size
        self._count += 1
        self._size += waiting.size

    # --- going ----------------------------------------------------------------------------------------------

    def ceiling(self, priority: int, saturation: float, lane: Lane | None = None) -> float:
        """Up to which saturation a priority may dispatch now, beside those configured and those that wait."""
        active = {priority, *self._settings.bands}
        if lane is not None:
            active.update(lane.bands)
        priorities = sorted(active, reverse=True)
        return self._settings.limits.ceilings(saturation, priorities)[priorities.index(priority)]

    def dispatch(self, lane: Lane, now: float, saturation: float) -> Waiting | None:
        """Take out the next request of a lane, if the saturation of its endpoints lets its priority go. A lane whose
        highest priority is held back lets no lower one pass."""
        if not lane.has_endpoints or not lane.bands:
            return None
        priority = lane.priority
        lane.saturation, lane.ceiling = saturation, self.ceiling(priority, saturation, lane)
        if saturation >= lane.ceiling:
            return None
        waiting = lane.bands[priority].take(now)
        self._turn += 1
        lane.turn = self._turn
        self._forget(lane, waiting)
        return waiting

    def cancel(self, waiting: Waiting) -> bool:
        """Take it out wherever it stands; False if it has gone already."""
        lane = self._lanes.get(waiting.lane)
        if lane is None or waiting not in lane.waiting:
            return False
        lane.bands[waiting.priority].remove(waiting)
        self._forget(lane, waiting)
        return True

    def set_endpoints(self, lane: Lane, now: float, *, has_endpoints: bool) -> None:
        """Whether there is an endpoint for the lane's model. When that changes, the lane's requests begin to wait
        anew: those that waited for a model to start are not turned away because it took long."""
        if lane.has_endpoints != has_endpoints:
            lane.has_endpoints = has_endpoints
            lane.since = now

    def expire(self, now: float) -> Sequence[tuple[Waiting, Rejection]]:
        """Take out all that have waited out their time."""
        gone: list[tuple[Waiting, Rejection]] = []
        for lane in self.lanes:
            reason = Rejection.EXPIRED if lane.has_endpoints else Rejection.NO_ENDPOINT
            while lane.waiting and self.deadline(lane, lane.oldest) <= now:
                waiting = lane.oldest
                self.cancel(waiting)
                gone.append((waiting, reason))
        return gone

    def deadline(self, lane: Lane, waiting: Waiting) -> float:
        """When it expires if nothing changes. However often endpoints come and go, it waits no longer than the longer
        of both times (llm-d's rule)."""
        settings = self._settings
        ttl = settings.ttl if lane.has_endpoints else settings.no_endpoint_ttl
        longest = max(settings.ttl, settings.no_endpoint_ttl)
        return min(max(waiting.enqueued, lane.since) + ttl, waiting.enqueued + longest)

    def next_deadline(self) -> float:
        """When `expire` has something to do; infinite if never."""
        return min((self.deadline(lane, lane.oldest) for lane in self._lanes.values()), default=inf)

    def _forget(self, lane: Lane, waiting: Waiting) -> None:
        priority = waiting.priority
        del lane.waiting[waiting]
        if not len(lane.bands[priority]):
            del lane.bands[priority]
        if not lane.bands:
            del self._lanes[lane.key]
        total = self._totals[priority]
        del total.waiting[waiting]
        total.size -= waiting.size
        if not total.waiting:
            del self._totals[priority]
        self._count -= 1
        self._size -= waiting.size
