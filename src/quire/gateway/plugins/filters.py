"""Filters: who may serve a request at all. Definitions: llm-d-router, …/scheduling/filter."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Literal

import msgspec

from quire.core.errors import ConfigError
from quire.gateway.endpoint import ROLE_LABEL, Endpoint
from quire.gateway.plugin import Filter, Parameters
from quire.gateway.plugins.affinity_scorers import NO_MATCH, match_ratio, matches_of
from quire.gateway.request import InferenceRequest

DECODE = frozenset({"decode", "prefill-decode", "both", "encode-prefill-decode"})
PREFILL = frozenset({"prefill", "encode-prefill", "prefill-decode", "both", "encode-prefill-decode"})
ENCODE = frozenset({"encode", "encode-prefill", "encode-prefill-decode"})


class RoleFilter(Filter):
    """`decode-filter`, `prefill-filter`, `encode-filter`: by the label llm-d.ai/role."""

    def __init__(self, roles: frozenset[str], *, without: bool) -> None:
        self._roles = roles
        self._without = without

    def filter(self, request: InferenceRequest, candidates: Sequence[Endpoint]) -> Sequence[Endpoint]:
        return [one for one in candidates if self._fits(one.labels.get(ROLE_LABEL))]

    def _fits(self, role: str | None) -> bool:
        return self._without if role is None else role in self._roles


class LabelParameters(Parameters, frozen=True):
    label: str
    valid_values: tuple[str, ...] = ()
    allows_no_label: bool = False


class ByLabel(Filter):
    """`by-label` (deprecated by llm-d)."""

    def __init__(self, parameters: LabelParameters) -> None:
        self._parameters = parameters

    def filter(self, request: InferenceRequest, candidates: Sequence[Endpoint]) -> Sequence[Endpoint]:
        wanted = self._parameters
        values = [(one, one.labels.get(wanted.label)) for one in candidates]
        return [
            one for one, value in values if (wanted.allows_no_label if value is None else value in wanted.valid_values)
        ]


class Expression(Parameters, frozen=True):
    key: str
    operator: Literal["In", "NotIn", "Exists", "DoesNotExist"]
    values: tuple[str, ...] = ()

    def holds(self, labels: Mapping[str, str]) -> bool:
        value = labels.get(self.key)
        if self.operator == "In":
            return value in self.values
        if self.operator == "NotIn":
            return value not in self.values
        return (value is not None) == (self.operator == "Exists")


class SelectorParameters(Parameters, frozen=True):
    match_labels: Mapping[str, str] = {}
    match_expressions: tuple[Expression, ...] = ()


class LabelSelector(Filter):
    """`label-selector-filter`: Kubernetes' label selector."""

    def __init__(self, parameters: SelectorParameters) -> None:
        self._labels = parameters.match_labels
        self._expressions = parameters.match_expressions

    def filter(self, request: InferenceRequest, candidates: Sequence[Endpoint]) -> Sequence[Endpoint]:
        return [
            one
            for one in candidates
            if all(one.labels.get(key) == value for key, value in self._labels.items())
            and all(expression.holds(one.labels) for expression in self._expressions)
        ]


class AffinityParameters(Parameters, frozen=True):
    affinity_threshold: float = 0.80
    exploration_probability: float = 0.0
    max_ttft_penalty_ms: float = msgspec.field(default=18_000.0, name="maxTTFTPenaltyMs")
    ttft_source: Literal["prefillThroughput", "latencyPredictor"] = "prefillThroughput"
    peak_prefill_throughput: float = 15_928.0
    prefix_match_info_producer_name: str = ""
    latency_prediction_info_producer_name: str = ""
    in_flight_load_producer_name: str = ""


class PrefixCacheAffinity(Filter):
    """`prefix-cache-affinity-filter`: only who holds most of the prompt, unless those are too busy for it to pay."""

    def __init__(self, parameters: AffinityParameters, rng: random.Random) -> None:
        if not (0.0 <= parameters.affinity_threshold <= 1.0 and 0.0 <= parameters.exploration_probability <= 1.0):
            raise ConfigError(
                "prefix-cache-affinity-filter: affinityThreshold or explorationProbability is outside of 0 to 1.",
                param="plugins",
                remedy="Both are shares.",
            )
        if parameters.max_ttft_penalty_ms < 0 or parameters.peak_prefill_throughput <= 0:
            raise ConfigError(
                "prefix-cache-affinity-filter: maxTTFTPenaltyMs is negative, or peakPrefillThroughput is not above 0.",
                param="plugins",
                remedy="They are in milliseconds and in tokens per second.",
            )
        self._parameters = parameters
        self._rng = rng

    def filter(self, request: InferenceRequest, candidates: Sequence[Endpoint]) -> Sequence[Endpoint]:
        wanted = self._parameters
        if wanted.exploration_probability and self._rng.random() < wanted.exploration_probability:
            return candidates
        matches = matches_of(request, wanted.prefix_match_info_producer_name)
        sticky = [
            one
            for one in candidates
            if match_ratio(request, matches.get(one.key, NO_MATCH)) >= wanted.affinity_threshold
        ]
        if not sticky or len(sticky) == len(candidates):
            return candidates
        if wanted.max_ttft_penalty_ms:
            keys = {one.key for one in sticky}
            best = self._least(request, sticky)
            other = self._least(request, [one for one in candidates if one.key not in keys])
            if best is None or other is None or best - other > wanted.max_ttft_penalty_ms / 1e3:
                return candidates
        return sticky

    def _least(self, request: InferenceRequest, endpoints: Sequence[Endpoint]) -> float | None:
        """The least TTFT expected of these, in seconds; None: nobody knows."""
        if self._parameters.ttft_source == "latencyPredictor":
            return min(
                (request.predictions[one.key].ttft for one in endpoints if one.key in request.predictions), default=None
            )
        return min(one.load.prefill_tokens for one in endpoints) / self._parameters.peak_prefill_throughput
