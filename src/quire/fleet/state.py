"""What is: the replicas and what is known of them. Plain data; `apply` is the only thing that makes a new one."""

from __future__ import annotations

from typing import Literal

import msgspec

from quire.fleet.spec import GATEWAY, Role, RoleSpec, ServiceSpec

Phase = Literal["starting", "ready", "unready", "backoff", "draining", "stopping"]

CRASH_LOOP = 3
"""Failures in a row from which on a replica is said to be in a crash loop."""


class Replica(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One place that a process fills, again and again if it fails. Times are seconds since the epoch."""

    name: str
    role: Role
    revision: str
    phase: Phase
    since: float
    """When it came into this phase."""
    port: int
    threads: int | None = None
    pid: int | None = None
    starts: int = 1
    """Processes started in this place; the running one is the last of them."""
    failures: int = 0
    """Ends in a row that nobody asked for."""
    ready_since: float | None = None
    """Since when this process has been up; None if it has not been yet."""
    not_before: float = 0.0
    """When the next start may be, in backoff."""
    deadline: float | None = None
    """When draining ends in a stop, and stopping in a kill."""
    drain_timeout: float | None = None
    """Asked for by the operator, not yet begun."""
    drain_asked: bool = False
    idle: bool = False
    over_limit: str | None = None
    """Why it has to be ended, if it has."""
    killed: bool = False
    last_error: str | None = None

    @property
    def has_process(self) -> bool:
        return self.phase != "backoff"

    @property
    def leaving(self) -> bool:
        return self.phase in ("draining", "stopping")

    @property
    def in_crash_loop(self) -> bool:
        return self.failures >= CRASH_LOOP and self.phase in ("starting", "backoff")


class FleetState(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    spec: ServiceSpec | None = None
    replicas: dict[str, Replica] = {}
    down: bool = False
    """Asked to stop everything."""
    at_once: bool = False
    kept: dict[str, RoleSpec] = {}
    """By revision: what replicas that are there were started from, and the manifest asks for no longer."""

    def spec_of(self, replica: Replica) -> RoleSpec | None:
        """What the replica is started from; None if that was never written down."""
        if self.is_wanted(replica):
            assert self.spec is not None
            return self.spec.role(replica.role)
        return self.kept.get(replica.revision)

    def is_wanted(self, replica: Replica) -> bool:
        """Whether it is of the revision that is asked for."""
        wanted = None if self.spec is None else self.spec.role(replica.role)
        return wanted is not None and wanted.revision == replica.revision

    def of_role(self, role: str) -> list[Replica]:
        return [replica for replica in self.replicas.values() if replica.role == role]

    @property
    def engines(self) -> list[Replica]:
        return [replica for replica in self.replicas.values() if replica.role != GATEWAY]

    @property
    def settled(self) -> bool:
        """Whether what runs is what was asked for."""
        if self.spec is None or self.down:
            return not self.replicas
        for spec in self.spec.roles:
            there = self.of_role(spec.role)
            as_asked = [item for item in there if item.phase == "ready" and item.revision == spec.revision]
            if len(there) != spec.replicas or len(as_asked) != spec.replicas or any(i.drain_asked for i in there):
                return False
        return all(self.spec.role(replica.role) is not None for replica in self.replicas.values())
