"""`plan(state, now)`: what to do next. Pure: plain data in, a list of actions out, nothing done.

Engines are replaced as a Kubernetes Deployment does it: never more processes than replicas + maxSurge, and a rollout
takes away a ready replica only while replicas - maxUnavailable others are ready. Unlike there, a replica that is
draining counts as a process, because one machine's memory is what the bound is for.

The bound is a role's. Where a manifest changes the roles themselves, the engines of a role that is gone stay until
those that are asked for can take their requests, so that for a while both are there.
"""

from __future__ import annotations

import msgspec

from quire.fleet.apply import LONGEST_BACKOFF
from quire.fleet.spec import GATEWAY, RoleSpec
from quire.fleet.state import FleetState, Replica

UNREADY_TIMEOUT = 60.0
"""Seconds that a replica may fail its probes before it is restarted."""


class Start(msgspec.Struct, frozen=True, kw_only=True):
    replica: str
    role: RoleSpec


class Drain(msgspec.Struct, frozen=True, kw_only=True):
    replica: str
    deadline: float
    reason: str


class Stop(msgspec.Struct, frozen=True, kw_only=True):
    replica: str
    deadline: float
    reason: str


class Kill(msgspec.Struct, frozen=True, kw_only=True):
    replica: str
    reason: str


Action = Start | Drain | Stop | Kill


def plan(state: FleetState, now: float) -> list[Action]:
    """The actions that are due at `now`, at most one for a replica. Doing none of them twice is the caller's part."""
    actions = _overdue(state, now)
    if state.spec is None:
        return actions
    if state.down:
        return actions + _down(state, now, taken={action.replica for action in actions})
    for role in dict.fromkeys([*(spec.role for spec in state.spec.roles), *(r.role for r in state.replicas.values())]):
        taken = {action.replica for action in actions}
        spec = state.spec.role(role)
        if spec is None and role != GATEWAY and not _can_take_over(state):
            there = [replica for replica in state.of_role(role) if replica.name not in taken]
            actions += _again(there, state, now)
        else:
            actions += _role(spec or RoleSpec(role=role, replicas=0), state, now, taken)
    return actions


def _can_take_over(state: FleetState) -> bool:
    """Whether the roles that are asked for have as many ready as a rollout leaves them."""
    assert state.spec is not None
    return all(
        sum(replica.phase == "ready" for replica in state.of_role(spec.role)) >= spec.replicas - spec.unavailable
        for spec in state.spec.roles
        if spec.role != GATEWAY
    )


def _overdue(state: FleetState, now: float) -> list[Action]:
    """What a clock or an end of work makes due, whatever is asked for."""
    actions: list[Action] = []
    for replica in state.replicas.values():
        timeouts = _timeouts(replica, state)
        due = replica.deadline is not None and now >= replica.deadline
        waited = now - replica.since
        if replica.killed:
            continue
        if replica.over_limit is not None and replica.has_process:
            actions.append(Kill(replica=replica.name, reason=replica.over_limit))
        elif replica.phase == "draining" and (replica.idle or due):
            reason = "idle" if replica.idle else "the deadline for draining has passed"
            actions.append(Stop(replica=replica.name, deadline=now + timeouts.stop_timeout, reason=reason))
        elif replica.phase == "stopping" and due:
            actions.append(Kill(replica=replica.name, reason="It did not stop in time."))
        elif replica.phase == "starting" and waited > timeouts.start_timeout:
            reason = f"It was not ready within {timeouts.start_timeout:g} seconds."
            actions.append(Kill(replica=replica.name, reason=reason))
        elif replica.phase == "unready" and waited > UNREADY_TIMEOUT:
            reason = f"It failed its health checks for {UNREADY_TIMEOUT:g} seconds: {replica.last_error}"
            actions.append(Kill(replica=replica.name, reason=reason))
    return actions


def _down(state: FleetState, now: float, taken: set[str]) -> list[Action]:
    """The gateway first, whose stop lets its requests finish; then the engines."""
    if state.at_once:
        return [
            Kill(replica=name, reason="Told to stop at once.")
            for name, replica in state.replicas.items()
            if name not in taken and not replica.killed
        ]
    first = state.of_role(GATEWAY) or state.engines
    return [
        _stop(replica, state, now, "down")
        for replica in first
        if replica.name not in taken and replica.phase != "stopping"
    ]


def _stop(replica: Replica, state: FleetState, now: float, reason: str) -> Stop:
    return Stop(replica=replica.name, deadline=now + _timeouts(replica, state).stop_timeout, reason=reason)


def _timeouts(replica: Replica, state: FleetState) -> RoleSpec:
    """Those of the manifest count for processes of earlier ones, too."""
    wanted = None if state.spec is None else state.spec.role(replica.role)
    return wanted or state.spec_of(replica) or RoleSpec(role=replica.role, replicas=0)


def _role(spec: RoleSpec, state: FleetState, now: float, taken: set[str]) -> list[Action]:
    there = state.of_role(spec.role)
    staying = [replica for replica in there if not replica.leaving]
    current = [replica for replica in staying if replica.revision == spec.revision]
    leave = _who_leaves(spec, staying)
    actions: list[Action] = [
        _let_go(spec, state, replica, now, reason) for replica, reason in leave if replica.name not in taken
    ]
    gone = {replica.name for replica, _ in leave} | taken
    most = spec.replicas + spec.surge
    newest_first = sorted(staying, key=lambda replica: replica.revision != spec.revision)
    again = _again([replica for replica in newest_first if replica.name not in gone], state, now)
    actions += again[: max(0, most - sum(replica.has_process for replica in there))]
    asked_to_go = sum(replica.drain_asked for replica in current)
    missing = spec.replicas - (len(current) - asked_to_go)
    names = _free_names(spec, state, min(missing, most - len(there)))
    return actions + [Start(replica=name, role=spec) for name in names]


def _again(replicas: list[Replica], state: FleetState, now: float) -> list[Action]:
    """Starts of those whose back-off is over, each as it was started before."""
    starts: list[Action] = []
    for replica in replicas:
        wait = replica.not_before - now
        spec = state.spec_of(replica)
        # No wait is longer than the longest: the clock was set back.
        if replica.phase == "backoff" and spec is not None and not 0 < wait <= LONGEST_BACKOFF:
            starts.append(Start(replica=replica.name, role=spec))
    return starts


def _who_leaves(spec: RoleSpec, staying: list[Replica]) -> list[tuple[Replica, str]]:
    """Of those that would stay: which are superfluous, outdated or asked to go, and can be spared now."""
    current = [replica for replica in staying if replica.revision == spec.revision and not replica.drain_asked]
    outdated = [replica for replica in staying if replica.revision != spec.revision and not replica.drain_asked]
    surplus = sorted(current, key=lambda replica: (replica.phase == "ready", -_number(replica.name)))
    surplus = surplus[: max(0, len(current) - spec.replicas)]
    candidates = [(replica, "asked for") for replica in staying if replica.drain_asked]
    candidates += [(replica, "scaled down") for replica in surplus]
    candidates += [(replica, "replaced by a newer one") for replica in outdated]
    ready = sum(replica.phase == "ready" for replica in staying)
    may_recover = [replica for replica in outdated if replica.phase != "ready"]
    can_be_spared = ready - (spec.replicas - spec.unavailable)
    # One that fails for a moment is as good as a ready one soon. As a Deployment does it: of those that are ready, and
    # old ones that may be again, as many stay as have to be ready. So the old ones are seen to if the new ones never
    # get ready, and never stand in the way of new ones that do.
    can_be_given_up = can_be_spared + len(may_recover)
    leave = []
    for replica, reason in candidates:
        if replica.phase == "ready":
            if can_be_spared <= 0:
                continue
            can_be_spared -= 1
            can_be_given_up -= 1
        elif replica in may_recover:
            if can_be_given_up <= 0:
                continue
            can_be_given_up -= 1
        leave.append((replica, reason))  # others that are not ready are of no use to anyone
    return leave


def _let_go(spec: RoleSpec, state: FleetState, replica: Replica, now: float, reason: str) -> Action:
    """Drained if it may have requests; a gateway's stop is its draining."""
    if spec.role == GATEWAY or replica.phase not in ("ready", "unready"):
        return _stop(replica, state, now, reason)
    timeout = spec.drain_timeout if replica.drain_timeout is None else replica.drain_timeout
    return Drain(replica=replica.name, deadline=now + timeout, reason=reason)


def _free_names(spec: RoleSpec, state: FleetState, count: int) -> list[str]:
    assert state.spec is not None
    infix = "" if spec.role == "both" else f"{spec.role}-"
    names: list[str] = []
    number = 0
    while len(names) < count:
        name = f"{state.spec.name}-{infix}{number}"
        if name not in state.replicas:
            names.append(name)
        number += 1
    return names


def _number(name: str) -> int:
    return int(name.rpartition("-")[2])
