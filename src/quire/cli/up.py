"""`quire up`: run a service here, in the foreground like a server, or behind the terminal with --detach."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec
from cyclopts import Parameter

from quire.cli.flags import FleetFlags, settings
from quire.config.fleet import FleetConfig
from quire.core.errors import ConfigError, EngineStartFailed
from quire.fleet.apply import apply
from quire.fleet.builtin import builtin_service, gateway_role
from quire.fleet.directory import ControlLock, ServiceDirectory, state_root
from quire.fleet.events import AnyEvent, DownRequested, ManifestApplied
from quire.fleet.journal import Journal
from quire.fleet.spec import GATEWAY, ServiceSpec
from quire.fleet.state import FleetState
from quire.fleet.words import clock, consequence, describe, summary

if TYPE_CHECKING:
    from rich.status import Status

POLL = 0.1
CONTROL = (sys.executable, "-m", "quire.cli.control")


def up(
    manifest: Path | None = None,
    *,
    detach: bool = False,
    gateway: Annotated[bool, Parameter(negative="--no-gateway")] = True,
    fleet: FleetFlags = None,
) -> int:
    """Run a service on this machine: its engines, and the gateway in front, behind one port.

    Ctrl-C stops it, letting requests finish; a second Ctrl-C stops at once.

    Parameters
    ----------
    manifest
        A file with an LLMInferenceService; two replicas of the built-in model otherwise.
    detach
        Come back when the service is ready, and leave it running; `quire down` stops it.
    gateway
        Put the gateway in front; without it the engines are on ports that `quire ps` tells.
    """
    config = settings(FleetConfig, fleet, config=None).value
    wanted = read_service(manifest)
    directory = ServiceDirectory(state_root(config.state_dir), wanted.name)
    directory.make()
    lock = ControlLock(directory)
    lock.acquire()
    try:
        with Journal(directory.database) as journal:
            _, state = journal.load()
            if gateway:
                wanted = with_gateway(wanted, state, config)
            if state.spec != wanted or state.down:
                journal.append(ManifestApplied(at=time.time(), spec=wanted))
        if not detach:
            return asyncio.run(_run_here(directory))
    finally:
        lock.release()
    return _run_behind(directory)


def read_service(manifest: Path | None) -> ServiceSpec:
    """What the manifest asks for, without the gateway. Its warnings go to stderr."""
    if manifest is None:
        return builtin_service()
    raise ConfigError("Manifests cannot be read yet.")


def with_gateway(wanted: ServiceSpec, state: FleetState, config: FleetConfig) -> ServiceSpec:
    """`wanted` behind a gateway at the address in `config`, which has to be free, or that of its own gateway."""
    port = config.port
    before = None if state.spec is None else state.spec.role(GATEWAY)
    runs = before is not None and bool(state.of_role(GATEWAY)) and (before.host, before.port) == (config.host, port)
    if not runs:
        port = free_port(config.host, port)
    role = gateway_role(host=config.host, port=port, documents=())
    return msgspec.structs.replace(wanted, roles=(*wanted.roles, role))


def free_port(host: str, port: int) -> int:
    """`port`, or a free one for 0. Raises `ConfigError` if it is taken."""
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(address)
        except OSError as error:
            raise ConfigError(
                f"Cannot listen on {host}:{port}: {error.strerror}.",
                param="port",
                remedy="Choose another --port; 0 takes a free one. `quire ps` tells what services run.",
            ) from None
        return int(listener.getsockname()[1])


def address(state: FleetState) -> str:
    """Where to send requests."""
    assert state.spec is not None
    role = state.spec.role(GATEWAY)
    if role is None:
        return ", ".join(f"http://127.0.0.1:{replica.port}/v1" for replica in state.engines)
    return f"http://{role.host}:{role.port}/v1"


def announcement(state: FleetState) -> str:
    assert state.spec is not None
    return f"quire serves {state.spec.model_name} at {address(state)} ({summary(state)})"


class Reporter:
    """Tells of events as they happen, and keeps a line of status at the bottom of a terminal."""

    def __init__(self, status: Status | None = None, *, announced: bool = False) -> None:
        self._status = status
        self._announced = announced

    def __call__(self, event: AnyEvent, state: FleetState) -> None:
        self._say(f"{clock(event.at)} {describe(event)}")
        more = consequence(event, state)
        if more is not None:
            self._say(f"{clock(event.at)} {more}")
        if self._status is not None:
            self._status.update(summary(state))
        if not self._announced and state.settled and not state.down:
            self._announced = True
            self._say(announcement(state))

    def _say(self, line: str) -> None:
        if self._status is not None:
            self._status.console.print(line, markup=False, highlight=False)
        else:
            print(line, flush=True)


async def _run_here(directory: ServiceDirectory) -> int:
    from rich.console import Console

    from quire.fleet.control import ControlPlane
    from quire.fleet.processes import Processes

    console = Console()
    status = console.status("starting") if console.is_terminal else None
    reporter = Reporter(status)
    control = ControlPlane(directory, Processes(directory.path), environ=os.environ, on_event=reporter)
    orders = 0

    def stop() -> None:
        nonlocal orders
        orders += 1
        control.record(DownRequested(at=time.time(), at_once=orders > 1))

    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, stop)
    if status is not None:
        status.start()
    try:
        await control.run(until=lambda state: state.down and not state.replicas)
    finally:
        if status is not None:
            status.stop()
    return 0


def _run_behind(directory: ServiceDirectory) -> int:
    """Start a control plane of its own, and wait until the service is ready or will not be."""
    with Journal(directory.database) as journal:
        seq, state = journal.load()
        start_control(directory)
        reporter = Reporter(announced=True)
        while True:
            for number, event in journal.after(seq):
                seq, state = number, apply(state, event)
                reporter(event, state)
            if state.settled:
                print(announcement(state))
                return 0
            failing = [replica for replica in state.replicas.values() if replica.in_crash_loop]
            if failing:
                raise EngineStartFailed(
                    f"{failing[0].name} does not come up: {failing[0].last_error}",
                    remedy=f"`quire logs {failing[0].name}` tells more; `quire down` stops it.",
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
