"""Prometheus metrics: vLLM's names, which dashboards and routers read, and `quire_*` for what vLLM has none of."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from quire.core.model_info import ModelInfo
from quire.core.request import EngineOutput, EngineRequest, FinishReason
from quire.wire.rpc import Stats

if TYPE_CHECKING:
    from quire.serve.generation import Choice

CONTENT_TYPE = CONTENT_TYPE_LATEST

_TTFT = (
    0.001,
    0.005,
    0.01,
    0.02,
    0.04,
    0.06,
    0.08,
    0.1,
    0.25,
    0.5,
    0.75,
    1,
    2.5,
    5,
    7.5,
    10,
    20,
    40,
    80,
    160,
    640,
    2560,
)
_ITL = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
_LATENCY = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)
_ITERATION = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
_N = (1, 2, 5, 10, 20)
_PREEMPTIONS = (1, 2, 3, 4, 5, 10, 20)
_ENDS = ("stop", "length", "abort", "error")
_LABELS = ("model_name", "engine")
_ENGINE = "0"
"""The engine's number among several behind one front end, as vLLM counts them; here there is one."""


def _one_two_five(largest: int) -> list[float]:
    """1, 2, 5, 10, 20, 50 … up to `largest`: the buckets of token counts."""
    buckets: list[float] = []
    power = 1
    while power <= largest:
        buckets.extend(step * power for step in (1, 2, 5) if step * power <= largest)
        power *= 10
    return buckets


class Metrics:
    """Every metric of one server, in a registry of its own.

    The token histograms' buckets end at the model's context, so that they are made when the first engine is ready.
    """

    def __init__(self, model_name: str) -> None:
        self._registry = CollectorRegistry()
        self._model_name = model_name
        self._last: Stats | None = None
        self._engine_gauges()
        self._engine_counters()
        self._latencies()
        self._front_end()
        self._token_histograms: dict[str, Histogram] = {}

    # --- making them --------------------------------------------------------------------------------------------

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(name, text, _LABELS, registry=self._registry).labels(self._model_name, _ENGINE)

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(name, text, _LABELS, registry=self._registry).labels(self._model_name, _ENGINE)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...] | list[float]) -> Histogram:
        histogram = Histogram(name, text, _LABELS, registry=self._registry, buckets=buckets)
        return histogram.labels(self._model_name, _ENGINE)

    def _engine_gauges(self) -> None:
        self._running = self._gauge("vllm:num_requests_running", "Requests in execution.")
        self._waiting = self._gauge("vllm:num_requests_waiting", "Requests waiting to be scheduled.")
        self._kv_usage = self._gauge("vllm:kv_cache_usage_perc", "KV cache in use; 1 is all of it.")
        self._waiting_tokens = self._gauge("quire_num_waiting_tokens", "Prompt tokens waiting to be scheduled.")
        self._cached_blocks = self._gauge("quire_num_cached_blocks", "KV blocks that the prefix cache holds.")
        self._costs = {
            "prefill_seconds_per_token": self._gauge(
                "quire_prefill_seconds_per_token", "Of late; 0 until a prompt was computed."
            ),
            "decode_seconds_per_step": self._gauge(
                "quire_decode_seconds_per_step", "Of steps that only decode, of late; 0 until there was one."
            ),
            "decode_seconds_per_sequence": self._gauge(
                "quire_decode_seconds_per_sequence", "The same, shared among the requests of a step."
            ),
        }
        # Routers look for it to know which adapters are loaded; there are none.
        self._lora = Gauge(
            "vllm:lora_requests_info",
            "Adapters in use; the value is when that was so, in seconds since the epoch.",
            [*_LABELS, "max_lora", "running_lora_adapters", "waiting_lora_adapters"],
            registry=self._registry,
        ).labels(self._model_name, _ENGINE, "0", "", "")
        self._kv_events = Gauge(
            "quire_kv_events_info",
            "Where the engine publishes its KV events.",
            [*_LABELS, "endpoint", "replay_endpoint", "topic"],
            registry=self._registry,
        )

    def _engine_counters(self) -> None:
        self._totals = {
            "prefix_cache_queries": self._counter("vllm:prefix_cache_queries", "Tokens looked up in the prefix cache."),
            "prefix_cache_hits": self._counter("vllm:prefix_cache_hits", "Tokens found in the prefix cache."),
            "num_preemptions": self._counter("vllm:num_preemptions", "Preemptions."),
            "num_swaps": self._counter("quire_num_swaps", "Preemptions that went to host memory."),
            "prompt_tokens": self._counter("vllm:prompt_tokens", "Prompt tokens processed."),
            "generation_tokens": self._counter("vllm:generation_tokens", "Tokens generated."),
            "kv_event_batches": self._counter("quire_kv_event_batches", "Batches of KV events published."),
            "kv_event_batches_dropped": self._counter(
                "quire_kv_event_batches_dropped",
                "Batches of KV events that were lost: the queue was full, or publishing failed.",
            ),
        }
        self._iteration_tokens = self._histogram("vllm:iteration_tokens_total", "Tokens per engine step.", _ITERATION)
        self._cache_config = Gauge(
            "vllm:cache_config_info",
            "The KV cache.",
            [*_LABELS, "block_size", "num_gpu_blocks", "cache_dtype"],
            registry=self._registry,
        )

    def _latencies(self) -> None:
        def seconds(name: str, text: str, buckets: tuple[float, ...] = _LATENCY) -> Histogram:
            return self._histogram(f"vllm:{name}_seconds", text, buckets)

        self._ttft = seconds("time_to_first_token", "From arrival to the first token.", _TTFT)
        self._itl = seconds("inter_token_latency", "Between two tokens of a request.", _ITL)
        self._tpot = seconds("request_time_per_output_token", "Mean time per output token of a request.", _ITL)
        self._e2e = seconds("e2e_request_latency", "From arrival to the last token.")
        self._queue_time = seconds("request_queue_time", "From arrival to the first step.")
        self._prefill_time = seconds("request_prefill_time", "From the first step to the first token.")
        self._decode_time = seconds("request_decode_time", "From the first token to the last.")
        self._inference_time = seconds("request_inference_time", "From the first step to the last token.")
        self._success = Counter(
            "vllm:request_success", "Requests that ended.", [*_LABELS, "finished_reason"], registry=self._registry
        )
        for reason in _ENDS:  # at 0 from the start, so that a rate can be told from the first one on
            self._ended(reason)
        self._preemptions = self._histogram("vllm:request_num_preemptions", "Preemptions per request.", _PREEMPTIONS)

    def _front_end(self) -> None:
        self._rejections = Counter(
            "vllm:admission_rejections", "Requests refused.", [*_LABELS, "reason"], registry=self._registry
        )
        self._restarts = self._counter("quire_engine_restarts", "Engine deaths that were noticed.")
        self._replayed = self._counter("quire_requests_replayed", "Requests run again after an engine's death.")
        self._heartbeat = self._gauge("quire_engine_heartbeat_age_seconds", "Age of the engine's last word; -1: none.")
        self._in_flight = self._gauge("quire_requests_in_flight", "Requests that the front end has open.")
        self._http = Counter(
            "quire_http_requests", "HTTP requests answered.", ["route", "status"], registry=self._registry
        )

    def _make_token_histograms(self, max_model_len: int) -> None:
        buckets = _one_two_five(max_model_len)
        texts = {
            "request_prompt_tokens": "Prompt tokens per request.",
            "request_generation_tokens": "Generated tokens per request.",
            "request_max_num_generation_tokens": "Generated tokens of the longest of a request's n samples.",
            "request_prefill_kv_computed_tokens": "Prompt tokens per request that were not in the prefix cache.",
            "request_params_max_tokens": "max_tokens of requests.",
        }
        for name, text in texts.items():
            self._token_histograms[name] = self._histogram(f"vllm:{name}", text, buckets)
        self._token_histograms["request_params_n"] = self._histogram("vllm:request_params_n", "n of requests.", _N)

    # --- what the engine tells ----------------------------------------------------------------------------------

    def engine_ready(self, model: ModelInfo) -> None:
        self._last = None
        if not self._token_histograms:
            self._make_token_histograms(model.max_model_len)
        self._cache_config.clear()
        sizes = str(model.block_size), str(model.num_blocks)
        self._cache_config.labels(self._model_name, _ENGINE, *sizes, model.dtype).set(1)
        self._kv_events.clear()
        if (events := model.kv_events) is not None:
            place = events.endpoint, events.replay_endpoint or "", events.topic
            self._kv_events.labels(self._model_name, _ENGINE, *place).set(1)

    def engine_stats(self, stats: Stats) -> None:
        """Totals restart with the engine; ours go on, so that what is added is the difference."""
        for name, counter in self._totals.items():
            before = getattr(self._last, name) if self._last is not None else 0
            counter.inc(max(0, getattr(stats, name) - before))
        self._last = stats
        self._running.set(stats.num_running)
        self._waiting.set(stats.num_waiting)
        self._waiting_tokens.set(stats.num_waiting_tokens)
        self._kv_usage.set(stats.kv_cache_usage)
        self._cached_blocks.set(stats.num_cached_blocks)
        for name, gauge in self._costs.items():
            gauge.set(getattr(stats, name))
        self._lora.set_to_current_time()
        for tokens in stats.iteration_tokens:
            self._iteration_tokens.observe(tokens)

    def engine_died(self) -> None:
        self._restarts.inc()
        self._running.set(0)
        self._waiting.set(0)
        self._waiting_tokens.set(0)
        self._kv_usage.set(0)
        self._cached_blocks.set(0)

    def requests_replayed(self, count: int) -> None:
        self._replayed.inc(count)

    # --- what requests tell -------------------------------------------------------------------------------------

    def first_token(self, seconds: float) -> None:
        self._ttft.observe(seconds)

    def next_tokens(self, seconds: float, count: int) -> None:
        for _ in range(count):
            self._itl.observe(seconds / count)

    def request_finished(self, choice: Choice, now: float) -> None:
        arrival = choice.request.arrival_time
        assert choice.finish_reason is not None
        self._ended(choice.finish_reason).inc()
        self._preemptions.observe(choice.num_preemptions)
        self._e2e.observe(now - arrival)
        if choice.first_token_at is not None and choice.num_tokens > 1:
            self._tpot.observe((now - choice.first_token_at) / (choice.num_tokens - 1))
        times = choice.times
        if times is not None and times.first_scheduled is not None:
            self._queue_time.observe(times.first_scheduled - times.arrival)
            # A stop string is found here, and its token's time is ours: the engine does not know that it was the last.
            last_token = choice.last_token_at if isinstance(choice.stop_reason, str) else times.last_token
            if times.first_token is not None and last_token is not None:
                self._prefill_time.observe(times.first_token - times.first_scheduled)
                self._decode_time.observe(last_token - times.first_token)
                self._inference_time.observe(last_token - times.first_scheduled)
        histograms = self._token_histograms
        num_prompt_tokens = len(choice.request.prompt_token_ids)
        histograms["request_prompt_tokens"].observe(num_prompt_tokens)
        histograms["request_prefill_kv_computed_tokens"].observe(num_prompt_tokens - choice.num_cached_tokens)
        histograms["request_generation_tokens"].observe(choice.num_tokens)
        histograms["request_params_max_tokens"].observe(choice.request.sampling.max_tokens or 0)

    def pooling_finished(self, request: EngineRequest, output: EngineOutput, now: float) -> None:
        """A pooling request got its result; it has no tokens, and so no part in what is told of tokens."""
        self._ended(FinishReason.STOP).inc()
        self._preemptions.observe(output.num_preemptions)
        self._e2e.observe(now - request.arrival_time)
        times = output.times
        if times is not None and times.first_scheduled is not None:
            self._queue_time.observe(times.first_scheduled - times.arrival)
        histograms = self._token_histograms
        num_prompt_tokens = len(request.prompt_token_ids)
        histograms["request_prompt_tokens"].observe(num_prompt_tokens)
        histograms["request_prefill_kv_computed_tokens"].observe(num_prompt_tokens - output.num_cached_tokens)

    def prompt_finished(self, n: int, most_tokens: int) -> None:
        """All `n` samples of a prompt have ended; the longest has `most_tokens`."""
        self._token_histograms["request_params_n"].observe(n)
        self._token_histograms["request_max_num_generation_tokens"].observe(most_tokens)

    def requests_aborted(self, count: int) -> None:
        self._ended("abort").inc(count)

    def request_failed(self, code: str) -> None:
        self._ended("error").inc()
        if code in ("queue_full", "deadline_exceeded", "draining"):
            self.call_refused(code)

    def call_refused(self, code: str) -> None:
        self._rejections.labels(self._model_name, _ENGINE, code).inc()

    def _ended(self, reason: str) -> Counter:
        return self._success.labels(self._model_name, _ENGINE, reason)

    def http_request(self, route: str, status: int) -> None:
        self._http.labels(route, str(status)).inc()

    # --- reading them -------------------------------------------------------------------------------------------

    def watch(self, heartbeat_age: Callable[[], float | None], in_flight: Callable[[], int]) -> None:
        """Gauges that are read when they are asked for."""
        self._heartbeat.set_function(lambda: -1.0 if (age := heartbeat_age()) is None else age)
        self._in_flight.set_function(lambda: float(in_flight()))

    def text(self) -> bytes:
        return generate_latest(self._registry)
