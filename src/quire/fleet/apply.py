"""`apply(state, event)`: what an event makes of the state. Pure; time is in the event."""

from __future__ import annotations

from functools import reduce

import msgspec

from quire.fleet import events as e
from quire.fleet.spec import RoleSpec, ServiceSpec
from quire.fleet.state import FleetState, Replica

FIRST_BACKOFF = 0.5
LONGEST_BACKOFF = 60.0
STABLE_AFTER = 60.0
"""Seconds up after which an end counts as the first failure again."""
UNSEEN_END = "It ended while no control plane was watching."


def apply(state: FleetState, event: e.Event) -> FleetState:
    """The state after `event`. An event about a replica that is gone changes nothing: the world was faster."""
    match event:
        case e.ManifestApplied(spec=spec):
            return _asked_for(state, spec)
        case e.RoleScaled(role=role, replicas=replicas):
            return _scaled(state, role, replicas)
        case e.DownRequested(at_once=at_once):
            return msgspec.structs.replace(state, down=True, at_once=at_once or state.at_once)
        case e.StartDecided():
            return _with(state, _started(state.replicas.get(event.replica), event))
        case (
            e.DrainRequested()
            | e.DrainDecided()
            | e.StopDecided()
            | e.KillDecided()
            | e.ProcessStarted()
            | e.BecameReady()
            | e.BecameUnready()
            | e.WentOverLimit()
            | e.BecameIdle()
        ):
            replica = state.replicas.get(event.replica)
            if replica is None:
                return state
            if isinstance(event, (e.StopDecided, e.KillDecided)) and not replica.has_process:
                return _without(state, replica)  # there is nothing to wait for
            return _with(state, _changed(replica, event))
        case e.ProcessExited():
            replica = state.replicas.get(event.replica)
            return state if replica is None or not replica.has_process else _exited(state, replica, event)
    raise AssertionError(event)


def replay(state: FleetState, events: list[e.AnyEvent]) -> FleetState:
    return reduce(apply, events, state)


def backoff(failures: int) -> float:
    """Seconds to wait after that many failures in a row."""
    return min(FIRST_BACKOFF * 2.0 ** min(failures - 1, 16), LONGEST_BACKOFF)


def _with(state: FleetState, replica: Replica) -> FleetState:
    return msgspec.structs.replace(state, replicas={**state.replicas, replica.name: replica})


def _without(state: FleetState, replica: Replica) -> FleetState:
    rest = {name: other for name, other in state.replicas.items() if name != replica.name}
    return _without_the_unused(msgspec.structs.replace(state, replicas=rest))


def _asked_for(state: FleetState, spec: ServiceSpec) -> FleetState:
    """Processes of the revisions that were asked for before go on, and may have to be started again until they go."""
    known = dict(state.kept)
    if state.spec is not None:
        known |= {role.revision: role for role in state.spec.roles}
    wanted = {role.revision for role in spec.roles}
    kept = {revision: role for revision, role in known.items() if revision not in wanted}
    return _without_the_unused(msgspec.structs.replace(state, spec=spec, kept=kept, down=False, at_once=False))


def _without_the_unused(state: FleetState) -> FleetState:
    used = {replica.revision for replica in state.replicas.values()}
    kept = {revision: role for revision, role in state.kept.items() if revision in used}
    return state if kept == state.kept else msgspec.structs.replace(state, kept=kept)


def _scaled(state: FleetState, role: str, replicas: int) -> FleetState:
    if state.spec is None:
        return state

    def scale(spec: RoleSpec) -> RoleSpec:
        return msgspec.structs.replace(spec, replicas=replicas) if spec.role == role else spec

    spec = msgspec.structs.replace(state.spec, roles=tuple(scale(spec) for spec in state.spec.roles))
    return msgspec.structs.replace(state, spec=spec)


def _started(before: Replica | None, event: e.StartDecided) -> Replica:
    """A new place, or the same place again after a failure, which remembers how often it failed."""
    return Replica(
        name=event.replica,
        role=event.role,  # type: ignore[arg-type]  # the plan takes it from the spec
        revision=event.revision,
        phase="starting",
        since=event.at,
        port=event.port,
        threads=event.threads,
        starts=1 if before is None else before.starts + 1,
        failures=0 if before is None else before.failures,
        last_error=None if before is None else before.last_error,
    )


def _changed(replica: Replica, event: e.Event) -> Replica:
    change = msgspec.structs.replace
    match event:
        case e.DrainRequested(timeout=timeout):
            return change(replica, drain_asked=True, drain_timeout=timeout)
        case e.DrainDecided(deadline=deadline) if not replica.leaving:
            return change(replica, phase="draining", since=event.at, deadline=deadline, idle=False)
        case e.StopDecided(deadline=deadline) if replica.phase != "stopping":
            return change(replica, phase="stopping", since=event.at, deadline=deadline)
        case e.KillDecided(reason=reason):
            return change(replica, killed=True, last_error=reason)
        case e.ProcessStarted(pid=pid):
            return change(replica, pid=pid)
        case e.BecameReady() if replica.phase in ("starting", "unready"):
            ready_since = event.at if replica.ready_since is None else replica.ready_since
            return change(replica, phase="ready", since=event.at, ready_since=ready_since)
        case e.BecameUnready(reason=reason) if replica.phase == "ready":
            return change(replica, phase="unready", since=event.at, last_error=reason)
        case e.WentOverLimit(reason=reason):
            return change(replica, over_limit=reason)
        case e.BecameIdle() if replica.phase == "draining":
            return change(replica, idle=True)
    return replica


def _exited(state: FleetState, replica: Replica, event: e.ProcessExited) -> FleetState:
    if replica.leaving or replica.drain_asked or state.down:
        return _without(state, replica)
    stable = replica.ready_since is not None and event.at - replica.ready_since >= STABLE_AFTER
    failures = 1 if stable else replica.failures + 1
    error = replica.last_error if replica.killed else event.error or _how_it_ended(event.returncode)
    failed = msgspec.structs.replace(
        replica,
        phase="backoff",
        since=event.at,
        pid=None,
        failures=failures,
        not_before=event.at + backoff(failures),
        ready_since=None,
        killed=False,
        over_limit=None,
        last_error=error,
    )
    return _with(state, failed)


def _how_it_ended(returncode: int | None) -> str:
    if returncode is None:
        return UNSEEN_END
    return f"It ended with exit code {returncode}."
