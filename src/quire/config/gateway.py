"""What decides how the gateway listens, whom it stands before, and how long it waits."""

from __future__ import annotations

from dataclasses import dataclass

from quire.config.server import ListenConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayConfig(ListenConfig):
    """One gateway. Every field is a flag of `quire gateway`."""

    endpoints: str | None = None
    """Model servers, as URLs with commas between: http://127.0.0.1:8001,http://127.0.0.1:8002."""
    endpoints_file: str | None = None
    """A YAML or JSON file of endpoints (name, address, port, labels), read again whenever it changes."""
    endpoints_dns: str | None = None
    """name:port; every address that the name resolves to is an endpoint."""
    policy: str | None = None
    """A YAML file of EndpointPickerConfig, InferenceObjective, InferenceModelRewrite, InferencePool, TrafficPolicy."""
    exact_tokens: bool = False
    """Have an endpoint tokenize each prompt first, so that engines' KV events tell exactly what is cached where."""
    scrape_interval: float = 0.2
    """Seconds between two readings of an endpoint's metrics."""
    health_interval: float = 2.0
    """Seconds between two looks at an endpoint's health and models."""
    connect_timeout: float = 5.0
    """Seconds to connect to an endpoint."""
    first_byte_timeout: float = 600.0
    """Seconds an endpoint may take to begin its answer."""
    idle_timeout: float = 120.0
    """Seconds an endpoint may be silent within an answer."""
    max_retries: int = 2
    """Other endpoints that are tried when one fails before the first byte of its answer."""
    extproc_port: int | None = None
    """Port of Envoy's external processing door (gRPC); none: the door is closed."""
    extproc_max_streams: int = 10_000
    """Requests that may be in Envoy's door at once; a stream above that is refused with RESOURCE_EXHAUSTED."""
    trust_subset_header: bool = False
    """Let x-gateway-destination-endpoint-subset say which endpoints may be chosen: only where an outer gateway sets it
    and removes the clients' own. Envoy says it as metadata, which is always heeded."""
    hedge_delay: float | None = None
    """Seconds after which a second endpoint is asked too when the first has not begun to answer; none: never."""
    explain_requests: int = 10_000
    """Requests whose routing is remembered for /explain."""
