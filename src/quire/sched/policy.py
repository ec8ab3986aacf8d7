"""Who goes first.

A policy is three small functions. Waiting requests stand in lanes, sorted within a lane by an `order` that never
changes; `rank` compares the heads of lanes, and running requests with one another. Lower goes first. Blocks are taken
from the running request that ranks last.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from quire.core.registry import Registry

if TYPE_CHECKING:
    from quire.sched.state import RequestState

Key = tuple[float, ...]

PROMPT_WEIGHT = 1.0
GENERATED_WEIGHT = 2.0
"""What a token costs its tenant: a generated one takes a pass over the weights nearly for itself."""


class Policy(Protocol):
    """`order` must be unique per request (end it with `state.number`), and `rank` must agree with it within a lane.

    `rank` may read `service`, the weighted tokens that each tenant was served. So that no two requests can take blocks
    from each other for ever, it may change only with `service`.
    """

    def lane(self, state: RequestState) -> str: ...

    def order(self, state: RequestState) -> Key: ...

    def rank(self, state: RequestState, service: Mapping[str, float]) -> Key: ...


class FirstComeFirstServed:
    def lane(self, state: RequestState) -> str:  # noqa: ARG002
        return ""

    def order(self, state: RequestState) -> Key:
        return (state.request.arrival_time, state.number)

    def rank(self, state: RequestState, service: Mapping[str, float]) -> Key:  # noqa: ARG002
        return (state.request.arrival_time, state.number)


class ByPriority:
    """Lower `priority` first, then first come. A steady stream of urgent requests starves the others: that is asked."""

    def lane(self, state: RequestState) -> str:  # noqa: ARG002
        return ""

    def order(self, state: RequestState) -> Key:
        return (state.request.priority, state.request.arrival_time, state.number)

    def rank(self, state: RequestState, service: Mapping[str, float]) -> Key:  # noqa: ARG002
        return self.order(state)


class FairShare:
    """The tenant that was served least goes first; within a tenant, first come.

    Virtual token counters as in "Fairness in Serving Large Language Models" (Sheng et al., OSDI 2024).
    """

    def lane(self, state: RequestState) -> str:
        return state.request.tenant

    def order(self, state: RequestState) -> Key:
        return (state.request.arrival_time, state.number)

    def rank(self, state: RequestState, service: Mapping[str, float]) -> Key:
        request = state.request
        return (service.get(request.tenant, 0.0), request.arrival_time, state.number)


def policies() -> Registry[Callable[[], Policy]]:
    """The policies by name; others join through the entry-point group `quire.policies`."""
    registry: Registry[Callable[[], Policy]] = Registry("scheduling policy", "quire.policies")
    registry.add("fcfs", FirstComeFirstServed)
    registry.add("priority", ByPriority)
    registry.add("fair", FairShare)
    return registry


@dataclass(slots=True)
class Service:
    """Weighted tokens served per tenant, and how many live requests each has.

    A tenant that comes back from idleness is lifted to the least served of the active ones, or, if none is active, to
    where the last one left: being idle earns no credit.
    """

    tokens: dict[str, float] = field(default_factory=dict)
    live: dict[str, int] = field(default_factory=dict)
    floor: float = 0.0
    num_idle_kept: int = 512

    def arrive(self, tenant: str) -> None:
        if tenant not in self.live:
            active = [self.tokens[other] for other in self.live]
            self.floor = max(self.floor, min(active)) if active else self.floor
            self.tokens[tenant] = max(self.tokens.get(tenant, 0.0), self.floor)
        self.live[tenant] = self.live.get(tenant, 0) + 1

    def leave(self, tenant: str) -> None:
        self.live[tenant] -= 1
        if self.live[tenant] == 0:
            del self.live[tenant]
            if not self.live:
                self.floor = max(self.floor, self.tokens[tenant])
            if len(self.tokens) > 2 * len(self.live) + 2 * self.num_idle_kept:
                self._prune()

    def charge(self, tenant: str, tokens: float) -> None:
        self.tokens[tenant] += tokens

    def _prune(self) -> None:
        """Forget idle tenants that would be lifted anyway, and of the rest those that were served least."""
        active = [self.tokens[tenant] for tenant in self.live]
        self.floor = max(self.floor, min(active)) if active else self.floor
        idle = sorted((tenant for tenant in self.tokens if tenant not in self.live), key=self.tokens.__getitem__)
        for place, tenant in enumerate(idle, start=1):
            if self.tokens[tenant] <= self.floor or len(idle) - place >= self.num_idle_kept:
                del self.tokens[tenant]
