"""A service of real processes, worked by the real command line."""

from __future__ import annotations

import contextlib
import io
import json
import os
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from quire.cli.fleet import ps
from quire.fleet.events import BecameIdle

DEADLINE = 90.0


def wait_for(condition: Callable[[], Any], what: str, seconds: float = DEADLINE) -> Any:
    """The first truth that `condition` tells; fails after `seconds`, which only a broken program needs."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found = condition()
        if found:
            return found
        time.sleep(0.05)
    raise AssertionError(f"waited {seconds:g} s for {what}")


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


@pytest.fixture(name="wait_for", scope="session")
def _wait_for() -> Callable[..., Any]:
    return wait_for


@pytest.fixture(name="is_alive", scope="session")
def _is_alive() -> Callable[[int], bool]:
    return is_alive


class Cli:
    """`quire …` with a state directory of its own."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.environment = os.environ | {
            "QUIRE_STATE_DIR": str(directory / "state"),
            "QUIRE_KV_CACHE_MEMORY": "0.05",
            "QUIRE_LOG_LEVEL": "warning",
        }
        self.pids: set[int] = set()

    def popen(self, *arguments: str, **more: Any) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "quire", *arguments],
            env=self.environment,
            cwd=self.directory,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            **more,
        )

    def __call__(self, *arguments: str, code: int = 0) -> str:
        """What the command printed, stderr included."""
        process = self.popen(*arguments)
        output, _ = process.communicate(timeout=DEADLINE)
        assert process.returncode == code, f"{arguments}: {process.returncode}\n{output}"
        return output

    def services(self) -> list[dict[str, Any]]:
        """`quire ps --json`, without a process of its own for each of the many looks."""
        output = io.StringIO()
        with contextlib.redirect_stdout(output):
            ps(json=True, state_dir={"state_dir": self.environment["QUIRE_STATE_DIR"]})
        services = json.loads(output.getvalue())["services"]
        for service in services:
            self.pids |= {replica["pid"] for replica in service["replicas"] if replica["pid"]}
        return services

    def service(self) -> dict[str, Any]:
        (service,) = self.services()
        return service

    def engines(self) -> dict[str, dict[str, Any]]:
        return {replica["name"]: replica for replica in self.service()["replicas"] if replica["role"] != "gateway"}

    def settled(self) -> dict[str, Any]:
        def look() -> dict[str, Any] | None:
            service = self.service()
            return service if service["settled"] else None

        return wait_for(look, "the service to be as asked for")

    def stop(self) -> None:
        for service in self.services():
            if service["replicas"] or service["control_plane_pid"]:
                self("down", service["name"], "--now")
        wait_for(lambda: not any(map(is_alive, self.pids)), "all processes to be gone")


@pytest.fixture
def cli(tmp_path) -> Iterator[Cli]:
    cli = Cli(tmp_path)
    yield cli
    cli.stop()


@pytest.fixture(scope="module")
def module_cli(tmp_path_factory) -> Iterator[Cli]:
    cli = Cli(tmp_path_factory.mktemp("fleet"))
    yield cli
    cli.stop()


class FullDisk:
    """Connections of SQLite to a file that cannot grow, while `full`: what is at hand of a disk without room."""

    def __init__(self) -> None:
        self.full = False
        self._connections: list[sqlite3.Connection] = []
        self._connect = sqlite3.connect

    def connect(self, *arguments, **more) -> sqlite3.Connection:
        self._connections.append(self._connect(*arguments, **more))
        self._bound(self._connections[-1])
        return self._connections[-1]

    def fill(self, path) -> None:
        """Up to the last byte that an event could have."""
        with contextlib.closing(self._connect(path, isolation_level=None)) as connection:
            (pages,) = connection.execute("PRAGMA page_count").fetchone()
            connection.execute(f"PRAGMA max_page_count = {pages}")
            with contextlib.suppress(sqlite3.OperationalError):  # the disk is full
                while True:
                    connection.execute("INSERT INTO events (body) VALUES (?)", (NOTHING,))
        self.full = True
        for connection in self._connections:
            with contextlib.suppress(sqlite3.ProgrammingError):  # it is closed
                self._bound(connection)

    def free(self) -> None:
        self.full = False
        for connection in self._connections:
            with contextlib.suppress(sqlite3.ProgrammingError):
                connection.execute(f"PRAGMA max_page_count = {2**30}")

    def _bound(self, connection: sqlite3.Connection) -> None:
        if self.full:
            (pages,) = connection.execute("PRAGMA page_count").fetchone()
            connection.execute(f"PRAGMA max_page_count = {pages}")


NOTHING = msgspec.json.encode(BecameIdle(at=0.0, replica=""))


@pytest.fixture
def disk(monkeypatch) -> FullDisk:
    disk = FullDisk()
    monkeypatch.setattr("quire.fleet.journal.sqlite3.connect", disk.connect)
    return disk
