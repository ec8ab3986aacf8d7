"""What happened: the only thing that changes state. Commands of the operator, decisions of the plan, observations."""

from __future__ import annotations

import msgspec

from quire.fleet.spec import ServiceSpec


class Event(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", forbid_unknown_fields=True):
    """`at` is seconds since the epoch."""

    at: float


# --- asked for by the operator ------------------------------------------------------------------------------


class ManifestApplied(Event, frozen=True, kw_only=True, tag=True):
    """This is what shall run from now on."""

    spec: ServiceSpec


class RoleScaled(Event, frozen=True, kw_only=True, tag=True):
    role: str
    replicas: int


class DrainRequested(Event, frozen=True, kw_only=True, tag=True):
    """A replica is to finish what it runs and go; another takes its place."""

    replica: str
    timeout: float | None = None


class DownRequested(Event, frozen=True, kw_only=True, tag=True):
    """Everything is to stop; `at_once` without letting requests finish."""

    at_once: bool = False


# --- decided by the plan ------------------------------------------------------------------------------------


class StartDecided(Event, frozen=True, kw_only=True, tag=True):
    replica: str
    role: str
    revision: str
    port: int
    threads: int | None = None


class DrainDecided(Event, frozen=True, kw_only=True, tag=True):
    """The gateway sends the replica nothing new; at `deadline` it is stopped even if something runs."""

    replica: str
    deadline: float
    reason: str


class StopDecided(Event, frozen=True, kw_only=True, tag=True):
    """SIGTERM; at `deadline` it is killed."""

    replica: str
    deadline: float
    reason: str


class KillDecided(Event, frozen=True, kw_only=True, tag=True):
    replica: str
    reason: str


# --- observed -----------------------------------------------------------------------------------------------


class ProcessStarted(Event, frozen=True, kw_only=True, tag=True):
    """`pid` is the engine's or the gateway's own."""

    replica: str
    pid: int


class BecameReady(Event, frozen=True, kw_only=True, tag=True):
    replica: str


class BecameUnready(Event, frozen=True, kw_only=True, tag=True):
    replica: str
    reason: str


class WentOverLimit(Event, frozen=True, kw_only=True, tag=True):
    """It holds more memory than the manifest grants it."""

    replica: str
    reason: str


class BecameIdle(Event, frozen=True, kw_only=True, tag=True):
    """A draining replica has nothing left to do."""

    replica: str


class ProcessExited(Event, frozen=True, kw_only=True, tag=True):
    """`returncode` is negative for a signal, and None where nobody saw it. `error` is the process's own last error."""

    replica: str
    returncode: int | None = None
    error: str | None = None


AnyEvent = (
    ManifestApplied
    | RoleScaled
    | DrainRequested
    | DownRequested
    | StartDecided
    | DrainDecided
    | StopDecided
    | KillDecided
    | ProcessStarted
    | BecameReady
    | BecameUnready
    | WentOverLimit
    | BecameIdle
    | ProcessExited
)
