"""`precise-prefix-cache-producer`: what engines' KV events say they hold, by the prompt's very tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Final

from quire.core.errors import ConfigError
from quire.gateway.endpoint import Endpoint
from quire.gateway.kv.index import TIER_CREDITS, KVIndex
from quire.gateway.kv.subscriptions import PortsOf
from quire.gateway.plugin import Parameters, Producer, Services
from quire.gateway.request import InferenceRequest

KV_INDEX: Final = "kv_index"
TYPE: Final = "precise-prefix-cache-producer"
DEFAULT_PORT: Final = 5557


class PodDiscovery(Parameters, frozen=True):
    """Where engines tell their events that do not say so themselves."""

    WITHOUT_EFFECT: ClassVar[Mapping[str, str]] = {"*": "the endpoints are those that the gateway has"}
    socket_port: Any = None
    replay_socket_port: Any = None


class KVEventsConfig(Parameters, frozen=True):
    WITHOUT_EFFECT: ClassVar[Mapping[str, str]] = {
        "zmqEndpoint": "the gateway connects to each engine, rather than the engines to it",
        "topicFilter": "all that an engine tells is heard",
        "*": "each endpoint's events are heard as they come",
    }
    pod_discovery_config: PodDiscovery | None = None


class IndexerConfig(Parameters, frozen=True):
    WITHOUT_EFFECT: ClassVar[Mapping[str, str]] = {"*": "the index has one form"}
    kv_cache_backend_configs: Any = None
    """The tiers' credits."""


class PreciseParameters(Parameters, frozen=True):
    WITHOUT_EFFECT: ClassVar[Mapping[str, str]] = {
        "tokenProcessorConfig": "block sizes are learnt from the events, and hashes are quire's own",
        **dict.fromkeys(("speculativeIndexing", "speculativeTTL"), "engines' own words are awaited"),
        "sessionManager": "there are no session managers here",
    }
    kv_events_config: KVEventsConfig = KVEventsConfig()
    indexer_config: IndexerConfig = IndexerConfig()


class PrecisePrefix(Producer):
    def __init__(self, parameters: PreciseParameters, services: Services) -> None:
        self._index: KVIndex = services.shared[KV_INDEX]
        self.ports = _ports(parameters.kv_events_config)
        self._index.use_credits(_credits(parameters.indexer_config))

    def produce(self, request: InferenceRequest, endpoints: Sequence[Endpoint]) -> None:
        if request.token_ids is not None:
            request.prefix[self.name] = self._index.lookup(
                request.token_ids, model=request.target_model, cache_salt=request.cache_salt
            )


def _ports(config: KVEventsConfig) -> PortsOf:
    discovery = config.pod_discovery_config or PodDiscovery()
    events, replay = discovery.socket_port or DEFAULT_PORT, discovery.replay_socket_port or None
    for name, port in (("socketPort", events), ("replaySocketPort", replay)):
        if port is not None and (type(port) is not int or port > 65_535):
            raise _wrong(name, port, "a port")
    return PortsOf(events=events, replay=replay if replay is None or replay > 0 else None)


def _credits(config: IndexerConfig) -> Mapping[str, float]:
    backends = config.kv_cache_backend_configs or []
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


def _wrong(name: str, value: object, wanted: str) -> ConfigError:
    shown = repr(value)[:80]
    return ConfigError(f"Plugin {TYPE!r}: {name} is {shown}.", param="plugins", remedy=f"It must be {wanted}.")
