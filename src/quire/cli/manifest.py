"""A manifest as commands read it: checked to the end, its warnings told."""

from __future__ import annotations

import sys
from pathlib import Path

from quire.config.fleet import FleetConfig
from quire.fleet.builtin import builtin_service
from quire.fleet.manifest.read import Manifest, read_manifest


def read_service(path: Path | None, config: FleetConfig) -> Manifest:
    """What the manifest asks for, or the built-in service without one. Warnings go to stderr."""
    if path is None:
        return Manifest(service=builtin_service(), policy=(), warnings=())
    manifest = read_manifest(path, pvc_dir=None if config.pvc_dir is None else Path(config.pvc_dir))
    from quire.gateway.traffic.policy import read_policy

    read_policy(manifest.policy)  # what the gateway would refuse is refused before anything starts
    for warning in manifest.warnings:
        print(f"warning: {path}: {warning}", file=sys.stderr)
    return manifest
