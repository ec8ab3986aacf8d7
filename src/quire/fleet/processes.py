"""The provider `processes`: child processes of this machine, each behind a `shim`, on ports of the loopback.

Before a shim may start anything it waits for its orders, which it gets only when the file that says who it is has been
written. So whatever runs is found again by whoever reads those files: by process number and time of start.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import msgspec
import psutil

from quire.fleet.directory import write_file
from quire.fleet.identity import Identity, identify, is_running, send_signal
from quire.fleet.provider import Found, Launch
from quire.fleet.spec import ENGINE_HOST

SHIM = (sys.executable, "-m", "quire.fleet.shim")
PORT_ATTEMPTS = 100


class _Record(msgspec.Struct, kw_only=True):
    """What stands in the file of a process: who its shim is, and what the shim has told since."""

    replica: str
    start: int
    shim: Identity
    child: int | None = None
    returncode: int | None = None
    error: str | None = None


class Processes:
    """The processes of one service, whose records and logs are in `directory`."""

    def __init__(self, directory: Path) -> None:
        self._records = directory / "run"
        self._logs = directory / "logs"
        for path in (self._records, self._logs):
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._children: list[int] = []
        """Started by us, and to be waited for by us once they have ended."""

    def free_port(self, taken: frozenset[int]) -> int:
        for _ in range(PORT_ATTEMPTS):
            with socket.socket() as probe:
                probe.bind((ENGINE_HOST, 0))
                port: int = probe.getsockname()[1]
            if port not in taken:
                return port
        raise OSError("No port of the loopback is free.")

    def start(self, launch: Launch) -> None:
        with self._log(launch.replica).open("ab") as errors:
            shim = subprocess.Popen(  # noqa: S603 - our own
                SHIM,
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=errors,
                start_new_session=True,  # a terminal's Ctrl-C, or its end, is not for it
                cwd="/",
            )
        self._children.append(shim.pid)
        shim.returncode = 0  # it is `processes` that waits for it
        identity = identify(shim.pid)
        assert shim.stdin is not None
        if identity is None:
            raise OSError("The process ended at once.")
        self._write(_Record(replica=launch.replica, start=launch.start, shim=identity))
        orders = {
            "command": launch.command,
            "environment": launch.environment,
            "record": str(self._path(launch.replica)),
            "log": str(self._log(launch.replica)),
        }
        with shim.stdin as pipe:
            pipe.write(json.dumps(orders).encode() + b"\n")

    def stop(self, replica: str) -> None:
        record = self._read(self._path(replica))
        if record is not None:
            send_signal(record.shim, signal.SIGTERM)

    def kill(self, replica: str) -> None:
        record = self._read(self._path(replica))
        if record is not None:
            send_signal(record.shim, signal.SIGKILL)  # the kernel ends the child with it

    def processes(self) -> dict[str, Found]:
        self._children = [child for child in self._children if os.waitpid(child, os.WNOHANG) == (0, 0)]
        found = {}
        for path in sorted(self._records.glob("*.json")):
            running_before = (record := self._read(path)) is not None and is_running(record.shim)
            record = self._read(path)  # again: what a shim tells, it tells before it ends
            if record is not None:
                found[record.replica] = Found(
                    replica=record.replica,
                    start=record.start,
                    running=running_before and record.returncode is None,
                    pid=record.child,
                    returncode=record.returncode,
                    error=record.error,
                )
        return found

    def forget(self, replica: str) -> None:
        self._path(replica).unlink(missing_ok=True)

    def memory(self, replica: str) -> int:
        record = self._read(self._path(replica))
        if record is None or record.child is None or not is_running(record.shim):
            return 0
        total = 0
        try:
            child = psutil.Process(record.child)
            for process in (child, *child.children(recursive=True)):
                total += process.memory_info().rss
        except psutil.NoSuchProcess:
            pass
        return total

    def logs(self, replica: str) -> list[Path]:
        log = self._log(replica)
        return [path for path in (log.with_name(log.name + ".1"), log) if path.exists()]

    def _path(self, replica: str) -> Path:
        return self._records / f"{replica}.json"

    def _log(self, replica: str) -> Path:
        return self._logs / f"{replica}.log"

    def _write(self, record: _Record) -> None:
        write_file(self._path(record.replica), msgspec.json.encode(record))

    def _read(self, path: Path) -> _Record | None:
        try:
            return msgspec.json.decode(path.read_bytes(), type=_Record)
        except (FileNotFoundError, msgspec.MsgspecError):
            return None
