"""What is on disk: the journal, the lock, the file of endpoints."""

from __future__ import annotations

import multiprocessing
import sqlite3
import stat

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quire.config.kv_events import read_kv_events
from quire.core.errors import ConfigError, NotFound
from quire.fleet import endpoints, kv_events, launch
from quire.fleet import events as e
from quire.fleet.apply import apply, replay
from quire.fleet.directory import ControlLock, ServiceDirectory, services, state_root
from quire.fleet.journal import KEPT_EVENTS, Journal
from quire.fleet.probe import in_flight
from quire.fleet.spec import GATEWAY, RoleSpec, ServiceSpec
from quire.fleet.state import FleetState
from quire.gateway.discovery import read_endpoints

SPEC = ServiceSpec(
    name="svc", model_name="m", roles=(RoleSpec(role="decode", replicas=2), RoleSpec(role="prefill", replicas=1))
)
HISTORY = [
    e.ManifestApplied(at=1.0, spec=SPEC),
    e.StartDecided(at=2.0, replica="svc-decode-0", role="decode", revision="r", port=5001, threads=2),
    e.StartDecided(at=2.0, replica="svc-decode-1", role="decode", revision="r", port=5002),
    e.StartDecided(at=2.0, replica="svc-prefill-0", role="prefill", revision="r", port=5003),
    e.ProcessStarted(at=2.5, replica="svc-decode-0", pid=77),
    e.BecameReady(at=3.0, replica="svc-decode-0"),
    e.BecameReady(at=3.0, replica="svc-decode-1"),
    e.DrainDecided(at=4.0, replica="svc-decode-1", deadline=9.0, reason="r"),
]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "fleet.db"


@given(cut=st.integers(0, len(HISTORY)), again=st.booleans())
@settings(max_examples=20, deadline=None)
def test_a_journal_gives_back_what_was_written(tmp_path_factory, cut, again):
    path = tmp_path_factory.mktemp("journal") / "fleet.db"
    with Journal(path) as journal:
        journal.append(*HISTORY[:cut])
        seq, state = journal.load()
        journal.compact(seq, state)
        journal.append(*HISTORY[cut:])
        if not again:
            assert journal.load() == (len(HISTORY), replay(FleetState(), HISTORY))
            return
    with Journal(path) as journal:
        assert journal.load() == (len(HISTORY), replay(FleetState(), HISTORY))
        assert [event for _, event in journal.after(cut)] == HISTORY[cut:]
        assert [event for _, event in journal.last(3)] == HISTORY[-3:]


def test_a_journal_stays_bounded(path):
    with Journal(path) as journal:
        for _ in range(3):
            journal.append(*[e.BecameIdle(at=1.0, replica="svc-0")] * KEPT_EVENTS)
            seq, state = journal.load()
            journal.compact(seq, state)
        assert len(journal.last(10 * KEPT_EVENTS)) == KEPT_EVENTS
        assert journal.load()[0] == 3 * KEPT_EVENTS
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def _write(path, count):
    with Journal(path) as journal:
        for _ in range(count):
            journal.append(e.DownRequested(at=1.0))


def test_several_processes_write_at_once(path):
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=_write, args=(path, 50)) for _ in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    with Journal(path) as journal:
        assert journal.load()[0] == 150


@pytest.mark.parametrize("content", [b"not a database, but long enough to be looked at" * 50, None])
def test_a_file_that_is_not_ours_is_refused_in_words(path, content):
    if content is None:
        with sqlite3.connect(path) as connection:
            connection.execute("PRAGMA user_version = 99")
        connection.close()
    else:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match="cannot be used"):
        Journal(path)


def test_an_event_of_another_version_is_told(path):
    with Journal(path) as journal:
        journal.append(HISTORY[0])
    with sqlite3.connect(path) as connection:
        connection.execute("INSERT INTO events (body) VALUES (?)", (b'{"type":"FromTheFuture","at":1}',))
    connection.close()
    with Journal(path) as journal, pytest.raises(ConfigError, match="FromTheFuture"):
        journal.load()


def test_what_is_written_is_the_owners_alone(tmp_path):
    directory = ServiceDirectory(tmp_path / "state", "svc")
    directory.path.mkdir(parents=True)  # as an earlier version left it
    directory.path.chmod(0o755)
    directory.make()
    file = launch.policy_file(directory.endpoints_file)
    file.with_name(file.name + ".part").touch(mode=0o644)
    launch.write_policy(file, RoleSpec(role=GATEWAY, replicas=1))
    endpoints.write(directory.endpoints_file, [])
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (directory.path, *directory.path.iterdir())}
    assert modes == {"svc": 0o700, "logs": 0o700, "policy.yaml": 0o600, "endpoints.yaml": 0o600}


def test_one_control_plane_holds_the_lock(tmp_path):
    directory = ServiceDirectory(tmp_path, "svc")
    directory.make()
    mine, other = ControlLock(directory), ControlLock(directory)
    assert other.holder() is None
    mine.acquire()
    assert other.holder() is not None
    with pytest.raises(ConfigError, match="runs already"):
        other.acquire()
    mine.release()
    assert other.holder() is None
    other.acquire()
    other.release()


def test_services_are_where_a_journal_is(tmp_path, monkeypatch):
    assert services(tmp_path / "none") == []
    directory = ServiceDirectory(tmp_path, "svc")
    with pytest.raises(NotFound):
        directory.check_exists()
    directory.make()
    assert services(tmp_path) == []
    Journal(directory.database).close()
    assert services(tmp_path) == ["svc"]
    monkeypatch.setenv("XDG_STATE_HOME", "/x")
    assert str(state_root(None)) == "/x/quire"
    assert str(state_root("/y")) == "/y"


@pytest.mark.parametrize("name", ["", "A", "a_b", "../x", "a/b", "-a", "a-", "x" * 51, "a\n"])
def test_a_name_that_is_no_name_is_refused(tmp_path, name):
    with pytest.raises(ConfigError):
        ServiceDirectory(tmp_path, name)


def test_the_gateway_reads_the_endpoints_that_are_written(tmp_path):
    state = replay(FleetState(), HISTORY)
    file = tmp_path / "endpoints.yaml"
    endpoints.write(file, endpoints.endpoints(state))
    found = read_endpoints(file)
    assert [(item.name, item.address, item.draining) for item in found] == [
        ("svc-decode-0", "127.0.0.1:5001", False),
        ("svc-decode-1", "127.0.0.1:5002", True),
    ]
    assert found[0].labels["llm-d.ai/role"] == "decode"
    gone = apply(state, e.ProcessExited(at=5.0, replica="svc-decode-1"))
    endpoints.write(file, endpoints.endpoints(gone))
    assert [item.name for item in read_endpoints(file)] == ["svc-decode-0"]
    assert [path.name for path in tmp_path.iterdir()] == ["endpoints.yaml"]


def test_requests_in_flight_are_read_off_the_metrics():
    page = """# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="m"} 3.0
# TYPE vllm:num_requests_waiting gauge
vllm:num_requests_waiting{engine="0",model_name="m"} 2.0
# TYPE other counter
other_total 9.0
"""
    assert in_flight(page) == 5
    assert in_flight("# TYPE other counter\nother_total 9.0\n") is None


def test_engines_share_the_cores_and_the_memory(tmp_path):
    role = RoleSpec(role="both", replicas=3, arguments=("m",))
    assert launch.threads_for(role, 3, 8, {}) == 2
    assert launch.threads_for(role, 9, 8, {}) == 1
    assert launch.threads_for(RoleSpec(role="both", replicas=1, cpu=3.6), 3, 8, {}) == 4
    assert launch.threads_for(RoleSpec(role="both", replicas=1, arguments=("--threads=5",)), 3, 8, {}) is None
    assert launch.threads_for(role, 3, 8, {"QUIRE_THREADS": "2"}) is None
    assert launch.threads_for(RoleSpec(role=GATEWAY, replicas=1), 3, 8, {}) is None
    replica = replay(FleetState(), HISTORY).replicas["svc-decode-0"]
    more = {"engines": 2, "endpoints_file": tmp_path / "e", "environ": {"A": "b"}, "free_ports": lambda: (7001, 7002)}
    made = launch.launch(replica, role, **more)
    assert made.command[3:] == (
        *("serve", "m", "--host", "127.0.0.1", "--port", "5001", "--threads", "2"),
        *("--memory-utilization", "0.2500"),
    )
    given = RoleSpec(role="both", replicas=3, arguments=("m", "--kv-cache-memory=1"), environment={"A": "c"})
    made = launch.launch(replica, given, **more)
    assert "--memory-utilization" not in made.command
    assert made.environment == {"A": "c"}
    secret = RoleSpec(role="both", replicas=3, arguments=("m", "--api-key=a=b", "--hf-token=t", "--seed=1"))
    made = launch.launch(replica, secret, **more)
    assert "--seed=1" in made.command
    assert not [word for word in made.command if "api-key" in word or "hf-token" in word or "a=b" in word]
    assert made.environment == {"A": "b", "QUIRE_API_KEY": "a=b", "QUIRE_HF_TOKEN": "t"}


def test_replicas_publish_kv_events_on_ports_of_their_own(tmp_path):
    plugins = [{"type": "precise-prefix-cache-producer"}]
    assert kv_events.needs_events([{"kind": "EndpointPickerConfig", "plugins": plugins}])
    assert not kv_events.needs_events([{"kind": "EndpointPickerConfig", "plugins": [{"type": "queue-scorer"}]}])
    assert not kv_events.needs_events([{"kind": "InferencePool", "plugins": plugins}])
    given = (
        '--kv-events-config={"enable_kv_cache_events": true, "endpoint": "tcp://*:5557", "topic": "kv@1@m", "hwm": 5}'
    )
    off = '--kv-events-config={"enable_kv_cache_events": false}'
    roles = [RoleSpec(role="both", replicas=2, arguments=("m", *more)) for more in ((), (given,), (off,))]
    made = kv_events.with_events(ServiceSpec(name="svc", model_name="m", roles=tuple(roles))).roles
    assert [kv_events.publishes(role.arguments) for role in made] == [True, True, False]
    assert made[1:] == tuple(roles[1:])
    (placed,) = kv_events.placed((given,), (7001, 7002))
    config = read_kv_events(placed.partition("=")[2])
    assert (config.endpoint, config.replay_endpoint) == ("tcp://127.0.0.1:7001", "tcp://127.0.0.1:7002")
    assert (config.binds, config.topic, config.hwm) == (True, None, 5)
    replica = replay(FleetState(), HISTORY).replicas["svc-decode-0"]
    command = launch.launch(
        replica,
        made[0],
        engines=1,
        endpoints_file=tmp_path / "e",
        environ={},
        free_ports=lambda: (7001, 7002),
    ).command
    assert any("tcp://127.0.0.1:7001" in argument for argument in command)


@pytest.mark.parametrize(
    ("arguments", "environment", "key"),
    [
        (("m",), {}, None),
        (("m", "--api-key=k"), {}, "k"),
        (("m", "--api-key=k"), {"QUIRE_API_KEY": "e"}, "k"),
        (("m",), {"QUIRE_API_KEY": "e"}, "e"),
    ],
)
def test_probes_know_the_engines_key(arguments, environment, key):
    role = RoleSpec(role="both", replicas=1, arguments=arguments, environment=environment)
    assert launch.api_key(role, {}) == key
