"""Commands about services that run: what there is, and how it is to change."""

from __future__ import annotations

import difflib
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from quire.cli.bench.report import print_json
from quire.cli.flags import StateDirFlag, settings
from quire.cli.following import address, follow, resume_command, start_control
from quire.config.fleet import FleetConfig
from quire.core.errors import ConfigError, NotFound, QuireError, StorageFull
from quire.fleet.directory import ControlLock, ServiceDirectory, services, state_root
from quire.fleet.events import AnyEvent, DownRequested, DrainRequested, RoleScaled
from quire.fleet.journal import Journal
from quire.fleet.spec import GATEWAY
from quire.fleet.state import FleetState, Replica
from quire.fleet.words import age, describe, status, summary

MAX_REPLICAS = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Service:
    """A service as its journal tells of it."""

    directory: ServiceDirectory
    seq: int
    state: FleetState
    control: int | None
    """Process of its control plane; None if there is none."""


def load(directory: ServiceDirectory) -> Service:
    directory.check_exists()
    with Journal(directory.database, alone=True) as journal:
        seq, state = journal.load()
    return Service(directory=directory, seq=seq, state=state, control=ControlLock(directory).holder())


def all_services(flags: StateDirFlag) -> list[Service]:
    """Those that can be read; of others it is told that they cannot."""
    root = _root(flags)
    found = []
    for name in services(root):
        try:
            found.append(load(ServiceDirectory(root, name)))
        except QuireError as error:
            print(f"warning: {name}: {error}", file=sys.stderr)
    return found


def _root(flags: StateDirFlag) -> Path:
    return state_root(settings(FleetConfig, flags, config=None).value.state_dir)


def find(name: str | None, flags: StateDirFlag) -> Service:
    """The service of that name, or the only one there is. Raises `NotFound` or `ConfigError`."""
    if name is not None and name in services(_root(flags)):
        return load(ServiceDirectory(_root(flags), name))
    there = all_services(flags)
    if name is None:
        running = [service for service in there if service.state.replicas or service.control is not None]
        candidates = running or there
        if len(candidates) == 1:
            return candidates[0]
        if not candidates:
            raise NotFound("No service runs here.", remedy="`quire up` starts one.")
        names = ", ".join(service.directory.name for service in candidates)
        raise ConfigError(f"There are several services: {names}.", param="name", remedy="Name one of them.")
    raise unknown("service", name, [service.directory.name for service in there])


def find_replica(name: str, flags: StateDirFlag) -> tuple[Service, Replica]:
    there = all_services(flags)
    for service in there:
        if name in service.state.replicas:
            return service, service.state.replicas[name]
    raise unknown("replica", name, [replica for service in there for replica in service.state.replicas])


def unknown(what: str, name: str, there: list[str]) -> NotFound:
    close = difflib.get_close_matches(name, there, n=1, cutoff=0.5)
    known = f"There are {', '.join(there)}." if there else "There is none; `quire up` starts one."
    remedy = f"Did you mean {close[0]}?" if close else known
    return NotFound(f"There is no {what} {name!r}.", param=what, remedy=remedy)


Wait = Annotated[bool, Parameter(negative="--no-wait")]


def order(
    service: Service, event: AnyEvent, *, wait: bool, until: Callable[[FleetState], bool] = lambda state: state.settled
) -> None:
    """Write a command down; wait until it is done, or say that nobody is there to do it."""
    name = service.directory.name
    with Journal(service.directory.database) as journal:
        journal.append(event)
    if service.control is None:
        print(
            f"{name}: {describe(event)}; no control plane runs, and it is done once `{resume_command(name)}` starts one"
        )
    elif wait:
        state = follow(service.directory, service.seq, service.state, until=until)
        print(f"{name}: {summary(state)}")
    else:
        print(f"{name}: {describe(event)}")


def ps(*, json: bool = False, state_dir: StateDirFlag = None) -> None:
    """List the services on this machine and their processes.

    Parameters
    ----------
    json
        Print JSON.
    """
    there = all_services(state_dir)
    if json:
        print_json({"services": [_as_json(service) for service in there]})
        return
    if not there:
        print("No service has been started here. `quire up` starts one.")
        return
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=False, width=None if sys.stdout.isatty() else 200)
    for service in there:
        print(_headline(service))
        if service.state.replicas:
            console.print(_table(service.state))


def _headline(service: Service) -> str:
    state = service.state
    if state.spec is None or (state.down and not state.replicas):
        return f"{service.directory.name}: down"
    role = state.spec.role(GATEWAY)
    where = "" if role is None else f" at {address(state)}"
    resume = f"; NO CONTROL PLANE RUNS, `{resume_command(service.directory.name)}` starts one"
    control = "" if service.control is not None else resume
    doing = ", stopping" if state.down else ""
    return f"{service.directory.name}: {state.spec.model_name}{where}: {summary(state)}{doing}{control}"


def _table(state: FleetState) -> Any:
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for column in ("NAME", "ROLE", "STATUS", "FOR", "PID", "PORT", "THREADS", "RESTARTS", "LAST ERROR"):
        table.add_column(column, overflow="fold" if column == "LAST ERROR" else "ellipsis", no_wrap=column == "NAME")
    now = time.time()
    for replica in sorted(state.replicas.values(), key=lambda replica: (replica.role != GATEWAY, replica.name)):
        error = "" if replica.phase == "ready" else replica.last_error or ""
        table.add_row(
            replica.name,
            replica.role,
            status(replica),
            age(now - replica.since),
            str(replica.pid or ""),
            str(replica.port),
            str(replica.threads or ""),
            str(replica.starts - 1),
            escape(error),
        )
    return table


def _as_json(service: Service) -> dict[str, Any]:
    state = service.state
    return {
        "name": service.directory.name,
        "model": None if state.spec is None else state.spec.model_name,
        "control_plane_pid": service.control,
        "down": state.down,
        "settled": state.settled,
        "replicas": [
            {
                "name": replica.name,
                "role": replica.role,
                "status": status(replica),
                "pid": replica.pid,
                "port": replica.port,
                "threads": replica.threads,
                "revision": replica.revision,
                "restarts": replica.starts - 1,
                "last_error": replica.last_error,
            }
            for replica in state.replicas.values()
        ],
    }


def scale(
    name: str, replicas: int, *, role: str | None = None, wait: Wait = True, state_dir: StateDirFlag = None
) -> None:
    """Set the number of a service's replicas; those that go are drained first.

    Parameters
    ----------
    name
        The service.
    replicas
        How many there shall be.
    role
        Which ones, where a service has several roles: both, decode or prefill.
    wait
        Come back when it is done.
    """
    service = find(name, state_dir)
    if not 0 <= replicas <= MAX_REPLICAS:
        raise ConfigError(f"replicas is {replicas}.", param="replicas", remedy=f"Give 0 to {MAX_REPLICAS}.")
    spec = service.state.spec
    roles = [] if spec is None else [known.role for known in spec.roles if known.role != GATEWAY]
    if role is None and len(roles) == 1:
        role = roles[0]
    if role not in roles:
        shown = "No --role is given" if role is None else f"--role is {role!r}"
        raise ConfigError(f"{shown}.", param="role", remedy=f"{name} has: {', '.join(roles) or 'none'}.")
    order(service, RoleScaled(at=time.time(), role=role, replicas=replicas), wait=wait)


def drain(replica: str, *, timeout: float | None = None, wait: Wait = True, state_dir: StateDirFlag = None) -> None:
    """Let a replica finish what it runs, then stop and replace it. `quire scale` makes it fewer.

    Parameters
    ----------
    replica
        Its name, as `quire ps` shows it.
    timeout
        Seconds that it may take; the manifest's terminationGracePeriodSeconds otherwise.
    wait
        Come back when it is done.
    """
    service, found = find_replica(replica, state_dir)
    if found.role == GATEWAY:
        raise ConfigError(f"{replica} is the gateway.", param="replica", remedy="Only engines are drained.")
    if timeout is not None and not 0 <= timeout <= 86_400:
        raise ConfigError(f"--timeout is {timeout:g}.", param="timeout", remedy="Give 0 to 86,400 seconds.")
    event = DrainRequested(at=time.time(), replica=replica, timeout=timeout)
    start = found.starts
    order(service, event, wait=wait, until=lambda state: state.settled and not _is_there(state, replica, start))


def _is_there(state: FleetState, replica: str, start: int) -> bool:
    return replica in state.replicas and state.replicas[replica].starts == start


def down(name: str | None = None, *, now: bool = False, state_dir: StateDirFlag = None) -> None:
    """Stop a service: the gateway first, then the engines, each when its requests have finished.

    Parameters
    ----------
    name
        The service; the only one that runs otherwise.
    now
        Do not let requests finish.
    """
    service = find(name, state_dir)
    if service.state.down and not service.state.replicas:
        print(f"{service.directory.name}: is down already")
        return
    try:
        with Journal(service.directory.database) as journal:
            journal.append(DownRequested(at=time.time(), at_once=now))
    except StorageFull as error:
        from quire.cli.control import stop_here

        print(f"warning: {error} It is stopped all the same.", file=sys.stderr)
        stop_here(service.directory, at_once=now)
        print(f"{service.directory.name}: down")
        return
    if ControlLock(service.directory).holder() is None:
        start_control(service.directory)
    follow(service.directory, service.seq, service.state, until=lambda state: state.down and not state.replicas)
    print(f"{service.directory.name}: down")
