"""Where requests wait, and what falls due.

Both structures cost O(log n) to search; nothing here is sorted or scanned anew at each step.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from quire.sched.policy import Key, Policy

if TYPE_CHECKING:
    from quire.sched.state import RequestState

DeadlineKind = Literal["total", "queue", "ttft"]


@dataclass(slots=True)
class WaitingQueue:
    """Requests that hold no blocks, in one sorted list per lane of the policy."""

    policy: Policy
    lanes: dict[str, list[tuple[Key, RequestState]]] = field(default_factory=dict)
    num_tokens: int = 0
    size: int = 0

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[RequestState]:
        for lane in self.lanes.values():
            for _key, state in lane:
                yield state

    def push(self, state: RequestState) -> None:
        insort(self.lanes.setdefault(self.policy.lane(state), []), (self.policy.order(state), state))
        self.num_tokens += len(state.token_ids)
        self.size += 1

    def remove(self, state: RequestState) -> None:
        name = self.policy.lane(state)
        lane = self.lanes[name]
        index = bisect_left(lane, (self.policy.order(state),))
        assert lane[index][1] is state
        del lane[index]
        if not lane:
            del self.lanes[name]
        self.num_tokens -= len(state.token_ids)
        self.size -= 1

    def under(self, policy: Policy) -> WaitingQueue:
        """The same requests, queued by another policy."""
        queue = WaitingQueue(policy)
        for state in self:
            queue.push(state)
        return queue


@dataclass(slots=True, order=True)
class Deadline:
    """At `time` (monotonic seconds), `state` is too late if what `kind` waits for has not happened."""

    time: float
    number: int
    kind: DeadlineKind
    state: RequestState = field(compare=False)

    @property
    def matters(self) -> bool:
        if not self.state.is_live:
            return False
        if self.kind == "queue":
            return self.state.first_scheduled_time is None
        if self.kind == "ttft":
            return self.state.first_token_time is None
        return True


@dataclass(slots=True)
class DeadlineHeap:
    """All deadlines, the nearest on top. Entries that no longer matter stay until they fall due or are swept."""

    entries: list[Deadline] = field(default_factory=list)
    num_stale_allowed: int = 64

    def add(self, state: RequestState) -> None:
        deadlines, arrival = state.request.deadlines, state.request.arrival_time
        limits: tuple[tuple[DeadlineKind, float | None], ...] = (
            ("total", deadlines.total_ms),
            ("queue", deadlines.queue_ms),
            ("ttft", deadlines.ttft_ms),
        )
        for kind, limit in limits:
            if limit is not None:
                heapq.heappush(self.entries, Deadline(arrival + limit / 1000.0, state.number, kind, state))

    def due(self, now: float) -> list[Deadline]:
        """Those that matter and whose time has come, one per request, without removing any. O(number that are due)."""
        found: dict[int, Deadline] = {}
        pending = [0] if self.entries else []
        while pending:
            index = pending.pop()
            entry = self.entries[index]
            if entry.time > now:
                continue
            if entry.matters:
                earlier = found.get(entry.number)
                found[entry.number] = min(entry, earlier) if earlier else entry
            pending.extend(child for child in (2 * index + 1, 2 * index + 2) if child < len(self.entries))
        return sorted(found.values())

    def drop_until(self, now: float) -> None:
        """Remove what fell due; the caller has dealt with it."""
        while self.entries and self.entries[0].time <= now:
            heapq.heappop(self.entries)

    def sweep(self, num_live: int) -> None:
        """Bound the memory that ended requests take: rebuild when most entries may be stale."""
        if len(self.entries) > 6 * num_live + self.num_stale_allowed:
            self.entries = [entry for entry in self.entries if entry.matters]
            heapq.heapify(self.entries)
