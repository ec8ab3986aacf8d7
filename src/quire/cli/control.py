"""The control plane as a process of its own: `python -m quire.cli.control STATE_ROOT SERVICE`.

SIGTERM ends it and touches nothing that runs; so does SIGKILL. `quire down` stops the service.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path

from quire.core.errors import QuireError
from quire.fleet.control import ControlPlane
from quire.fleet.directory import ControlLock, ServiceDirectory
from quire.fleet.processes import Processes


async def run(directory: ServiceDirectory) -> None:
    """Until the service is down, or a SIGTERM."""
    asked = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, asked.set)
    control = ControlPlane(directory, Processes(directory.path), environ=os.environ)
    await control.run(until=lambda state: asked.is_set() or (state.down and not state.replicas))


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
