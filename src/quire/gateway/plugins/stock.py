"""The table of stock plugins: llm-d's types, and quire's own. Out-of-tree plugins stand beside them in the registry."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from quire.core.registry import Registry
from quire.gateway.cost.policy import ExpectedCost
from quire.gateway.flow.stock import flow_plugins
from quire.gateway.plugin import Factory, NoParameters, Parameters, Plugin, Services, plugin_registry, read_parameters
from quire.gateway.plugins import (
    admitters,
    affinity_scorers,
    attributes,
    filters,
    latency,
    load_scorers,
    pickers,
    profiles,
    sessions,
)
from quire.gateway.plugins.reports import Reports
from quire.gateway.producers.known import InflightLoad, InflightLoadParameters, SessionId, SessionIdParameters
from quire.gateway.producers.latency import LatencyParameters, PredictedLatency
from quire.gateway.producers.precise import PreciseParameters, PrecisePrefix
from quire.gateway.producers.prefix import ApproxPrefix, PrefixParameters
from quire.gateway.producers.tokens import TokenParameters, TokenProducer

P = TypeVar("P", bound=Parameters)


@dataclass(frozen=True, slots=True)
class StockPlugin:
    type_name: str
    parameters: type[Parameters]
    build: Callable[[Any, Services], Plugin]
    kind: type[Plugin]

    def make(self, parameters: Mapping[str, Any], services: Services) -> Plugin:
        """Raises `ConfigError` that names the plugin and the parameter."""
        plugin = self.build(read_parameters(self.parameters, parameters, self.type_name, services.warn), services)
        plugin.name = self.type_name
        return plugin


def stock(
    type_name: str, kind: type[Plugin], parameters: type[P], build: Callable[[P, Services], Plugin]
) -> StockPlugin:
    return StockPlugin(type_name, parameters, build, kind)


def plain(type_name: str, kind: Callable[[], Plugin]) -> StockPlugin:
    """One without parameters."""
    assert isinstance(kind, type)
    return StockPlugin(type_name, NoParameters, lambda _parameters, _services: kind(), kind)


def reporting(type_name: str, kind: Callable[[Reports], Plugin]) -> StockPlugin:
    """One without parameters that looks at what endpoints report."""
    assert isinstance(kind, type)
    return StockPlugin(type_name, NoParameters, lambda _, services: kind(Reports.of(services)), kind)


def _picker(type_name: str, kind: type[pickers.Cut]) -> StockPlugin:
    return stock(type_name, kind, pickers.PickerParameters, lambda p, s: kind(p.max_num_of_endpoints, s.rng))


def _role(type_name: str, roles: frozenset[str], *, without: bool) -> StockPlugin:
    return stock(type_name, filters.RoleFilter, NoParameters, lambda _p, _s: filters.RoleFilter(roles, without=without))


SCORERS: Final[Sequence[StockPlugin]] = (
    reporting("queue-scorer", load_scorers.QueueScorer),
    reporting("running-requests-size-scorer", load_scorers.RunningRequestsScorer),
    reporting("kv-cache-utilization-scorer", load_scorers.KvCacheUtilizationScorer),
    reporting("lora-affinity-scorer", load_scorers.LoraAffinityScorer),
    stock(
        "load-aware-scorer",
        load_scorers.LoadAwareScorer,
        load_scorers.LoadAwareParameters,
        lambda p, s: load_scorers.LoadAwareScorer(p.threshold, Reports.of(s)),
    ),
    stock(
        "active-request-scorer",
        load_scorers.ActiveRequestScorer,
        load_scorers.ActiveRequestParameters,
        lambda p, _: load_scorers.ActiveRequestScorer(p.idle_threshold, p.max_busy_score),
    ),
    stock(
        "token-load-scorer",
        load_scorers.TokenLoadScorer,
        load_scorers.TokenLoadParameters,
        lambda p, _: load_scorers.TokenLoadScorer(p.queue_threshold_tokens),
    ),
    stock(
        "prefix-cache-scorer",
        affinity_scorers.PrefixCacheScorer,
        affinity_scorers.PrefixCacheParameters,
        lambda p, _: affinity_scorers.PrefixCacheScorer(p),
    ),
    stock(
        "session-affinity-scorer",
        sessions.SessionScorer,
        sessions.SessionParameters,
        sessions.SessionScorer,
    ),
    stock(
        "no-hit-lru-scorer",
        affinity_scorers.NoHitLru,
        affinity_scorers.NoHitLruParameters,
        lambda p, _: affinity_scorers.NoHitLru(p),
    ),
    stock(
        "latency-scorer",
        latency.LatencyScorer,
        latency.LatencyParameters,
        lambda p, s: latency.LatencyScorer(p, Reports.of(s)),
    ),
    stock(
        "context-length-aware",
        affinity_scorers.ContextLengthAware,
        affinity_scorers.ContextLengthParameters,
        lambda p, _: affinity_scorers.ContextLengthAware(p.label, filtering=p.enable_filtering),
    ),
    stock(
        "header-label-affinity-scorer",
        affinity_scorers.HeaderLabelAffinity,
        affinity_scorers.HeaderLabelParameters,
        lambda p, _: affinity_scorers.HeaderLabelAffinity(p.header_name, p.label_key),
    ),
    stock(
        "endpoint-attribute-scorer",
        attributes.AttributeScorer,
        attributes.AttributeScorerParameters,
        lambda p, s: attributes.AttributeScorer(p, Reports.of(s)),
    ),
)
FILTERS: Final[Sequence[StockPlugin]] = (
    _role("decode-filter", filters.DECODE, without=True),
    _role("prefill-filter", filters.PREFILL, without=False),
    _role("encode-filter", filters.ENCODE, without=False),
    stock("by-label", filters.ByLabel, filters.LabelParameters, lambda p, _: filters.ByLabel(p)),
    stock(
        "label-selector-filter",
        filters.LabelSelector,
        filters.SelectorParameters,
        lambda p, _: filters.LabelSelector(p),
    ),
    stock(
        "prefix-cache-affinity-filter",
        filters.PrefixCacheAffinity,
        filters.AffinityParameters,
        lambda p, s: filters.PrefixCacheAffinity(p, s.rng),
    ),
    stock(
        "slo-headroom-tier-filter",
        latency.SloHeadroomTier,
        latency.HeadroomParameters,
        lambda p, s: latency.SloHeadroomTier(p, s.rng),
    ),
    stock(
        "utilization-filter",
        attributes.UtilizationFilter,
        attributes.UtilizationParameters,
        lambda p, s: attributes.UtilizationFilter(p, Reports.of(s)),
    ),
    stock(
        "endpoint-attribute-filter",
        attributes.AttributeFilter,
        attributes.AttributeFilterParameters,
        lambda p, s: attributes.AttributeFilter(p, Reports.of(s)),
    ),
    stock(
        "session-affinity-filter",
        sessions.SessionFilter,
        sessions.SessionParameters,
        sessions.SessionFilter,
    ),
)
PICKERS: Final[Sequence[StockPlugin]] = (
    _picker("max-score-picker", pickers.MaxScore),
    _picker("random-picker", pickers.RandomPick),
    _picker("weighted-random-picker", pickers.WeightedRandom),
    plain("round-robin-picker", pickers.RoundRobin),
)
HANDLERS: Final[Sequence[StockPlugin]] = (
    plain("single-profile-handler", profiles.SingleProfile),
    stock("disagg-profile-handler", profiles.Disaggregated, profiles.DisaggParameters, profiles.make_disaggregated),
    stock(
        "data-parallel-profile-handler",
        profiles.DataParallel,
        profiles.DataParallelParameters,
        lambda _p, _s: profiles.DataParallel(),
    ),
    stock(
        "header-profile-handler",
        profiles.ByHeader,
        profiles.HeaderProfileParameters,
        lambda p, _: profiles.ByHeader(p.header_name, p.default_profile),
    ),
    stock(
        "prefix-based-pd-decider",
        profiles.PrefixBasedDecider,
        profiles.PrefixDeciderParameters,
        lambda p, _: profiles.PrefixBasedDecider(p),
    ),
    plain("always-disagg-pd-decider", profiles.Always),
    plain("always-disagg-multimodal-decider", profiles.AlwaysMultimodal),
)
ADMITTERS: Final[Sequence[StockPlugin]] = (
    stock(
        "probabilistic-admitter",
        admitters.Probabilistic,
        admitters.ProbabilisticParameters,
        lambda p, s: admitters.Probabilistic(p, s.rng, Reports.of(s)),
    ),
    stock(
        "latency-slo-admitter",
        admitters.LatencySlo,
        admitters.LatencySloParameters,
        lambda _, s: admitters.LatencySlo(Reports.of(s)),
    ),
)
PRODUCERS: Final[Sequence[StockPlugin]] = (
    stock("token-producer", TokenProducer, TokenParameters, TokenProducer),
    stock("approx-prefix-cache-producer", ApproxPrefix, PrefixParameters, ApproxPrefix),
    stock("precise-prefix-cache-producer", PrecisePrefix, PreciseParameters, PrecisePrefix),
    stock("predicted-latency-producer", PredictedLatency, LatencyParameters, lambda _, s: PredictedLatency(s)),
    stock("inflight-load-producer", InflightLoad, InflightLoadParameters, lambda _p, _s: InflightLoad()),
    stock("session-id-producer", SessionId, SessionIdParameters, lambda p, _: SessionId(p.header_name, p.cookie_name)),
)
DEFAULT_POLICY: Final[Sequence[StockPlugin]] = (
    stock("expected-cost-scorer", ExpectedCost, NoParameters, lambda _, s: ExpectedCost(s)),
)
ALIASES: Final[Mapping[str, str]] = {
    "by-label-selector": "label-selector-filter",
    "decode-role": "decode-filter",
    "prefill-role": "prefill-filter",
    "pd-profile-handler": "disagg-profile-handler",
    "latency-slo-admission": "latency-slo-admitter",
    "queue-depth-scorer": "queue-scorer",
    "inflight-load": "inflight-load-producer",
    "in-flight-load-producer": "inflight-load-producer",
    "tokenizer": "token-producer",
    "predicted-latency": "predicted-latency-producer",
    "session-id": "session-id-producer",
}
"""Older names, and what they are called now."""
MEANINGLESS: Final[Mapping[str, str]] = {
    "metrics-data-source": "quire reads every endpoint's metrics anyway",
    "core-metrics-extractor": "quire knows the metrics' names of vLLM, SGLang, TGI and its own",
    "models-data-source": "quire asks every endpoint for its models anyway",
    "models-data-extractor": "quire asks every endpoint for its models anyway",
    "k8s-notification-source": "there is no Kubernetes API here",
    "endpoint-notification-source": "there is no Kubernetes API here",
    "openai-parser": "quire parses OpenAI's and Anthropic's APIs, and passes on everything else",
    "anthropic-parser": "quire parses OpenAI's and Anthropic's APIs, and passes on everything else",
    "vllmhttp-parser": "quire parses OpenAI's and Anthropic's APIs, and passes on everything else",
    "passthrough-parser": "quire passes on what it does not parse",
    "disagg-headers-handler": "disagg-profile-handler sets the headers itself",
    "prefill-header-handler": "disagg-profile-handler sets the headers itself",
    "request-attribute-reporter": "see /explain for what is known of a request",
    "destination-endpoint-served-verifier": "the header is always set",
    "header-based-testing-filter": "it is llm-d's own tests'",
    "dp-rank-header-handler": "each data-parallel rank is an endpoint of its own",
    "topology-extractor": "endpoints tell no topology; label-selector-filter chooses by labels",
    "topology-affinity-filter": "endpoints tell no topology; label-selector-filter chooses by labels",
    "topology-affinity-scorer": "endpoints tell no topology; header-label-affinity-scorer chooses by labels",
    "mm-embeddings-cache-producer": "quire does not follow the engines' caches of images",
    "mm-embeddings-cache-scorer": "quire does not follow the engines' caches of images",
    "p2p-source-producer": "engines here do not pull KV blocks from each other",
    "dcgm-data-source": "quire does not read GPU counters",
    "dcgm-extractor": "quire does not read GPU counters",
    "disaggregatedset-rollout-screener": "there is no Kubernetes API here",
}
"""Types that llm-d knows and that have nothing to do here, each with the reason, which is told."""


STOCK: Final[Sequence[StockPlugin]] = (
    *SCORERS,
    *FILTERS,
    *PICKERS,
    *HANDLERS,
    *ADMITTERS,
    *PRODUCERS,
    *DEFAULT_POLICY,
)


def stock_plugins() -> Registry[Factory]:
    """All of them, flow control's too."""
    registry = plugin_registry()
    for one in STOCK:
        registry.add(one.type_name, one.make)
    for type_name, factory in flow_plugins().items():
        registry.add(type_name, factory)
    return registry
