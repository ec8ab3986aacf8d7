"""`quire logs` and `quire events`: what processes wrote, and what happened to them."""

from __future__ import annotations

import os
import sys
import time
from collections import deque
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from quire.cli.chat import visible
from quire.cli.flags import StateDirFlag
from quire.cli.fleet import Service, find, unknown
from quire.fleet.journal import Journal
from quire.fleet.provider import Provider
from quire.fleet.providers import open_provider
from quire.fleet.words import clock, describe

POLL = 0.2
MAX_LINES = 100_000

Follow = Annotated[bool, Parameter(alias="-f")]
Lines = Annotated[int, Parameter(alias="-n")]


def logs(
    name: str | None = None, *, follow: Follow = False, lines: Lines = 100, state_dir: StateDirFlag = None
) -> None:
    """Show the last lines that a service's processes wrote.

    Parameters
    ----------
    name
        A replica, or a service for all of its processes; the only service that runs otherwise.
    follow
        Go on showing what is written.
    lines
        How many of the last lines of each process to begin with.
    """
    service, names = _whose(name, state_dir)
    provider = open_provider(service.directory)
    width = max((len(replica) for replica in names), default=0)
    tails = {replica: Tail(replica, provider) for replica in names}

    def show(replica: str, line: str) -> None:
        prefix = f"{replica:{width}} | " if len(names) > 1 else ""
        sys.stdout.write(prefix + (visible(line) if sys.stdout.isatty() else line) + "\n")

    for replica, tail in tails.items():
        for line in tail.last(min(lines, MAX_LINES)):
            show(replica, line)
    sys.stdout.flush()
    while follow:
        for replica, tail in tails.items():
            for line in tail.new():
                show(replica, line)
        sys.stdout.flush()
        time.sleep(POLL)


def _whose(name: str | None, flags: StateDirFlag) -> tuple[Service, list[str]]:
    from quire.cli.fleet import all_services

    there = all_services(flags)
    for service in there:
        if name is not None and name in _names(service):
            return service, [name]
    if name is not None and name not in [service.directory.name for service in there]:
        everything = [known for service in there for known in (service.directory.name, *_names(service))]
        raise unknown("service or replica", name, everything)
    service = find(name, flags)
    return service, _names(service)


def _names(service: Service) -> list[str]:
    """Replicas that are there, and those that are gone but left a log."""
    left = {path.stem for path in (service.directory.path / "logs").glob("*.log")} - {"control"}
    return sorted(left | set(service.state.replicas))


class Tail:
    """Reads on in a log file, also after it was replaced by a new one."""

    def __init__(self, replica: str, provider: Provider) -> None:
        self._replica = replica
        self._provider = provider
        self._file: Path | None = None
        self._inode = 0
        self._offset = 0
        self._rest = b""

    def last(self, count: int) -> list[str]:
        lines: deque[bytes] = deque(maxlen=count)
        for path in self._provider.logs(self._replica):
            with path.open("rb") as file:
                lines.extend(line.rstrip(b"\n") for line in file)
                self._file, self._inode, self._offset = path, os.fstat(file.fileno()).st_ino, file.tell()
        return [line.decode("utf-8", "replace") for line in lines]

    def new(self) -> list[str]:
        paths = self._provider.logs(self._replica)
        if not paths:
            return []
        with paths[-1].open("rb") as file:
            inode = os.fstat(file.fileno()).st_ino
            if inode != self._inode:
                self._inode, self._offset, self._rest = inode, 0, b""
            file.seek(self._offset)
            data = self._rest + file.read(1024 * 1024)
            self._offset = file.tell()
        *lines, self._rest = data.split(b"\n")
        return [line.decode("utf-8", "replace") for line in lines]


def events(
    name: str | None = None, *, follow: Follow = False, lines: Lines = 100, state_dir: StateDirFlag = None
) -> None:
    """Show what happened to a service, and what was decided.

    Parameters
    ----------
    name
        The service; the only one that runs otherwise.
    follow
        Go on showing what happens.
    lines
        How many of the last events to begin with.
    """
    service = find(name, state_dir)
    seq = 0
    with Journal(service.directory.database) as journal:
        found = journal.last(min(lines, MAX_LINES))
        while True:
            for number, event in found:
                print(f"{clock(event.at)} {describe(event)}", flush=True)
                seq = number
            if not follow:
                return
            time.sleep(POLL)
            found = journal.after(seq)
