"""`program-aware-fairness`: the flow that has been given least of late goes next (least attained service).

What a flow was given are its prompt tokens plus twice its output tokens, halved every `half_life` seconds. Since all
flows' accounts shrink alike, they are kept in units of a fixed moment, in which they only ever grow: the order of flows
changes only when one is served, and none has to be visited because time passes.
"""

from __future__ import annotations

import math
from typing import Final

from quire.gateway.flow.policies import BandQueue, FairnessPolicy, OrderingPolicy, Waiting
from quire.gateway.flow.ranked import RankedSet

MAX_ACCOUNTS: Final = 20_000
"""Flows whose account is kept; beyond, the smallest are forgotten."""
REBASE_HALF_LIVES: Final = 256.0
"""How far the fixed moment may lie back before the numbers grow too large."""


class LeastAttainedService(FairnessPolicy):
    def __init__(self, half_life: float = 60.0) -> None:
        """`half_life` in seconds."""
        self._half_life = half_life
        self._base: float | None = None
        self._epoch = 0
        self._accounts: dict[str, float] = {}
        self._smallest: RankedSet[str] = RankedSet()

    @classmethod
    def with_factor(cls, factor: float) -> LeastAttainedService:
        """Where accounts shrink by `factor` (below 1) each second."""
        return cls(math.log(0.5) / math.log(factor))

    @property
    def epoch(self) -> int:
        """Goes up when accounts are counted in new units."""
        return self._epoch

    def queue(self, ordering: OrderingPolicy) -> BandQueue:
        return _AttainedQueue(self, ordering)

    def account(self, flow: str) -> float:
        """In units of the fixed moment: only good for comparing flows."""
        return self._accounts.get(flow, 0.0)

    def attained(self, flow: str, now: float) -> float:
        """Weighted tokens, decayed to now."""
        return self.account(flow) / self._scale(now)

    def served(self, flow: str, tokens: float, now: float) -> None:
        self._rebase(now)
        self._accounts[flow] = self.account(flow) + tokens * self._scale(now)
        self._smallest.put(flow, (self._accounts[flow],))
        if len(self._accounts) > MAX_ACCOUNTS:
            del self._accounts[self._smallest.pop()]

    def _scale(self, now: float) -> float:
        return 1.0 if self._base is None else math.exp2((now - self._base) / self._half_life)

    def _rebase(self, now: float) -> None:
        if self._base is None:
            self._base = now
        if now - self._base <= REBASE_HALF_LIVES * self._half_life:
            return
        scale = self._scale(min(now, self._base + 1000 * self._half_life))  # beyond that, nothing is left anyway
        kept = {flow: value / scale for flow, value in self._accounts.items() if value / scale >= 1.0}
        self._base, self._epoch, self._accounts, self._smallest = now, self._epoch + 1, kept, RankedSet()
        for flow, value in kept.items():
            self._smallest.put(flow, (value,))


class _AttainedQueue(BandQueue):
    """Flows by their accounts as they were when ranked; a flow that comes up with a larger one is ranked anew."""

    def __init__(self, policy: LeastAttainedService, ordering: OrderingPolicy) -> None:
        self._policy, self._ordering = policy, ordering
        self._flows: dict[str, RankedSet[Waiting]] = {}
        self._ranks: RankedSet[str] = RankedSet()
        self._epoch = policy.epoch
        self._count = 0

    def add(self, waiting: Waiting) -> None:
        flow = self._flows.get(waiting.flow)
        if flow is None:
            flow = self._flows[waiting.flow] = RankedSet()
            self._ranks.put(waiting.flow, (self._policy.account(waiting.flow),))
        flow.put(waiting, self._ordering.key(waiting))
        self._count += 1

    def remove(self, waiting: Waiting) -> None:
        self._flows[waiting.flow].discard(waiting)
        self._taken(waiting.flow)

    def take(self, now: float) -> Waiting:
        if self._epoch != self._policy.epoch:
            self._epoch = self._policy.epoch
            self._ranks = RankedSet()
            for flow in self._flows:
                self._ranks.put(flow, (self._policy.account(flow),))
        name = self._least()
        waiting = self._flows[name].pop()
        self._taken(name)
        # Its prompt counts at once, else all of a flow's requests would go before the first one ends.
        self._policy.served(name, waiting.request.prompt_tokens + 1.0, now)
        return waiting

    def _least(self) -> str:
        while True:
            name, key = self._ranks.first(), self._ranks.first_key()
            if name is None or key is None:
                raise KeyError("take from an empty queue")
            account = self._policy.account(name)
            if account <= key[0]:
                return name
            self._ranks.put(name, (account,))

    def _taken(self, name: str) -> None:
        self._count -= 1
        if not self._flows[name]:
            del self._flows[name]
            self._ranks.discard(name)

    def __len__(self) -> int:
        return self._count
