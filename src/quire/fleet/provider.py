"""What a provider does: it carries out what was planned, and tells what runs. It decides nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import msgspec


class Launch(msgspec.Struct, frozen=True, kw_only=True):
    """One process to start. `start` counts the replica's starts, so that an earlier one is not mistaken for this."""

    replica: str
    start: int
    command: tuple[str, ...]
    environment: dict[str, str]


class Found(msgspec.Struct, frozen=True, kw_only=True):
    """A process as the provider sees it. `pid` is the engine's own, None until it is known."""

    replica: str
    start: int
    running: bool
    pid: int | None = None
    returncode: int | None = None
    error: str | None = None


class Provider(Protocol):
    """Processes by their replicas. What runs outlives the control plane, and `processes` finds it again."""

    def free_port(self, taken: frozenset[int]) -> int:
        """A port that nothing listens on, for a process that is about to start."""

    def start(self, launch: Launch) -> None:
        """Start a process. Raises `OSError` if that cannot be done."""

    def stop(self, replica: str) -> None:
        """Ask the process to finish what it runs, and end. Asking again changes nothing."""

    def kill(self, replica: str) -> None:
        """End the process at once."""

    def processes(self) -> dict[str, Found]:
        """All processes, those that have ended included until they are forgotten: also another control plane's."""

    def forget(self, replica: str) -> None:
        """Drop what is remembered of a process that has ended."""

    def memory(self, replica: str) -> int:
        """Bytes that the process and its children hold."""

    def logs(self, replica: str) -> list[Path]:
        """The log's files, oldest first."""
