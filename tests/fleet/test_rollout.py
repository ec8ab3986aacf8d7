"""What a rollout takes away, and what it sees to until then."""

from __future__ import annotations

import pytest

from quire.fleet import events as e
from quire.fleet.apply import LONGEST_BACKOFF, apply, replay
from quire.fleet.plan import Drain, Start, Stop, plan
from quire.fleet.spec import RoleSpec, ServiceSpec
from quire.fleet.state import FleetState


def spec(*roles: RoleSpec) -> ServiceSpec:
    return ServiceSpec(name="svc", model_name="m", roles=roles)


def role(name="both", arguments=("a",), replicas=2, surge=1, unavailable=0) -> RoleSpec:
    return RoleSpec(role=name, replicas=replicas, arguments=arguments, max_surge=surge, max_unavailable=unavailable)


def start(role: RoleSpec, replica: str, at: float = 0.0) -> e.StartDecided:
    return e.StartDecided(at=at, replica=replica, role=role.role, revision=role.revision, port=1)


def ready(state: FleetState, role: RoleSpec, *names: str) -> FleetState:
    for name in names:
        state = replay(state, [start(role, name), e.BecameReady(at=0, replica=name)])
    return state


def asked_for(state: FleetState, *roles: RoleSpec) -> FleetState:
    return apply(state, e.ManifestApplied(at=1, spec=spec(*roles)))


def told(state: FleetState, now: float = 10.0) -> list[tuple[type, str]]:
    return [(type(action), action.replica) for action in plan(state, now)]


OLD, NEW = role(), role(arguments=("b",))
RUNNING = ready(asked_for(FleetState(), OLD), OLD, "svc-0", "svc-1")


def unready(state: FleetState, *names: str) -> FleetState:
    return replay(state, [e.BecameUnready(at=1, replica=name, reason="slow") for name in names])


def crashed(state: FleetState, name: str, at: float = 1.0) -> FleetState:
    return apply(state, e.ProcessExited(at=at, replica=name, returncode=1))


# --- replicas that fail for a moment ------------------------------------------------------------------------


def test_a_rollout_spares_old_ones_that_fail_for_a_moment():
    state = asked_for(unready(RUNNING, "svc-0", "svc-1"), NEW)
    assert told(state) == [(Start, "svc-2")]
    state = apply(state, start(NEW, "svc-2"))
    assert told(state) == []
    healed = replay(state, [e.BecameReady(at=2, replica=name) for name in ("svc-0", "svc-1")])
    assert told(healed) == []


def test_of_two_old_ones_the_one_that_fails_goes_first():
    state = asked_for(unready(RUNNING, "svc-1"), NEW)
    state = ready(state, NEW, "svc-2")
    assert told(state) == [(Drain, "svc-1")]


def test_the_cure_of_a_crash_loop_is_not_held_up_by_what_crashes():
    """Old ones that never get ready make room, one for each new one, also where there is no surge."""
    for surge, unavailable in ((1, 0), (0, 1)):
        old, new = (role(arguments=(a,), surge=surge, unavailable=unavailable) for a in "ab")
        state = ready(asked_for(FleetState(), old), old, "svc-0", "svc-1")
        state = asked_for(crashed(crashed(state, "svc-0"), "svc-1"), new)
        for now in range(100, 120):
            for action in plan(state, now):
                match action:
                    case Start(role=RoleSpec() as given) if given.revision == new.revision:
                        state = ready(state, new, action.replica)
                    case Start(role=given):
                        state = crashed(apply(state, start(given, action.replica, now)), action.replica, now)
                    case Stop():
                        state = apply(state, e.StopDecided(at=now, replica=action.replica, deadline=1e9, reason="r"))
                        state = crashed(state, action.replica, now)
        assert state.settled, (surge, unavailable)
        assert state.kept == {}


# --- what is not asked for any more, and still needed -------------------------------------------------------


def test_in_a_rollout_that_is_stuck_an_old_one_that_crashes_is_started_again_as_it_was():
    state = asked_for(RUNNING, NEW)
    state = crashed(apply(state, start(NEW, "svc-2")), "svc-2")
    state = crashed(state, "svc-1")
    starts = {action.replica: action.role for action in plan(state, 10) if isinstance(action, Start)}
    assert starts == {"svc-1": OLD, "svc-2": NEW}
    assert len(plan(state, 10)) == 2
    state = replay(state, [start(OLD, "svc-1", 10), start(NEW, "svc-2", 10)])
    assert told(state, 11) == []  # the old one that starts is not taken away again
    state = apply(state, e.BecameReady(at=12, replica="svc-1"))
    assert told(state, 12) == []
    assert state.spec_of(state.replicas["svc-1"]) == OLD


def test_old_specs_are_forgotten_with_their_last_process():
    newest = role(arguments=("c",))
    state = asked_for(asked_for(RUNNING, NEW), newest)
    assert set(state.kept) == {OLD.revision}  # nothing was started from the one between
    for name in ("svc-0", "svc-1"):
        assert set(state.kept) == {OLD.revision}
        state = crashed(apply(state, e.StopDecided(at=1, replica=name, deadline=9, reason="r")), name)
    assert state.kept == {}
    assert asked_for(asked_for(RUNNING, NEW), OLD).kept == {}


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ((role(),), (role("decode"), role("prefill", replicas=1))),
        ((role("decode"), role("prefill", replicas=1)), (role(),)),
    ],
    ids=["prefill comes", "prefill goes"],
)
def test_engines_of_roles_that_are_gone_stay_until_the_new_ones_are_ready(before, after):
    state = asked_for(FleetState(), *before)
    old = [f"old-{one.role}-{number}" for one in before for number in range(one.replicas)]
    for one in before:
        state = ready(state, one, *(name for name in old if f"-{one.role}-" in name))
    state = asked_for(state, *after)
    while len([name for name in state.replicas if name not in old]) < sum(one.replicas for one in after):
        actions = plan(state, 10)
        assert actions
        assert all(isinstance(action, Start) for action in actions)
        for action in actions:
            state = apply(state, start(action.role, action.replica))
    state = crashed(state, old[0])
    assert [(type(action), action.role.role) for action in plan(state, 10)] == [(Start, before[0].role)]
    state = apply(state, start(before[0], old[0]))
    new = [name for name in state.replicas if name not in old]
    for name in new:
        assert told(state) == []
        state = apply(state, e.BecameReady(at=2, replica=name))
    assert {name for _, name in told(state)} == set(old)


def test_a_role_that_is_gone_goes_at_once_if_nothing_is_to_take_its_place():
    state = ready(asked_for(FleetState(), role(), role("prefill")), role(), "svc-0", "svc-1")
    state = asked_for(ready(state, role("prefill"), "svc-prefill-0"), role())
    assert told(state) == [(Drain, "svc-prefill-0")]


# --- clocks -------------------------------------------------------------------------------------------------


def test_a_clock_that_was_set_back_delays_no_start():
    state = crashed(RUNNING, "svc-0", at=1e6)
    assert told(state, 1e6) == []
    assert told(state, 1e6 - LONGEST_BACKOFF - 1) == [(Start, "svc-0")]
