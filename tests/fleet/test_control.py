"""The control plane against real files, with processes that are real or stand still."""

from __future__ import annotations

import asyncio
import functools
import itertools
import os
import sqlite3
import sys

import pytest

from quire.core.errors import StorageFull
from quire.fleet import events as e
from quire.fleet.control import ControlPlane
from quire.fleet.directory import ServiceDirectory
from quire.fleet.journal import Journal
from quire.fleet.processes import Processes
from quire.fleet.provider import Found, Launch
from quire.fleet.spec import RoleSpec, ServiceSpec
from quire.fleet.state import FleetState

ROLE = RoleSpec(role="both", replicas=1, arguments=("quire-tiny",))
SPEC = ServiceSpec(name="svc", model_name="m", roles=(ROLE,))
STARTED = e.StartDecided(at=2.0, replica="svc-0", role="both", revision=ROLE.revision, port=1)
SLEEP = (sys.executable, "-c", "import time; time.sleep(300)")
DEADLINE = 30.0


class StandStill:
    """A provider whose processes do nothing until they are told to end."""

    def __init__(self) -> None:
        self.found: dict[str, Found] = {}

    def free_port(self, taken: frozenset[int]) -> int:
        return next(port for port in range(1, 100) if port not in taken)

    def start(self, launch: Launch) -> None:
        self.found[launch.replica] = Found(replica=launch.replica, start=launch.start, running=True, pid=1)

    def stop(self, replica: str) -> None:
        self.kill(replica)

    def kill(self, replica: str) -> None:
        self.found[replica] = Found(replica=replica, start=self.found[replica].start, running=False, returncode=0)

    def processes(self) -> dict[str, Found]:
        return dict(self.found)

    def forget(self, replica: str) -> None:
        del self.found[replica]

    def memory(self, replica: str) -> int:
        return 0

    def logs(self, replica: str) -> list:
        return []


@pytest.fixture
def directory(tmp_path) -> ServiceDirectory:
    directory = ServiceDirectory(tmp_path, "svc")
    directory.make()
    return directory


def work(control: ControlPlane, until) -> FleetState:
    asyncio.run(asyncio.wait_for(control.run(until), DEADLINE))
    return control.state


@pytest.mark.parametrize("decided", [e.KillDecided, e.StopDecided])
def test_what_was_decided_and_not_sent_is_sent_by_the_next_control_plane(directory, is_alive, wait_for, decided):
    """The one before died after it had written a stop or a kill down, and before the signal."""
    provider = Processes(directory.path)
    provider.start(Launch(replica="svc-0", start=1, command=SLEEP, environment=dict(os.environ)))
    pid = wait_for(lambda: provider.processes()["svc-0"].pid, "the child's number")
    more = {} if decided is e.KillDecided else {"deadline": 1e12}  # a deadline would end it, too, some day
    with Journal(directory.database) as journal:
        journal.append(
            e.ManifestApplied(at=1.0, spec=SPEC), STARTED, decided(at=3.0, replica="svc-0", reason="r", **more)
        )

    def is_over(state: FleetState) -> bool:
        return "svc-0" not in state.replicas or not state.replicas["svc-0"].has_process

    work(ControlPlane(directory, Processes(directory.path), environ=os.environ), is_over)
    wait_for(lambda: not is_alive(pid), "the child to be gone")


# --- a disk that is full ------------------------------------------------------------------------------------


def test_on_a_full_disk_the_journal_can_be_read_and_says_what_to_do(directory, disk):
    with Journal(directory.database) as journal:
        journal.append(e.ManifestApplied(at=1.0, spec=SPEC), STARTED)
    disk.fill(directory.database)
    with Journal(directory.database) as journal:
        assert journal.load()[1].spec == SPEC
        with pytest.raises(StorageFull, match="Free space on"):
            journal.append(e.DownRequested(at=5.0))
        assert not journal.load()[1].down
        disk.free()
        journal.append(e.DownRequested(at=5.0))
        assert journal.load()[1].down


class NoRoomToShare(sqlite3.Connection):
    """What SQLite says where the index that processes share cannot be made."""

    alone = False

    def execute(self, sql, *arguments):
        self.alone |= "EXCLUSIVE" in sql
        if "user_version" in sql and not self.alone:
            error = sqlite3.OperationalError("disk I/O error")
            error.sqlite_errorcode = sqlite3.SQLITE_IOERR_SHMSIZE
            raise error
        return super().execute(sql, *arguments)


def test_without_room_for_what_processes_share_a_journal_is_read_alone(directory, monkeypatch):
    with Journal(directory.database) as journal:
        journal.append(e.ManifestApplied(at=1.0, spec=SPEC))
    connect = functools.partial(sqlite3.connect, factory=NoRoomToShare)
    monkeypatch.setattr("quire.fleet.journal.sqlite3.connect", connect)
    with pytest.raises(StorageFull):
        Journal(directory.database)
    with Journal(directory.database, alone=True) as journal:
        assert journal.load()[1].spec == SPEC


def test_opening_a_journal_that_is_there_writes_nothing(directory):
    with Journal(directory.database):
        log = directory.path / "fleet.db-wal"
        before = log.read_bytes()
        Journal(directory.database).close()
        assert before
        assert log.read_bytes() == before


def test_on_a_full_disk_what_runs_is_stopped_and_written_down_once_there_is_room(directory, disk, capsys):
    with Journal(directory.database) as journal:
        journal.append(e.ManifestApplied(at=1.0, spec=SPEC))
    provider, seen = StandStill(), []
    control = ControlPlane(directory, provider, environ={}, on_event=lambda event, state: seen.append(event))

    def until(state: FleetState) -> bool:
        if provider.found and not disk.full and not state.down:
            disk.fill(directory.database)
            control.record(e.DownRequested(at=5.0))
        if state.down and not state.replicas and disk.full:
            with Journal(directory.database) as journal:
                assert not journal.load()[1].down
            disk.free()
            return False
        return state.down and not state.replicas

    assert not work(control, until).replicas
    assert [type(event) for event in seen].count(e.DownRequested) == 1
    with Journal(directory.database) as journal:
        assert journal.load()[1] == control.state
    assert capsys.readouterr().out.count("the journal cannot be written") == 1


def test_a_process_whose_start_was_never_written_down_goes_before_its_place_is_filled_again(directory):
    """The control plane died while the disk was full: its journal tells of the first start, and the second one runs."""
    with Journal(directory.database) as journal:
        journal.append(e.ManifestApplied(at=1.0, spec=SPEC), STARTED)
    provider = StandStill()
    provider.found["svc-0"] = Found(replica="svc-0", start=2, running=True, pid=77)
    killed, killing = [], provider.kill

    def kill(replica: str) -> None:
        killed.append(provider.found[replica].pid)
        killing(replica)

    provider.kill = kill
    clock = itertools.count(3.0, 0.1).__next__
    control = ControlPlane(directory, provider, environ={}, clock=clock)
    work(control, lambda state: state.replicas["svc-0"].starts == 2)
    assert killed == [77]
    assert provider.found["svc-0"].pid == 1
