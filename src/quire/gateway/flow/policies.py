"""Which flow of a priority band goes next (fairness), and which request of that flow (ordering).

A flow is a tenant, or what the fairness header names. Names and meanings are llm-d's; each policy is a plugin, so that
a configuration can name it and others can add their own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict
from dataclasses import dataclass
from math import inf

from quire.gateway.flow.ranked import Key, RankedSet
from quire.gateway.plugin import Plugin
from quire.gateway.request import InferenceRequest


@dataclass(frozen=True, slots=True)
class LaneKey:
    """Requests with the same one have the same candidates."""

    model: str
    subset: frozenset[str] | None = None
    selector: frozenset[tuple[str, str]] = frozenset()


def lane_key(request: InferenceRequest) -> LaneKey:
    return LaneKey(request.target_model or request.model, request.subset, frozenset(request.selector.items()))


def flow_of(request: InferenceRequest) -> str:
    """Whose request it is. A known tenant is one flow, whatever it writes into the fairness header."""
    return request.tenant or request.fairness_id


@dataclass(slots=True, eq=False)
class Waiting:
    """A request in the queue. Equal to itself only."""

    request: InferenceRequest
    lane: LaneKey
    priority: int
    flow: str
    enqueued: float
    """When it came, by the gateway's clock."""
    deadline: float
    """When it expires as long as there are endpoints; what orderings by deadline go by."""
    size: int
    """Bytes it holds."""


class OrderingPolicy(Plugin):
    """Of one flow's requests, the one with the least key goes first; of equal ones the one that came first."""

    @abstractmethod
    def key(self, waiting: Waiting) -> Key: ...


class FirstComeFirstServed(OrderingPolicy):
    """`fcfs-ordering-policy`, the default."""

    def key(self, waiting: Waiting) -> Key:
        return (waiting.enqueued,)


class EarliestDeadlineFirst(OrderingPolicy):
    """`edf-ordering-policy`: by when a request expires."""

    def key(self, waiting: Waiting) -> Key:
        return (waiting.deadline, waiting.enqueued)


class SloDeadline(OrderingPolicy):
    """`slo-deadline-ordering-policy`: by arrival plus the time to first token asked for; requests that ask for none
    come after all that do."""

    def key(self, waiting: Waiting) -> Key:
        slo = waiting.request.slo_ttft
        return (inf if slo is None else waiting.request.arrived + slo, waiting.enqueued)


class BandQueue(ABC):
    """The waiting requests of one priority band, in the order that a fairness policy gives them. What it knows of a
    flow goes with the flow's last request."""

    @abstractmethod
    def add(self, waiting: Waiting) -> None: ...

    @abstractmethod
    def remove(self, waiting: Waiting) -> None:
        """It goes without being served."""

    @abstractmethod
    def take(self, now: float) -> Waiting:
        """The next one, which is now served. Raises `KeyError` when empty."""

    @abstractmethod
    def __len__(self) -> int: ...


class FairnessPolicy(Plugin):
    @abstractmethod
    def queue(self, ordering: OrderingPolicy) -> BandQueue:
        """A queue for one band of one model."""

    def served(self, flow: str, tokens: float, now: float) -> None:
        """`tokens` more were spent on a flow's request."""


class GlobalStrict(FairnessPolicy):
    """`global-strict-fairness-policy`: no fairness; the ordering goes over all flows at once."""

    def queue(self, ordering: OrderingPolicy) -> BandQueue:
        return _StrictQueue(ordering)


class _StrictQueue(BandQueue):
    def __init__(self, ordering: OrderingPolicy) -> None:
        self._ordering = ordering
        self._waiting: RankedSet[Waiting] = RankedSet()

    def add(self, waiting: Waiting) -> None:
        self._waiting.put(waiting, self._ordering.key(waiting))

    def remove(self, waiting: Waiting) -> None:
        self._waiting.discard(waiting)

    def take(self, now: float) -> Waiting:
        return self._waiting.pop()

    def __len__(self) -> int:
        return len(self._waiting)


class RoundRobin(FairnessPolicy):
    """`round-robin-fairness-policy`: one request of each flow in turn. Of two flows that both always have requests
    waiting, neither is ever served more than one request ahead of the other."""

    def queue(self, ordering: OrderingPolicy) -> BandQueue:
        return _RoundRobinQueue(ordering)


class _RoundRobinQueue(BandQueue):
    def __init__(self, ordering: OrderingPolicy) -> None:
        self._ordering = ordering
        self._flows: OrderedDict[str, RankedSet[Waiting]] = OrderedDict()
        self._count = 0

    def add(self, waiting: Waiting) -> None:
        flow = self._flows.get(waiting.flow)
        if flow is None:
            flow = self._flows[waiting.flow] = RankedSet()
        flow.put(waiting, self._ordering.key(waiting))
        self._count += 1

    def remove(self, waiting: Waiting) -> None:
        flow = self._flows[waiting.flow]
        flow.discard(waiting)
        self._count -= 1
        if not flow:
            del self._flows[waiting.flow]

    def take(self, now: float) -> Waiting:
        name = next(iter(self._flows), None)
        if name is None:
            raise KeyError("take from an empty queue")
        flow = self._flows[name]
        waiting = flow.pop()
        self._count -= 1
        if flow:
            self._flows.move_to_end(name)
        else:
            del self._flows[name]
        return waiting

    def __len__(self) -> int:
        return self._count
