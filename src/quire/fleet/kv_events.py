"""KV events between the engines of one machine and their gateway: asked for by the policy, each on ports of its own."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from quire.config.kv_events import read_kv_events
from quire.fleet.spec import GATEWAY, PICKER_CONFIG, RoleSpec, ServiceSpec

FLAG = "--kv-events-config"
VARIABLE = "QUIRE_KV_EVENTS_CONFIG"
_NEEDS_EVENTS = frozenset({"precise-prefix-cache-producer", "precise-prefix-cache-scorer"})


def needs_events(documents: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a plugin of the EndpointPickerConfig among the documents knows only what engines tell."""
    return any(
        isinstance(plugin, dict) and plugin.get("type") in _NEEDS_EVENTS
        for document in documents
        if document.get("kind") == PICKER_CONFIG
        for plugin in document.get("plugins") or []
    )


def with_events(service: ServiceSpec) -> ServiceSpec:
    """The service with engines that publish what is in their prefix caches, unless something was said about that."""
    argument = f"{FLAG}={json.dumps({'enable_kv_cache_events': True})}"

    def publishing(role: RoleSpec) -> RoleSpec:
        said = any(given.partition("=")[0] == FLAG for given in role.arguments) or VARIABLE in role.environment
        if role.role == GATEWAY or said:
            return role
        return msgspec.structs.replace(role, arguments=(*role.arguments, argument))

    return msgspec.structs.replace(service, roles=tuple(publishing(role) for role in service.roles))


def publishes(arguments: Sequence[str]) -> bool:
    return any(name == FLAG and read_kv_events(value).enabled for name, _, value in _split(arguments))


def placed(arguments: Sequence[str], ports: tuple[int, int]) -> tuple[str, ...]:
    """The arguments with events, and the replay of lost ones, at these ports of the loopback.

    Replicas have the same arguments, and could not all have the port that stands in them. The topic, which may have
    that of another address in it, is left to the engine. The gateway reads the ports off the engine's metrics.
    """
    events, replay = ports
    made = []
    for argument, (name, _, value) in zip(arguments, _split(arguments), strict=True):
        if name != FLAG or not read_kv_events(value).enabled:
            made.append(argument)
            continue
        config = {key: given for key, given in json.loads(value).items() if key != "topic"}
        config |= {
            "endpoint": f"tcp://127.0.0.1:{events}",
            "bind": True,
            "replay_endpoint": f"tcp://127.0.0.1:{replay}",
        }
        made.append(f"{FLAG}={json.dumps(config)}")
    return tuple(made)


def _split(arguments: Sequence[str]) -> list[tuple[str, str, str]]:
    return [argument.partition("=") for argument in arguments]
