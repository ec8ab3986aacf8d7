"""The model servers behind the gateway, what they last said of themselves, and what the gateway has open at them.

An `Endpoint` is one object for as long as its server is known. Each of its changing fields has one writer, named
below; everything runs on one event loop, so that readers see them whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final

Clock = Callable[[], float]
"""Seconds that never go back, `time.monotonic` outside of tests and simulation."""

ROLE_LABEL: Final = "llm-d.ai/role"
"""prefill, decode, prefill-decode, encode …; an endpoint without it does everything."""
STATE_LABEL: Final = "quire.ai/state"
"""ready or draining; what the fleet says of it."""
ENGINE_LABEL: Final = "llm-d.ai/engine-type"
"""vllm, sglang, quire …: by which names its metrics go."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EndpointMetrics:
    """What a server said on its metrics page (vLLM's, SGLang's or quire's names)."""

    time: float
    """When it was read, by the gateway's clock."""
    waiting: int = 0
    running: int = 0
    kv_usage: float = 0.0
    """Of the KV cache, 0 to 1."""
    block_size: int | None = None
    num_blocks: int | None = None
    max_lora: int = 0
    active_adapters: frozenset[str] = frozenset()
    waiting_adapters: frozenset[str] = frozenset()
    waiting_tokens: int | None = None
    """Prompt tokens in its queue; only quire says."""
    prefill_seconds_per_token: float | None = None
    decode_seconds_per_step: float | None = None
    kv_events_port: int | None = None
    """Where it tells its KV events, and what was missed of them; only quire says."""
    kv_replay_port: int | None = None


@dataclass(slots=True)
class Load:
    """What this gateway has open at one endpoint, counted from the moment of the choice."""

    requests: int = 0
    prefill_tokens: int = 0
    """Prompt tokens expected to be computed (not cached) by requests without a first byte so far."""
    tokens: int = 0
    """Prompt and expected output tokens of open requests."""


@dataclass(slots=True)
class Endpoint:
    """`host:port` of one model server. Identity is `key`; labels are discovery's."""

    name: str
    host: str
    port: int
    namespace: str = "default"
    scheme: str = "http"
    labels: Mapping[str, str] = field(default_factory=dict)
    """Written by discovery."""
    models: frozenset[str] | None = None
    """Names it answers to, adapters too; None while unknown: any. Written by the health checks."""
    metrics: EndpointMetrics | None = None
    """Written by the scraper; None until a page was read."""
    load: Load = field(default_factory=Load)
    """Written by the director."""
    available: bool = True
    """False while ejected or found dead. Written by resilience."""
    attributes: dict[str, object] = field(default_factory=dict)
    """What plugins keep about it, under the plugin's name."""

    @property
    def key(self) -> str:
        return f"{self.namespace}/{self.name}"

    @property
    def address(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def url(self) -> str:
        return f"{self.scheme}://{self.address}"

    @property
    def draining(self) -> bool:
        return self.labels.get(STATE_LABEL) == "draining"

    def metrics_age(self, now: float) -> float:
        """Seconds since its metrics were read; infinite when they never were."""
        return float("inf") if self.metrics is None else now - self.metrics.time


class Pool:
    """The endpoints that are known. `watch` tells of arrivals and departures: KV indices, scrapers and pools of
    connections follow it."""

    def __init__(self) -> None:
        self._endpoints: dict[str, Endpoint] = {}
        self._all: tuple[Endpoint, ...] = ()
        self._arrived: list[Callable[[Endpoint], None]] = []
        self._left: list[Callable[[Endpoint], None]] = []

    def watch(self, arrived: Callable[[Endpoint], None], left: Callable[[Endpoint], None]) -> None:
        """`arrived` is called for those already there, too."""
        self._arrived.append(arrived)
        self._left.append(left)
        for endpoint in self._all:
            arrived(endpoint)

    def put(self, endpoint: Endpoint) -> Endpoint:
        """Add, or change the labels of, the endpoint of this key. Another address is another server: the old one
        leaves first. Returns the object that the pool keeps."""
        known = self._endpoints.get(endpoint.key)
        if known is not None:
            if (known.scheme, known.host, known.port) == (endpoint.scheme, endpoint.host, endpoint.port):
                known.labels = endpoint.labels
                return known
            self.remove(endpoint.key)
        self._endpoints[endpoint.key] = endpoint
        self._all = tuple(self._endpoints.values())
        for arrived in self._arrived:
            arrived(endpoint)
        return endpoint

    def remove(self, key: str) -> None:
        endpoint = self._endpoints.pop(key, None)
        if endpoint is None:
            return
        self._all = tuple(self._endpoints.values())
        for left in self._left:
            left(endpoint)

    def get(self, key: str) -> Endpoint | None:
        return self._endpoints.get(key)

    @property
    def all(self) -> tuple[Endpoint, ...]:
        return self._all

    def __iter__(self) -> Iterator[Endpoint]:
        return iter(self._all)

    def __len__(self) -> int:
        return len(self._all)
