"""The bounds of an engine's life, the states it goes through, and who is told."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from quire.core.model_info import ModelInfo
from quire.wire.rpc import Stats


class EngineState(StrEnum):
    STARTING = "starting"
    READY = "ready"
    FAILED = "failed"
    STOPPED = "stopped"


@dataclass(frozen=True, slots=True, kw_only=True)
class Supervision:
    """Bounds of the engine's life; times in seconds.

    `start_wait` is how long a request waits for an engine that is starting; `start_timeout` how long a start may take.
    """

    heartbeat_timeout: float = 30.0
    max_restarts: int = 5
    start_wait: float = 60.0
    start_timeout: float = 3600.0
    stop_timeout: float = 5.0
    first_back_off: float = 0.1
    max_back_off: float = 10.0
    max_in_flight: int = 16384


class EngineListener(Protocol):
    """Who counts what happens to the engine."""

    def engine_ready(self, model: ModelInfo) -> None: ...

    def engine_stats(self, stats: Stats) -> None: ...

    def engine_died(self) -> None: ...

    def requests_replayed(self, count: int) -> None: ...
