"""`precise-prefix-cache-producer`: what engines' KV events say they hold, by the prompt's very tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import msgspec
import structlog

from quire.core.errors import ConfigError
from quire.gateway.endpoint import Endpoint
from quire.gateway.kv.index import TIER_CREDITS, KVIndex
from quire.gateway.kv.subscriptions import PortsOf
from quire.gateway.plugin import Parameters, Producer, Services
from quire.gateway.request import InferenceRequest

KV_INDEX: Final = "kv_index"
TYPE: Final = "precise-prefix-cache-producer"
DEFAULT_PORT: Final = 5557


class PreciseParameters(Parameters, frozen=True):
    """llm-d's. Ports are where engines tell their events that do not say so themselves; `kvCacheBackendConfigs` of the
    indexer are the tiers' credits. Block sizes are learnt from the events, hashes are our own, and the index has one
    form: what else the three sections say is for llm-d's."""

    token_processor_config: Mapping[str, Any] = {}
    kv_events_config: Mapping[str, Any] = {}
    indexer_config: Mapping[str, Any] = {}
    speculative_indexing: bool = False
    speculative_ttl: str = msgspec.field(default="", name="speculativeTTL")
    session_manager: str = ""


class PrecisePrefix(Producer):
    def __init__(self, parameters: PreciseParameters, services: Services) -> None:
        self._index: KVIndex = services.shared[KV_INDEX]
        self.ports = _ports(parameters.kv_events_config)
        self._index.use_credits(_credits(parameters.indexer_config))
        for name, why in _without_effect(parameters):
            structlog.get_logger().warning("picker_config", note=f"{name} of {TYPE} has no effect: {why}")

    def produce(self, request: InferenceRequest, endpoints: Sequence[Endpoint]) -> None:
        if request.token_ids is not None:
            request.prefix[self.name] = self._index.lookup(
                request.token_ids, model=request.target_model, cache_salt=request.cache_salt
            )


def _ports(config: Mapping[str, Any]) -> PortsOf:
    discovery = config.get("podDiscoveryConfig") or {}
    if not isinstance(discovery, Mapping):
        raise _wrong("podDiscoveryConfig", discovery, "an object")
    events = discovery.get("socketPort") or DEFAULT_PORT
    replay = discovery.get("replaySocketPort") or None
    for name, port in (("socketPort", events), ("replaySocketPort", replay)):
        if port is not None and (type(port) is not int or port > 65_535):
            raise _wrong(name, port, "a port")
    return PortsOf(events=events, replay=replay if replay is None or replay > 0 else None)


def _credits(config: Mapping[str, Any]) -> Mapping[str, float]:
    backends = config.get("kvCacheBackendConfigs") or []
    found = dict(TIER_CREDITS)
    for backend in backends if isinstance(backends, list) else [backends]:
        try:
            name, weight = str(backend["name"]), float(backend["weight"])
        except (TypeError, KeyError, ValueError):
            raise _wrong("kvCacheBackendConfigs", backends, "a list of a name and a weight each") from None
        if not 0.0 <= weight <= 1.0:
            raise _wrong("weight", weight, "from 0 to 1")
        found[name.lower()] = weight
    return found


def _without_effect(parameters: PreciseParameters) -> list[tuple[str, str]]:
    found = []
    if parameters.speculative_indexing:
        found.append(("speculativeIndexing", "engines' own words are awaited"))
    if parameters.session_manager:
        found.append(("sessionManager", "there are no session managers here"))
    if parameters.kv_events_config.get("zmqEndpoint"):
        found.append(("zmqEndpoint", "the gateway connects to each engine, rather than the engines to it"))
    return found


def _wrong(name: str, value: object, wanted: str) -> ConfigError:
    shown = repr(value)[:80]
    return ConfigError(f"Plugin {TYPE!r}: {name} is {shown}.", param="plugins", remedy=f"It must be {wanted}.")
