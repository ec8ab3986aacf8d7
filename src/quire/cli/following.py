"""Telling of a service's events while they happen, and starting the control plane that makes them happen."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from quire.core.errors import EngineDead, EngineStartFailed
from quire.fleet.address import url
from quire.fleet.apply import apply
from quire.fleet.directory import ControlLock, ServiceDirectory
from quire.fleet.events import AnyEvent, ProcessExited
from quire.fleet.journal import Journal
from quire.fleet.spec import ENGINE_HOST, GATEWAY
from quire.fleet.state import FleetState
from quire.fleet.words import clock, consequence, describe, summary

if TYPE_CHECKING:
    from rich.status import Status

POLL = 0.1
CONTROL = (sys.executable, "-m", "quire.cli.control")
CONTROL_GRACE = 5.0
"""Seconds that a control plane may be missing before waiting for it is given up."""


def address(state: FleetState) -> str:
    """Where to send requests."""
    assert state.spec is not None
    role = state.spec.role(GATEWAY)
    if role is None:
        return ", ".join(f"{url(ENGINE_HOST, replica.port)}/v1" for replica in state.engines)
    return f"{url(role.host, role.port or 0)}/v1"


def resume_command(name: str) -> str:
    """What brings a control plane back to what runs without one."""
    return f"quire up --resume {name}"


def announcement(state: FleetState) -> str:
    assert state.spec is not None
    return f"quire serves {state.spec.model_name} at {address(state)} ({summary(state)})"


class Reporter:
    """Tells of events as they happen, and keeps a line of status at the bottom of a terminal.

    The terminal, or the reader of a pipe, may go: what runs has to be seen to all the same.
    """

    def __init__(self, status: Status | None = None) -> None:
        self._status = status
        self._announced = False

    def __call__(self, event: AnyEvent, state: FleetState) -> None:
        self._say(f"{clock(event.at)} {describe(event)}")
        more = consequence(event, state)
        if more is not None:
            self._say(f"{clock(event.at)} {more}")
        if self._status is not None:
            with contextlib.suppress(OSError):
                self._status.update(summary(state))

    def look(self, state: FleetState) -> None:
        """Say once where the service is, as soon as it is as asked for."""
        if not self._announced and state.settled and not state.down and state.spec is not None:
            self._announced = True
            self._say(announcement(state))

    def _say(self, line: str) -> None:
        with contextlib.suppress(OSError):
            if self._status is not None:
                self._status.console.print(line, markup=False, highlight=False)
            else:
                print(line, flush=True)


def follow(
    directory: ServiceDirectory, seq: int, state: FleetState, *, until: Callable[[FleetState], bool]
) -> FleetState:
    """Tell what happens after event `seq` until `until(state)`, the state that is returned.

    Raises `EngineStartFailed` if a replica that is asked for fails meanwhile and is in a crash loop, and `EngineDead`
    if no control plane is there.
    """
    reporter = Reporter()
    ended: set[str] = set()
    seen = time.monotonic()
    with Journal(directory.database) as journal:
        while True:
            for number, event in journal.after(seq):
                seq, state = number, apply(state, event)
                reporter(event, state)
                if isinstance(event, ProcessExited):
                    ended.add(event.replica)
            if until(state):
                return state
            failing = [
                replica
                for name, replica in state.replicas.items()
                if name in ended and replica.in_crash_loop and state.is_wanted(replica)
            ]
            if failing and not state.down:
                raise EngineStartFailed(
                    f"{failing[0].name} does not come up: {failing[0].last_error}",
                    remedy=f"`quire logs {failing[0].name}` tells more; `quire down {directory.name}` stops it.",
                )
            if ControlLock(directory).holder() is not None:
                seen = time.monotonic()
            elif time.monotonic() - seen > CONTROL_GRACE:
                raise EngineDead(
                    f"No control plane of {directory.name} runs.",
                    remedy=f"{directory.control_log} tells why; `{resume_command(directory.name)}` starts another one.",
                )
            time.sleep(POLL)


def start_control(directory: ServiceDirectory) -> None:
    """A control plane in a session of its own, which the terminal's end does not reach."""
    with directory.control_log.open("ab") as log:
        process = subprocess.Popen(  # noqa: S603 - our own
            [*CONTROL, str(directory.path.parent), directory.name],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    process.returncode = 0  # it outlives this command, on purpose
