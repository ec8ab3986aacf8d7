"""The control plane as a process of its own: `python -m quire.cli.control STATE_ROOT SERVICE`.

SIGTERM ends it and touches nothing that runs; so does SIGKILL. `quire down` stops the service.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from pathlib import Path

from quire.cli.following import POLL, Reporter
from quire.core.errors import QuireError
from quire.fleet.control import ControlPlane
from quire.fleet.directory import ControlLock, ServiceDirectory
from quire.fleet.events import DownRequested
from quire.fleet.identity import identify, send_signal
from quire.fleet.providers import open_provider


async def run(directory: ServiceDirectory) -> None:
    """Until the service is down, or a SIGTERM."""
    asked = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, asked.set)
    control = ControlPlane(directory, open_provider(directory), environ=os.environ)
    await control.run(until=lambda state: asked.is_set() or (state.down and not state.replicas))


def stop_here(directory: ServiceDirectory, *, at_once: bool) -> None:
    """Stop a service in the place of its control plane, which hears of nothing while the journal cannot be written."""
    lock = ControlLock(directory)
    holder = lock.holder()
    identity = None if holder is None else identify(holder)
    for _ in range(2 if at_once else 1):  # one in the foreground stops what runs at the first, at once at the second
        if identity is not None:
            send_signal(identity, signal.SIGTERM)
            time.sleep(POLL)
    while lock.holder() is not None:
        time.sleep(POLL)
    lock.acquire()
    try:
        asyncio.run(_stop(directory, at_once))
    finally:
        lock.release()


async def _stop(directory: ServiceDirectory, at_once: bool) -> None:
    provider = open_provider(directory)
    control = ControlPlane(directory, provider, environ=os.environ, on_event=Reporter(), alone=True)
    control.record(DownRequested(at=time.time(), at_once=at_once))
    await control.run(until=lambda state: state.down and not state.replicas)


def main() -> int:
    root, name = sys.argv[1:]
    directory = ServiceDirectory(Path(root), name)
    lock = ControlLock(directory)
    try:
        lock.acquire()
        asyncio.run(run(directory))
    except QuireError as error:
        print(f"quire: {error}", file=sys.stderr)
        return 1
    finally:
        lock.release()
    return 0


if __name__ == "__main__":
    sys.exit(main())
