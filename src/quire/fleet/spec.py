"""What is to run: a manifest, read and made plain. Pure data, kept in the events."""

from __future__ import annotations

import hashlib
import math
from typing import Any, Literal

import msgspec

Role = Literal["both", "decode", "prefill", "gateway"]
GATEWAY: Role = "gateway"
ENGINE_HOST = "127.0.0.1"
PICKER_CONFIG = "EndpointPickerConfig"
"""The kind of policy that a gateway reads once, when it starts."""

DEFAULT_DRAIN_TIMEOUT = 300.0
"""Seconds: streams of language models are long, and a replica that is idle does not wait for it."""
DEFAULT_STOP_TIMEOUT = 40.0
"""Seconds from SIGTERM to SIGKILL: the 30 that `quire serve` gives running requests, and some to end."""
DEFAULT_START_TIMEOUT = 1800.0
"""Seconds: a large model has to be downloaded and read first."""


class RoleSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Equal processes: how many, how each is started, and how they are replaced."""

    role: Role
    replicas: int
    arguments: tuple[str, ...] = ()
    """What follows `quire serve` (or `quire gateway`); address and threads are added at the start."""
    environment: dict[str, str] = {}
    documents: tuple[dict[str, Any], ...] = ()
    """The gateway's policy, as documents of its file, which it reads again whenever that changes."""
    port: int | None = None
    """A fixed port; one is allotted at each start otherwise."""
    host: str = ENGINE_HOST
    cpu: float | None = None
    """Cores that one process may use; a fair share of the machine's otherwise."""
    memory: int | None = None
    """Bytes that one process tree may hold; more ends it."""
    labels: dict[str, str] = {}
    max_surge: int | str = "25%"
    max_unavailable: int | str = "25%"
    drain_timeout: float = DEFAULT_DRAIN_TIMEOUT
    stop_timeout: float = DEFAULT_STOP_TIMEOUT
    start_timeout: float = DEFAULT_START_TIMEOUT

    @property
    def revision(self) -> str:
        """Changes exactly when a running process no longer is what is asked for, and has to be replaced."""
        launch = [
            self.role,
            self.arguments,
            sorted(self.environment.items()),
            [document for document in self.documents if document.get("kind") == PICKER_CONFIG],
            self.port,
            self.host,
            self.cpu,
            self.memory,
        ]
        return hashlib.sha256(msgspec.json.encode(launch, order="sorted")).hexdigest()[:10]

    @property
    def surge(self) -> int:
        """Most processes beyond `replicas`; a percentage is rounded up, as Kubernetes does."""
        return _share(self.max_surge, self.replicas, math.ceil)

    @property
    def unavailable(self) -> int:
        """Most replicas that a rollout may take away; a percentage is rounded down, and one if nothing else moves."""
        unavailable = _share(self.max_unavailable, self.replicas, math.floor)
        return max(unavailable, 1) if self.surge == 0 else unavailable


class ServiceSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One service: a model behind one address."""

    name: str
    model_name: str
    roles: tuple[RoleSpec, ...]

    def role(self, role: str) -> RoleSpec | None:
        return next((spec for spec in self.roles if spec.role == role), None)


def _share(value: int | str, replicas: int, rounding: Any) -> int:
    if isinstance(value, int):
        return value
    return int(rounding(int(value.removesuffix("%")) * replicas / 100))
