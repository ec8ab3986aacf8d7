"""The gateway's own metrics: llm-d's names (`llm_d_epp_*`), and `quire_gateway_*` for what llm-d has none of.

Names that callers choose (models, tenants) are labels only for the first `MAX_NAMES` of them; the rest is `other`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.registry import Collector

from quire.gateway.endpoint import Clock, Endpoint, Pool
from quire.gateway.plugin import Conclusion, Observer
from quire.gateway.request import InferenceRequest, Outcome

CONTENT_TYPE = CONTENT_TYPE_LATEST
MAX_NAMES = 1000
_OTHER = "other"
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.4, 0.8, 1.5, 3, 6, 12, 25, 60, 120, 300, 600)
_OVERHEAD = (0.00005, 0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.05, 0.1, 1, 10, 60)
_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072, 1048576)
_BYTES = tuple(float(64 * 4**power) for power in range(12))
_REQUEST = ("model_name", "target_model_name", "priority")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Series:
    """What is counted of requests with the same labels."""

    labels: tuple[str, str, str]
    requests: Counter
    size: Histogram
    running: Gauge
    ttft: Histogram
    duration: Histogram
    input: Histogram
    output: Histogram
    cached: Histogram


class GatewayMetrics(Observer):
    """One registry per gateway."""

    name = "metrics"

    def __init__(self, pool: Pool, clock: Clock, pool_name: str = "default") -> None:
        self._registry = CollectorRegistry()
        self._clock = clock
        self._models: set[str] = set()
        self._series: dict[tuple[str, str, int], _Series] = {}
        self._made: dict[tuple[str, str, str], _Series] = {}
        self._requests = self._counter("llm_d_epp_request", "Requests that came in.", _REQUEST)
        self._errors = self._counter("llm_d_epp_request_error", "Requests that failed.", (*_REQUEST, "error_code"))
        self._duration = self._histogram("llm_d_epp_request_duration_seconds", "From arrival to the end.", _SECONDS)
        self._size = self._histogram("llm_d_epp_request_size_bytes", "Of the body.", _BYTES)
        self._input = self._histogram("llm_d_epp_request_input_tokens", "Prompt tokens.", _TOKENS)
        self._output = self._histogram("llm_d_epp_request_output_tokens", "Tokens generated.", _TOKENS)
        self._cached = self._histogram("llm_d_epp_request_cached_tokens", "Prompt tokens from the cache.", _TOKENS)
        self._running = Gauge("llm_d_epp_request_running", "In flight.", _REQUEST, registry=self._registry)
        self._ttft = self._histogram("llm_d_epp_request_ttft_seconds", "To the first byte.", _SECONDS)
        self._picking = Histogram(
            "llm_d_epp_scheduler_e2e_duration_seconds", "Scheduling.", registry=self._registry, buckets=_OVERHEAD
        )
        self._attempts = self._counter(
            "llm_d_epp_scheduler_attempts", "Choices.", ("status", "endpoint_name", "namespace", "port")
        )
        self._dropped = self._counter("quire_gateway_dropped", "Requests turned away.", ("reason",))
        self._failures = self._counter("quire_gateway_endpoint_failures", "Failed attempts.", ("endpoint", "error"))
        self._retries = self._counter("quire_gateway_retries", "Attempts after the first.", ())
        self._http = self._counter("quire_gateway_http_requests", "HTTP requests answered.", ("route", "status"))
        self._registry.register(_PoolCollector(pool, pool_name))

    def _counter(self, name: str, text: str, labels: tuple[str, ...]) -> Counter:
        return Counter(name, text, labels, registry=self._registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(name, text, _REQUEST, registry=self._registry, buckets=buckets)

    def _bounded(self, model: str) -> str:
        if model in self._models:
            return model
        if len(self._models) >= MAX_NAMES:
            return _OTHER
        self._models.add(model)
        return model

    def _of(self, request: InferenceRequest) -> _Series:
        """The series of a request's labels: looked up once, since a request touches many of them."""
        key = (request.model, request.target_model, request.priority)
        series = self._series.get(key)
        if series is None:
            labels = self._bounded(request.model), self._bounded(request.target_model), str(request.priority)
            series = self._made.get(labels)
            if series is None:
                series = self._made[labels] = _Series(
                    labels=labels,
                    requests=self._requests.labels(*labels),
                    size=self._size.labels(*labels),
                    running=self._running.labels(*labels),
                    ttft=self._ttft.labels(*labels),
                    duration=self._duration.labels(*labels),
                    input=self._input.labels(*labels),
                    output=self._output.labels(*labels),
                    cached=self._cached.labels(*labels),
                )
            if len(self._series) < MAX_NAMES:
                self._series[key] = series
        return series

    def arrived(self, request: InferenceRequest) -> None:
        series = self._of(request)
        series.requests.inc()
        series.size.observe(len(request.body))

    def scheduled(self, endpoint: Endpoint, seconds: float) -> None:
        self._picking.observe(seconds)
        self._attempts.labels("success", endpoint.name, endpoint.namespace, str(endpoint.port)).inc()

    def turned_away(self, reason: str) -> None:
        self._dropped.labels(reason).inc()

    def retried(self) -> None:
        self._retries.inc()

    def http_request(self, route: str, status: int) -> None:
        self._http.labels(route, str(status)).inc()

    def sent(self, request: InferenceRequest, endpoint: Endpoint, choice: Conclusion) -> None:
        self._of(request).running.inc()

    def first_byte(self, request: InferenceRequest, endpoint: Endpoint, ttft: float) -> None:
        self._of(request).ttft.observe(ttft)

    def finished(self, request: InferenceRequest, endpoint: Endpoint, outcome: Outcome) -> None:
        series = self._of(request)
        series.running.dec()
        if not outcome.ok:
            error = outcome.error or str(outcome.status)
            self._failures.labels(endpoint.key, error).inc()
            self._errors.labels(*series.labels, error).inc()
            return
        series.duration.observe(outcome.finished - request.arrived)
        series.input.observe(request.prompt_tokens)
        if outcome.output_tokens is not None:
            series.output.observe(outcome.output_tokens)
        if outcome.cached_tokens is not None:
            series.cached.observe(outcome.cached_tokens)

    def watch(self, name: str, text: str, values: Callable[[], Mapping[str, float]], label: str) -> None:
        """A gauge whose values, by one label, are asked for when the page is read."""
        self._registry.register(_Watched(name, text, values, label))

    def text(self) -> bytes:
        return generate_latest(self._registry)


class _Watched(Collector):
    def __init__(self, name: str, text: str, values: Callable[[], Mapping[str, float]], label: str) -> None:
        self._name, self._text, self._values, self._label = name, text, values, label

    def collect(self) -> list[GaugeMetricFamily]:
        family = GaugeMetricFamily(self._name, self._text, labels=[self._label])
        for key, value in self._values().items():
            family.add_metric([key], value)
        return [family]

    def describe(self) -> list[GaugeMetricFamily]:
        return []


class _PoolCollector(Collector):
    """llm-d's view of the pool, and what this gateway has open at each endpoint."""

    def __init__(self, pool: Pool, name: str) -> None:
        self._pool = pool
        self._name = name

    def describe(self) -> list[GaugeMetricFamily]:
        return []

    def collect(self) -> list[GaugeMetricFamily]:
        known = [endpoint.metrics for endpoint in self._pool if endpoint.metrics is not None]
        count = max(len(known), 1)

        def one(name: str, text: str, value: float) -> GaugeMetricFamily:
            family = GaugeMetricFamily(name, text, labels=["name"])
            family.add_metric([self._name], value)
            return family

        ready = sum(endpoint.available and not endpoint.draining for endpoint in self._pool)
        per_endpoint = [
            self._by_endpoint("llm_d_epp_per_endpoint_queue_size", "Its queue.", _queue),
            self._by_endpoint("quire_gateway_open_requests", "Open there.", lambda e: e.load.requests),
            self._by_endpoint("quire_gateway_endpoint_available", "1: it is.", lambda e: int(e.available)),
        ]
        return [
            one("llm_d_epp_ready_endpoints", "Endpoints that get requests.", ready),
            one("llm_d_epp_average_queue_size", "Mean queue.", sum(m.waiting for m in known) / count),
            one("llm_d_epp_average_running_requests", "Mean running.", sum(m.running for m in known) / count),
            one("llm_d_epp_average_kv_cache_utilization", "Mean KV use.", sum(m.kv_usage for m in known) / count),
            *per_endpoint,
        ]

    def _by_endpoint(self, name: str, text: str, value: Callable[[Endpoint], float | None]) -> GaugeMetricFamily:
        family = GaugeMetricFamily(name, text, labels=["name", "model_server_endpoint"])
        for endpoint in self._pool:
            number = value(endpoint)
            if number is not None:
                family.add_metric([self._name, endpoint.key], number)
        return family


def _queue(endpoint: Endpoint) -> float | None:
    return None if endpoint.metrics is None else endpoint.metrics.waiting
