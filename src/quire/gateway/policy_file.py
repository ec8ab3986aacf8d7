"""The policy file, followed while the gateway runs: what it says of traffic and priorities holds from the moment it is
saved, which is how blue turns green and back. A file that became wrong is told and passed over; what was right stands.
A file that is being written is read when it has stood still from one look to the next: its beginning, or the nothing
that it is at first, may be a policy too.
The plugins of EndpointPickerConfig are made once: a change there needs a restart, and is told too.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import structlog

from quire.config.documents import read_documents
from quire.core.errors import ConfigError
from quire.gateway.traffic.policy import Policy, read_policy


@dataclass(slots=True)
class PolicyFile:
    path: Path | None
    interval: float = 0.1
    changed: Callable[[Policy], None] = lambda _policy: None
    policy: Policy = field(default_factory=Policy)
    _seen: tuple[int, int, int] | None = None
    """Of the file that was read last: when it was changed, its size, its inode."""
    _looked_at: tuple[int, int, int] | None = None

    def read(self) -> bool:
        """Whether there was something new. Raises `ConfigError`."""
        if self.path is None:
            return False
        seen = self._state(self.path)
        if seen == self._seen:
            return False
        self._seen = seen
        policy = read_policy(read_documents(self.path))
        if self.policy.picker is not None and policy.picker != self.policy.picker:
            structlog.get_logger().warning("picker_config_changed", effect="none until the gateway is started again")
        self.policy = policy
        return True

    @staticmethod
    def _state(path: Path) -> tuple[int, int, int]:
        try:
            status = path.stat()
        except OSError as error:
            raise ConfigError(f"{path}: {error.strerror}.", param="policy", remedy="Name a file.") from error
        return status.st_mtime_ns, status.st_size, status.st_ino

    async def follow(self) -> None:
        """Until cancelled."""
        while True:
            await asyncio.sleep(self.interval)
            self.look()

    def look(self) -> None:
        """Read the file if it has changed, and has not since the look before."""
        try:
            state = None if self.path is None else self._state(self.path)
            stands, self._looked_at = state == self._looked_at, state
            if stands and self.read():
                structlog.get_logger().info("policy_read_again", models=sorted(self.policy.traffic))
                self.changed(self.policy)
        except ConfigError as error:
            structlog.get_logger().warning("policy_unreadable", error=str(error), effect="the last one stands")
