"""A manifest as commands read it: checked to the end, its warnings told."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import msgspec

from quire.config.fleet import FleetConfig
from quire.fleet.builtin import builtin_service, gateway_role
from quire.fleet.kv_events import needs_events, with_events
from quire.fleet.manifest.read import Manifest, read_manifest
from quire.fleet.spec import ServiceSpec


def read_service(path: Path | None, config: FleetConfig) -> Manifest:
    """What the manifest asks for, or the built-in service without one. Warnings go to stderr."""
    if path is None:
        return Manifest(service=builtin_service(), policy=(), warnings=())
    manifest = read_manifest(path, pvc_dir=None if config.pvc_dir is None else Path(config.pvc_dir))
    from quire.gateway.traffic.policy import read_policy

    read_policy(manifest.policy)  # what the gateway would refuse is refused before anything starts
    for warning in manifest.warnings:
        print(f"warning: {path}: {warning}", file=sys.stderr)
    if needs_events(manifest.policy):
        return replace(manifest, service=with_events(manifest.service))
    return manifest


def behind_gateway(read: Manifest, host: str, port: int) -> ServiceSpec:
    """The service with a gateway at this address, which has the manifest's policy."""
    role = gateway_role(
        host=host,
        port=port,
        documents=read.policy,
        arguments=("--exact-tokens",) if needs_events(read.policy) else (),
    )
    return msgspec.structs.replace(read.service, roles=(*read.service.roles, role))
