"""The file that tells a gateway where the engines are, in the format of llm-d's `file-discovery` plugin.

    endpoints: [{name, namespace, address, port, labels}], `port` as text

It is replaced in one step whenever it changes, so that a reader never sees half of it.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from quire.fleet.directory import write_file
from quire.fleet.spec import ENGINE_HOST
from quire.fleet.state import FleetState

ROLE_LABEL = "llm-d.ai/role"
ENGINE_LABEL = "llm-d.ai/engine-type"
STATE_LABEL = "quire.ai/state"
NAMESPACE = "default"


class Endpoint(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    namespace: str
    address: str
    port: str
    labels: dict[str, str]


def endpoints(state: FleetState) -> list[Endpoint]:
    """Engines that answer: ready ones, and draining ones, marked, which finish what they have and get nothing new."""
    assert state.spec is not None
    found = []
    for replica in sorted(state.engines, key=lambda replica: replica.name):
        spec = state.spec.role(replica.role)
        if replica.phase not in ("ready", "draining"):
            continue
        labels = {} if spec is None else dict(spec.labels)
        labels |= {ROLE_LABEL: replica.role, ENGINE_LABEL: "vllm", STATE_LABEL: replica.phase}
        found.append(
            Endpoint(
                name=replica.name,
                namespace=NAMESPACE,
                address=ENGINE_HOST,
                port=str(replica.port),
                labels=labels,
            )
        )
    return found


def write(path: Path, found: list[Endpoint]) -> None:
    """As JSON, which is YAML."""
    write_file(path, msgspec.json.format(msgspec.json.encode({"endpoints": found}), indent=2) + b"\n")
