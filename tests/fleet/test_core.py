"""Events to state to plan: from literals, and against invariants over random histories."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from quire.fleet import events as e
from quire.fleet.apply import LONGEST_BACKOFF, apply, backoff, replay
from quire.fleet.plan import Drain, Kill, Start, Stop, plan
from quire.fleet.spec import GATEWAY, RoleSpec, ServiceSpec
from quire.fleet.state import FleetState


def service(replicas=2, arguments=("a",), **role) -> ServiceSpec:
    return ServiceSpec(
        name="svc",
        model_name="m",
        roles=(RoleSpec(role="both", replicas=replicas, arguments=arguments, **role),),
    )


def running(spec: ServiceSpec, *names: str) -> FleetState:
    """`spec`, with ready replicas of these names."""
    state = apply(FleetState(), e.ManifestApplied(at=0, spec=spec))
    role = spec.roles[0]
    for port, name in enumerate(names, 1):
        start = e.StartDecided(at=0, replica=name, role=role.role, revision=role.revision, port=port)
        state = replay(state, [start, e.BecameReady(at=0, replica=name)])
    return state


# --- literals -----------------------------------------------------------------------------------------------


def test_a_new_service_is_started():
    state = apply(FleetState(), e.ManifestApplied(at=0, spec=service(2)))
    assert [(type(action), action.replica) for action in plan(state, 0)] == [(Start, "svc-0"), (Start, "svc-1")]


def test_what_is_as_asked_for_needs_nothing():
    state = running(service(2), "svc-0", "svc-1")
    assert plan(state, 1e9) == []
    assert state.settled


def test_scaling_down_drains_the_youngest():
    state = apply(running(service(3), "svc-0", "svc-1", "svc-2"), e.RoleScaled(at=1, role="both", replicas=1))
    assert plan(state, 1) == [
        Drain(replica="svc-2", deadline=301.0, reason="scaled down"),
        Drain(replica="svc-1", deadline=301.0, reason="scaled down"),
    ]


def test_a_draining_replica_is_stopped_when_idle_or_at_its_deadline_and_killed_if_it_stays():
    state = running(service(1), "svc-0", "svc-1")
    state = apply(state, e.DrainDecided(at=1, replica="svc-1", deadline=11, reason="r"))
    assert plan(state, 10.9) == []
    assert plan(state, 11) == [Stop(replica="svc-1", deadline=51, reason="the deadline for draining has passed")]
    idle = apply(state, e.BecameIdle(at=2, replica="svc-1"))
    assert plan(idle, 2) == [Stop(replica="svc-1", deadline=42, reason="idle")]
    stopping = apply(idle, e.StopDecided(at=2, replica="svc-1", deadline=42, reason="idle"))
    assert plan(stopping, 41) == []
    assert plan(stopping, 42) == [Kill(replica="svc-1", reason="It did not stop in time.")]
    gone = apply(stopping, e.ProcessExited(at=3, replica="svc-1", returncode=0))
    assert list(gone.replicas) == ["svc-0"]
    assert gone.settled


def test_a_rollout_starts_a_new_one_before_it_drains_an_old_one():
    old = running(service(2, max_surge=1, max_unavailable=0), "svc-0", "svc-1")
    new = service(2, arguments=("b",), max_surge=1, max_unavailable=0)
    state = apply(old, e.ManifestApplied(at=1, spec=new))
    (start,) = plan(state, 1)
    assert (start.replica, start.role.arguments) == ("svc-2", ("b",))
    started = e.StartDecided(at=1, replica="svc-2", role="both", revision=new.roles[0].revision, port=3)
    state = apply(state, started)
    assert plan(state, 2) == []  # it is not ready yet
    state = apply(state, e.BecameReady(at=2, replica="svc-2"))
    assert [(type(action), action.replica) for action in plan(state, 2)] == [(Drain, "svc-0")]


def test_without_surge_a_rollout_takes_one_away_first():
    old = running(service(2, max_surge=0, max_unavailable=1), "svc-0", "svc-1")
    state = apply(old, e.ManifestApplied(at=1, spec=service(2, ("b",), max_surge=0, max_unavailable=1)))
    assert [(type(action), action.replica) for action in plan(state, 1)] == [(Drain, "svc-0")]


@pytest.mark.parametrize("change", [{"labels": {"a": "b"}}, {"max_surge": 3}, {"drain_timeout": 1.0}])
def test_what_needs_no_restart_restarts_nothing(change):
    state = apply(running(service(2), "svc-0", "svc-1"), e.ManifestApplied(at=1, spec=service(2, **change)))
    assert plan(state, 1) == []


def test_a_gateways_policy_is_read_again_and_its_picker_needs_a_restart():
    objective, picker = {"kind": "InferenceObjective"}, {"kind": "EndpointPickerConfig"}
    roles = [RoleSpec(role=GATEWAY, replicas=1, documents=docs) for docs in ((), (objective,), (picker,))]
    assert roles[0].revision == roles[1].revision != roles[2].revision


def test_an_operators_drain_brings_the_next_one_up_first():
    state = apply(running(service(1), "svc-0"), e.DrainRequested(at=1, replica="svc-0", timeout=5))
    assert [(type(action), action.replica) for action in plan(state, 1)] == [(Start, "svc-1")]
    role = state.spec.roles[0]
    start = e.StartDecided(at=1, replica="svc-1", role="both", revision=role.revision, port=9)
    state = replay(state, [start, e.BecameReady(at=2, replica="svc-1")])
    assert plan(state, 2) == [Drain(replica="svc-0", deadline=7, reason="asked for")]


def test_the_gateway_goes_down_before_the_engines():
    gateway = RoleSpec(role=GATEWAY, replicas=1, port=8000)
    spec = msgspec.structs.replace(service(1), roles=(*service(1).roles, gateway))
    state = running(spec, "svc-0")
    start = e.StartDecided(at=0, replica="svc-gateway-0", role=GATEWAY, revision=gateway.revision, port=8000)
    state = replay(state, [start, e.BecameReady(at=0, replica="svc-gateway-0"), e.DownRequested(at=1)])
    assert [action.replica for action in plan(state, 1)] == ["svc-gateway-0"]
    state = apply(state, e.StopDecided(at=1, replica="svc-gateway-0", deadline=9, reason="down"))
    assert plan(state, 1) == []
    state = apply(state, e.ProcessExited(at=2, replica="svc-gateway-0", returncode=0))
    assert plan(state, 2) == [Stop(replica="svc-0", deadline=42, reason="down")]
    at_once = apply(state, e.DownRequested(at=3, at_once=True))
    assert plan(at_once, 3) == [Kill(replica="svc-0", reason="Told to stop at once.")]


def test_a_crash_loop_is_told_with_the_childs_last_error_and_waits_longer_each_time():
    state, now, waits = running(service(1), "svc-0"), 100.0, []
    for _ in range(12):
        state = apply(state, e.ProcessExited(at=now, replica="svc-0", returncode=1, error="quire: no memory"))
        replica = state.replicas["svc-0"]
        waits.append(replica.not_before - now)
        assert plan(state, replica.not_before - 0.01) == []
        (start,) = plan(state, replica.not_before)
        assert start.replica == "svc-0"
        now = replica.not_before
        state = apply(state, e.StartDecided(at=now, replica="svc-0", role="both", revision=replica.revision, port=1))
    assert waits == sorted(waits)
    assert waits[0] < waits[5] <= waits[-1] == LONGEST_BACKOFF
    replica = state.replicas["svc-0"]
    assert replica.in_crash_loop
    assert replica.last_error == "quire: no memory"


def test_one_that_was_up_for_long_fails_for_the_first_time_again():
    state = running(service(1), "svc-0")
    for _ in range(5):
        state = apply(state, e.ProcessExited(at=1, replica="svc-0", returncode=1))
        state = apply(state, e.StartDecided(at=1, replica="svc-0", role="both", revision="r", port=1))
    state = apply(state, e.BecameReady(at=2, replica="svc-0"))
    state = apply(state, e.ProcessExited(at=1000, replica="svc-0", returncode=1))
    assert state.replicas["svc-0"].failures == 1


def test_one_that_never_gets_ready_or_stays_unready_is_killed():
    spec = service(1, start_timeout=10.0)
    state = apply(FleetState(), e.ManifestApplied(at=0, spec=spec))
    revision = spec.roles[0].revision
    state = apply(state, e.StartDecided(at=0, replica="svc-0", role="both", revision=revision, port=1))
    assert plan(state, 10) == []
    assert isinstance(plan(state, 10.1)[0], Kill)
    state = replay(state, [e.BecameReady(at=5, replica="svc-0"), e.BecameUnready(at=6, replica="svc-0", reason="no")])
    assert plan(state, 66) == []
    (kill,) = plan(state, 66.1)
    assert kill.reason.endswith("no")
    killed = apply(state, e.KillDecided(at=67, replica="svc-0", reason=kill.reason))
    assert plan(killed, 68) == []
    assert apply(killed, e.ProcessExited(at=68, replica="svc-0", returncode=-9)).replicas["svc-0"].last_error == (
        kill.reason
    )


def test_one_over_its_limit_is_killed_and_started_again():
    state = apply(running(service(1), "svc-0"), e.WentOverLimit(at=1, replica="svc-0", reason="too much"))
    assert plan(state, 1) == [Kill(replica="svc-0", reason="too much")]
    state = apply(state, e.KillDecided(at=1, replica="svc-0", reason="too much"))
    assert plan(state, 1) == []
    state = apply(state, e.ProcessExited(at=2, replica="svc-0", returncode=-9))
    assert [type(action) for action in plan(state, 3)] == [Start]
    assert state.replicas["svc-0"].last_error == "too much"


@pytest.mark.parametrize(
    ("replicas", "surge", "unavailable", "expected"),
    [(2, "25%", "25%", (1, 0)), (8, "25%", "25%", (2, 2)), (3, 0, 0, (0, 1)), (4, "50%", 0, (2, 0)), (0, 0, 0, (0, 1))],
)
def test_surge_is_rounded_up_and_unavailable_down(replicas, surge, unavailable, expected):
    role = RoleSpec(role="both", replicas=replicas, max_surge=surge, max_unavailable=unavailable)
    assert (role.surge, role.unavailable) == expected


# --- random histories ---------------------------------------------------------------------------------------


class Fleet(RuleBasedStateMachine):
    """A world of processes that crash, get ready, finish and hang as they like, with the real core in charge of it."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 1000.0
        self.state = FleetState()
        self.processes: dict[str, dict] = {}  # name → requests, asked to stop
        self.ports = 0
        self.asked_to_go: set[str] = set()
        self.failures: dict[str, int] = {}

    def tell(self, event: e.Event) -> None:
        self.state = apply(self.state, event)
        encoded = msgspec.json.encode(self.state)
        assert msgspec.json.decode(encoded, type=FleetState) == self.state

    def act(self) -> None:
        """Carry out the plan until it is empty, checking each step."""
        for _ in range(100):
            actions = plan(self.state, self.now)
            if not actions:
                return
            assert len({action.replica for action in actions}) == len(actions), "two actions for one replica"
            for action in actions:
                getattr(self, type(action).__name__.lower())(action)
        raise AssertionError("the plan does not come to rest")

    def start(self, action: Start) -> None:
        spec = self.role
        assert action.replica not in self.processes
        replica = self.state.replicas.get(action.replica)
        if replica is not None:
            assert self.now >= replica.not_before, "restarted before its back-off was over"
        self.ports += 1
        self.tell(
            e.StartDecided(
                at=self.now, replica=action.replica, role="both", revision=action.role.revision, port=self.ports
            )
        )
        self.processes[action.replica] = {"requests": 0, "asked": False}
        assert len(self.processes) <= spec.replicas + spec.surge, "more processes than replicas + maxSurge"

    def drain(self, action: Drain) -> None:
        ready = self.ready - (self.state.replicas[action.replica].phase == "ready")
        assert ready >= min(self.role.replicas - self.role.unavailable, self.ready), "fewer ready than allowed"
        self.tell(e.DrainDecided(at=self.now, replica=action.replica, deadline=action.deadline, reason=action.reason))

    def stop(self, action: Stop) -> None:
        replica = self.state.replicas[action.replica]
        if replica.phase == "draining" and not self.state.down:
            busy = self.processes[action.replica]["requests"] > 0
            assert not busy or self.now >= replica.deadline, "stopped with requests before its deadline"
        elif not self.state.down:
            assert replica.phase != "ready", "stopped without draining"
        self.tell(e.StopDecided(at=self.now, replica=action.replica, deadline=action.deadline, reason=action.reason))
        if action.replica in self.processes:
            self.processes[action.replica]["asked"] = True

    def kill(self, action: Kill) -> None:
        self.tell(e.KillDecided(at=self.now, replica=action.replica, reason=action.reason))
        if action.replica in self.processes:
            self.end(action.replica, -9)

    def end(self, name: str, returncode: int) -> None:
        before = self.state.replicas[name]
        del self.processes[name]
        self.tell(e.ProcessExited(at=self.now, replica=name, returncode=returncode, error="last words"))
        after = self.state.replicas.get(name)
        if after is not None:
            assert after.not_before >= self.now + backoff(1)
            if before.ready_since is None:
                assert after.failures == before.failures + 1
            assert after.last_error is not None

    @property
    def role(self) -> RoleSpec:
        return self.state.spec.roles[0]

    @property
    def ready(self) -> int:
        return sum(replica.phase == "ready" for replica in self.state.replicas.values())

    specs = st.builds(
        service,
        replicas=st.integers(0, 4),
        arguments=st.sampled_from([("a",), ("b",), ("c",)]),
        max_surge=st.sampled_from([0, 1, 2, "25%", "100%"]),
        max_unavailable=st.sampled_from([0, 1, "50%"]),
        drain_timeout=st.sampled_from([0.0, 5.0, 100.0]),
        start_timeout=st.just(50.0),
    )

    @initialize(spec=specs)
    def begin(self, spec):
        self.tell(e.ManifestApplied(at=self.now, spec=spec))
        self.act()

    @rule(spec=specs)
    def apply_manifest(self, spec):
        self.tell(e.ManifestApplied(at=self.now, spec=spec))
        self.act()

    @rule(replicas=st.integers(0, 4))
    def scale(self, replicas):
        self.tell(e.RoleScaled(at=self.now, role="both", replicas=replicas))
        self.act()

    @rule(seconds=st.sampled_from([0.1, 1.0, 7.0, 70.0]))
    def time_passes(self, seconds):
        self.now += seconds
        self.act()

    def some(self, data, phases):
        names = sorted(name for name in self.processes if self.state.replicas[name].phase in phases)
        return data.draw(st.sampled_from(names)) if names else None

    @rule(data=st.data())
    def becomes_ready(self, data):
        name = self.some(data, ("starting", "unready"))
        if name is not None:
            self.tell(e.BecameReady(at=self.now, replica=name))
            self.act()

    @rule(data=st.data())
    def becomes_unready(self, data):
        name = self.some(data, ("ready",))
        if name is not None:
            self.tell(e.BecameUnready(at=self.now, replica=name, reason="silent"))
            self.act()

    @rule(data=st.data(), requests=st.integers(0, 2))
    def requests_come_and_go(self, data, requests):
        name = self.some(data, ("ready", "draining"))
        if name is not None:
            draining = self.state.replicas[name].phase == "draining"
            now = self.processes[name]["requests"]
            self.processes[name]["requests"] = min(requests, now) if draining else requests
            if draining and self.processes[name]["requests"] == 0:
                self.tell(e.BecameIdle(at=self.now, replica=name))
            self.act()

    @rule(data=st.data())
    def crashes(self, data):
        name = self.some(data, ("starting", "ready", "unready", "draining"))
        if name is not None:
            self.end(name, 1)
            self.act()

    @rule(data=st.data())
    def obeys(self, data):
        name = self.some(data, ("stopping",))
        if name is not None:
            self.end(name, 0)
            self.act()

    @rule(data=st.data())
    def operator_drains(self, data):
        names = sorted(self.state.replicas)
        if names:
            self.tell(e.DrainRequested(at=self.now, replica=data.draw(st.sampled_from(names)), timeout=None))
            self.act()

    @rule(at_once=st.booleans())
    def down(self, at_once):
        self.tell(e.DownRequested(at=self.now, at_once=at_once))
        self.act()
        if at_once:
            assert not self.processes

    @rule()
    def things_calm_down(self):
        """Everything that starts gets ready, everything that is asked to stop does: then what runs is as asked for."""
        for _ in range(200):
            self.act()
            for name in sorted(self.processes):
                phase = self.state.replicas[name].phase
                self.processes[name]["requests"] = 0
                if phase in ("starting", "unready"):
                    self.tell(e.BecameReady(at=self.now, replica=name))
                elif phase == "draining":
                    self.tell(e.BecameIdle(at=self.now, replica=name))
                elif phase == "stopping":
                    self.end(name, 0)
            self.act()
            if self.state.settled:
                break
            self.now += 1.0
        assert self.state.settled
        assert self.state.down or len(self.processes) == self.role.replicas
        assert not self.state.down or not self.processes

    @precondition(lambda self: self.state.spec is not None)
    @invariant()
    def the_state_knows_every_process(self):
        with_process = {name for name, replica in self.state.replicas.items() if replica.has_process}
        assert with_process == set(self.processes)


TestFleet = Fleet.TestCase
TestFleet.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
