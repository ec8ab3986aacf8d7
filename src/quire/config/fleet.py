"""What decides where the fleet keeps its state and what address a service has."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetConfig:
    """One service of the local fleet. Every field is a flag of `quire up`."""

    state_dir: str | None = None
    """Directory of the services' state and logs; quire in the XDG state directory otherwise."""
    pvc_dir: str | None = None
    """Directory with a folder for each persistent volume claim: pvc://NAME/PATH is NAME/PATH in it."""
    provider: str = "processes"
    """What starts the service's processes; others than `processes` come with packages of their own."""
    host: str = "127.0.0.1"
    """Address that the gateway listens on; loopback unless told otherwise."""
    port: int = 8000
    """Port that the gateway listens on; 0 takes a free one and prints it."""
