"""Plugins' faults, told in the log and no further: none costs a request."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Final

import structlog

from quire.gateway.endpoint import Clock

EVERY: Final = 10.0
"""Seconds between two warnings of one plugin: a fault that each request meets would fill the log."""


@dataclass(slots=True)
class _Told:
    time: float = -math.inf
    unsaid: int = 0


@dataclass(slots=True)
class PluginFaults:
    clock: Clock
    _told: dict[tuple[str, str], _Told] = field(default_factory=dict)

    def tell(self, event: str, plugin: str, error: Exception) -> None:
        """`event` is the warning's name; what was passed over since the last one is counted in it."""
        told = self._told.setdefault((event, plugin), _Told())
        now = self.clock()
        if now - told.time < EVERY:
            told.unsaid += 1
            return
        why = f"{type(error).__name__}: {error}"[:500]
        structlog.get_logger().warning(event, plugin=plugin, error=why, unsaid_before=told.unsaid, exc_info=error)
        told.time, told.unsaid = now, 0
