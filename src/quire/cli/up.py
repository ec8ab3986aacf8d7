"""`quire up`: run a service here, in the foreground like a server, or behind the terminal with --detach."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import signal
import socket
import time
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from quire.cli.flags import FleetFlags, settings
from quire.cli.following import Reporter, announcement, follow, start_control
from quire.cli.manifest import behind_gateway, read_service
from quire.config.fleet import FleetConfig
from quire.core.errors import ConfigError, NotFound
from quire.fleet.directory import ControlLock, ServiceDirectory, state_root
from quire.fleet.events import DownRequested, ManifestApplied
from quire.fleet.journal import Journal
from quire.fleet.manifest.read import Manifest
from quire.fleet.spec import GATEWAY
from quire.fleet.state import FleetState


def up(
    manifest: Path | None = None,
    *,
    resume: str | None = None,
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
    resume
        A service that was started before: go on with what was asked for, manifest, scale and all, after its control
        plane ended.
    detach
        Come back when the service is ready, and leave it running; `quire down` stops it.
    gateway
        Put the gateway in front; without it the engines are on ports that `quire ps` tells.
    """
    resolved = settings(FleetConfig, fleet, config=None)
    config = resolved.value
    if resume is None:
        read = read_service(manifest, config)
        directory = ServiceDirectory(state_root(config.state_dir), read.service.name)
    else:
        if manifest is not None or not gateway or "flag" in (resolved.sources["host"], resolved.sources["port"]):
            raise ConfigError(
                "--resume goes on with what was asked for, and takes neither a manifest nor an address.",
                param="resume",
                remedy=f"`quire up --resume {resume}`, and then `quire apply FILE` for something else.",
            )
        directory = ServiceDirectory(state_root(config.state_dir), resume)
        directory.check_exists()
    directory.make()
    lock = ControlLock(directory)
    lock.acquire()
    try:
        if resume is None:
            from quire.fleet.providers import choose_provider

            choose_provider(directory, config.provider)
        with Journal(directory.database) as journal:
            _, state = journal.load()
            if resume is None:
                _ask_for(read, state, journal, config if gateway else None)
            elif state.spec is None or (state.down and not state.replicas):
                raise NotFound(f"{resume} is down.", param="resume", remedy="`quire up FILE` starts it.")
        if not detach:
            return asyncio.run(_run_here(directory))
    finally:
        lock.release()
    return _run_behind(directory)


def _ask_for(read: Manifest, state: FleetState, journal: Journal, address: FleetConfig | None) -> None:
    """Write down what the manifest says, with a gateway at the address if there is to be one."""
    wanted = read.service
    if address is not None:
        wanted = behind_gateway(read, address.host, gateway_port(state, address))
    if state.spec != wanted or state.down:
        journal.append(ManifestApplied(at=time.time(), spec=wanted))


def gateway_port(state: FleetState, config: FleetConfig) -> int:
    """The port in `config`, which has to be free, unless the service's own gateway has it."""
    before = None if state.spec is None else state.spec.role(GATEWAY)
    if before is not None and state.of_role(GATEWAY) and (before.host, before.port) == (config.host, config.port):
        return config.port
    return free_port(config.host, config.port)


def free_port(host: str, port: int) -> int:
    """`port`, or a free one for 0. Raises `ConfigError` if it is taken, or the host is none of this machine."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except (OSError, ValueError) as error:  # ValueError: a name that no encoding has
        why = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(
            f"--host is {host[:80]!r}, which is no address: {why}.",
            param="host",
            remedy="Give an address of this machine, or leave it out for the loopback.",
        ) from None
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(address)
        except OSError as error:
            what, remedy = "port", "Choose another --port; 0 takes a free one. `quire ps` tells what services run."
            if error.errno == errno.EADDRNOTAVAIL:
                what, remedy = "host", "Give a --host of this machine, or leave it out for the loopback."
            raise ConfigError(f"Cannot listen on {host}:{port}: {error.strerror}.", param=what, remedy=remedy) from None
        return int(listener.getsockname()[1])


async def _run_here(directory: ServiceDirectory) -> int:
    from rich.console import Console

    from quire.fleet.control import ControlPlane
    from quire.fleet.providers import open_provider

    console = Console()
    status = console.status("starting") if console.is_terminal else None
    reporter = Reporter(status)
    control = ControlPlane(directory, open_provider(directory), environ=os.environ, on_event=reporter)
    orders = 0

    def stop() -> None:
        nonlocal orders
        orders += 1
        control.record(DownRequested(at=time.time(), at_once=orders > 1))

    def is_over(state: FleetState) -> bool:
        reporter.look(state)
        return state.down and not state.replicas

    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, stop)
    if status is not None:
        status.start()
    try:
        await control.run(until=is_over)
    finally:
        with contextlib.suppress(OSError):  # the terminal may have gone
            if status is not None:
                status.stop()
    return 0


def _run_behind(directory: ServiceDirectory) -> int:
    """Start a control plane of its own, and wait until the service is ready or will not be."""
    with Journal(directory.database) as journal:
        seq, state = journal.load()
    start_control(directory)

    def is_there(state: FleetState) -> bool:
        """What is as it was asked for may have been so before; the control plane has to be there, too."""
        return state.settled and (state.down or ControlLock(directory).holder() is not None)

    state = follow(directory, seq, state, until=is_there)
    print(f"{directory.name}: down" if state.down else announcement(state))
    return 0
