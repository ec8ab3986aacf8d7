"""What `quire up` runs without a manifest, and the gateway that stands before any service."""

from __future__ import annotations

from typing import Any

from quire.config.engine import BUILTIN_MODEL
from quire.fleet.spec import GATEWAY, RoleSpec, ServiceSpec

BUILTIN_REPLICAS = 2


def builtin_service() -> ServiceSpec:
    """Two replicas of the model in the package."""
    role = RoleSpec(role="both", replicas=BUILTIN_REPLICAS, arguments=(BUILTIN_MODEL,))
    return ServiceSpec(name=BUILTIN_MODEL, model_name=BUILTIN_MODEL, roles=(role,))


def gateway_role(
    *, host: str, port: int, documents: tuple[dict[str, Any], ...], arguments: tuple[str, ...] = ()
) -> RoleSpec:
    """One gateway, replaced by stopping it first: its port can be had by one process at a time."""
    return RoleSpec(
        role=GATEWAY,
        replicas=1,
        arguments=arguments,
        host=host,
        port=port,
        documents=documents,
        max_surge=0,
        max_unavailable=1,
    )
