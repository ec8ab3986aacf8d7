"""The providers by name. Others join through the entry-point group `quire.providers`: something that is called with the
service's directory and makes a `Provider`."""

from __future__ import annotations

from collections.abc import Callable

from quire.core.errors import ConfigError
from quire.core.registry import Registry
from quire.fleet.directory import ServiceDirectory, write_file
from quire.fleet.processes import Processes
from quire.fleet.provider import Provider

PROCESSES = "processes"


def providers() -> Registry[Callable[[ServiceDirectory], Provider]]:
    registry: Registry[Callable[[ServiceDirectory], Provider]] = Registry("provider", "quire.providers")
    registry.add(PROCESSES, lambda directory: Processes(directory.path))
    return registry


def choose_provider(directory: ServiceDirectory, name: str) -> None:
    """Every later command on the service uses it. Raises `ConfigError` for a name that nobody registered."""
    registry = providers()
    if name not in registry:
        raise ConfigError(
            f"There is no provider {name[:80]!r}.",
            param="provider",
            remedy=f"There is {', '.join(registry.names())}; others come with the package that has them.",
        )
    write_file(directory.path / "provider", name.encode())


def open_provider(directory: ServiceDirectory) -> Provider:
    """The one that was chosen for the service."""
    chosen = directory.path / "provider"
    name = chosen.read_text() if chosen.is_file() else PROCESSES
    make = providers().get(name)
    if make is None:
        raise ConfigError(f"The service's provider {name[:80]!r} is gone.", remedy="Install its package again.")
    return make(directory)
