"""Events and replicas in words, for people."""

from __future__ import annotations

import time

from quire.fleet import events as e
from quire.fleet.apply import backoff
from quire.fleet.state import CRASH_LOOP, FleetState, Replica


def describe(event: e.AnyEvent) -> str:
    """One line; it begins with what it is about."""
    match event:
        case e.ManifestApplied(spec=spec):
            roles = ", ".join(f"{role.replicas} × {role.role}" for role in spec.roles)
            return f"{spec.name}: asked for {spec.model_name}: {roles}"
        case e.RoleScaled(role=role, replicas=replicas):
            return f"{role}: asked for {replicas} replicas"
        case e.DrainRequested(replica=replica):
            return f"{replica}: asked to drain"
        case e.DownRequested(at_once=at_once):
            return "asked to stop at once" if at_once else "asked to stop"
        case e.StartDecided(replica=replica, revision=revision, port=port, threads=threads):
            with_threads = "" if threads is None else f", {threads} threads"
            return f"{replica}: starting revision {revision} on port {port}{with_threads}"
        case e.DrainDecided(replica=replica, reason=reason):
            return f"{replica}: draining ({reason})"
        case e.StopDecided(replica=replica, reason=reason):
            return f"{replica}: stopping ({reason})"
        case e.KillDecided(replica=replica, reason=reason):
            return f"{replica}: killing: {reason}"
        case e.ProcessStarted(replica=replica, pid=pid):
            return f"{replica}: process {pid}"
        case e.BecameReady(replica=replica):
            return f"{replica}: ready"
        case e.BecameUnready(replica=replica, reason=reason):
            return f"{replica}: unready: {reason}"
        case e.WentOverLimit(replica=replica, reason=reason):
            return f"{replica}: {reason}"
        case e.BecameIdle(replica=replica):
            return f"{replica}: idle"
        case e.ProcessExited(replica=replica, returncode=returncode, error=error):
            how = "ended" if returncode is None else f"ended ({returncode})"
            return f"{replica}: {how}" + (f": {error}" if error else "")
    raise AssertionError(event)


def consequence(event: e.AnyEvent, state: FleetState) -> str | None:
    """What follows from a failure, which the event alone does not tell."""
    if not isinstance(event, e.ProcessExited):
        return None
    replica = state.replicas.get(event.replica)
    if replica is None or replica.phase != "backoff":
        return None
    wait = f"starts again in {backoff(replica.failures):g} s"
    if replica.failures < CRASH_LOOP:
        return f"{replica.name}: {wait}"
    return f"{replica.name}: in a crash loop, {replica.failures} failures in a row, {wait}. Last: {replica.last_error}"


def status(replica: Replica) -> str:
    return "crash loop" if replica.in_crash_loop else replica.phase


def summary(state: FleetState) -> str:
    """`2/2 both, 1/1 gateway ready`."""
    if state.spec is None:
        return "nothing asked for"
    parts = []
    for role in state.spec.roles:
        there = state.of_role(role.role)
        ready = sum(replica.phase == "ready" for replica in there)
        label = "replicas" if role.role == "both" else role.role
        parts.append(f"{ready}/{role.replicas} {label}")
    return ", ".join(parts) + " ready"


def clock(at: float) -> str:
    return time.strftime("%H:%M:%S", time.localtime(at))


def age(seconds: float) -> str:
    seconds = max(0, int(seconds))
    for size, unit in ((86_400, "d"), (3600, "h"), (60, "m")):
        if seconds >= size:
            return f"{seconds // size}{unit}"
    return f"{seconds}s"
