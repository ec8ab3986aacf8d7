"""`quire apply`: make a running service what a manifest says."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from quire.cli.flags import ApplyFlags, settings
from quire.cli.fleet import Wait, find, order
from quire.cli.manifest import behind_gateway, read_service
from quire.config.fleet import FleetConfig
from quire.core.errors import NotFound
from quire.fleet.diff import diff
from quire.fleet.events import ManifestApplied
from quire.fleet.spec import GATEWAY


def apply(
    manifest: Path,
    *,
    dry_run: Annotated[bool, Parameter(negative=())] = False,
    wait: Wait = True,
    fleet: ApplyFlags = None,
) -> None:
    """Change a running service to what a manifest says, a replica at a time and without losing a request.

    Parameters
    ----------
    manifest
        A file with an LLMInferenceService; its metadata.name says which service is meant.
    dry_run
        Only show what would change.
    wait
        Come back when it is done.
    """
    config = settings(FleetConfig, fleet, config=None).value
    read = read_service(manifest, config)
    service = find(read.service.name, fleet)
    if service.state.spec is None or service.state.down:
        raise NotFound(f"{read.service.name} is down.", param="name", remedy=f"`quire up {manifest}` starts it.")
    gateway = service.state.spec.role(GATEWAY)
    if gateway is None or gateway.port is None:
        wanted = read.service
    else:
        wanted = behind_gateway(read, gateway.host, gateway.port)
    changes = diff(service.state.spec, wanted)
    if not changes:
        print(f"{read.service.name}: nothing changes")
        return
    for change in changes:
        print(change)
    if not dry_run:
        order(service, ManifestApplied(at=time.time(), spec=wanted), wait=wait)
