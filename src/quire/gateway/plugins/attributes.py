"""Choosing by one number that is known of each endpoint.

Definitions: llm-d-router, …/scorer/endpointattribute, …/filter/endpointattribute, …/filter/utilization. A number is
what a plugin left in `Endpoint.attributes` under the key, or else one of `MEASURES`.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Final, Literal

from quire.core.errors import ConfigError
from quire.gateway.endpoint import Endpoint
from quire.gateway.plugin import Filter, NoParameters, Parameters, Scorer
from quire.gateway.request import InferenceRequest

MEASURES: Final[Mapping[str, Callable[[Endpoint], float | None]]] = {
    "active-requests": lambda one: one.load.requests,
    "running-requests": lambda one: None if one.metrics is None else one.metrics.running,
    "waiting-queue": lambda one: None if one.metrics is None else one.metrics.waiting,
    "kv-cache-utilization": lambda one: None if one.metrics is None else one.metrics.kv_usage,
}
_OPERATORS: Final[Mapping[str, Callable[[float, float], bool]]] = {
    "LessThan": operator.lt,
    "LessThanOrEqual": operator.le,
    "GreaterThan": operator.gt,
    "GreaterThanOrEqual": operator.ge,
    "Equal": operator.eq,
    "NotEqual": operator.ne,
}


def number_of(endpoint: Endpoint, key: str) -> float | None:
    found = endpoint.attributes.get(key)
    if isinstance(found, int | float) and not math.isnan(found):
        return float(found)
    measure = MEASURES.get(key)
    return None if measure is None else measure(endpoint)


class FixedRange(Parameters, frozen=True):
    min: float
    max: float


class Normalization(Parameters, frozen=True):
    fixed_range: FixedRange | None = None
    adaptive_range: NoParameters | None = None


class ScoreAlgorithm(Parameters, frozen=True):
    type: Literal["linear_lower_is_better", "linear_higher_is_better"]
    normalization: Normalization = Normalization()


class AttributeScorerParameters(Parameters, frozen=True):
    attribute_key: str
    algorithm: ScoreAlgorithm


class AttributeScorer(Scorer):
    """`endpoint-attribute-scorer`: where the number lies between the least and the most: of the candidates, or of a
    fixed range. Who has none gets 0; all alike get 1."""

    def __init__(self, parameters: AttributeScorerParameters) -> None:
        normalization = parameters.algorithm.normalization
        fixed = normalization.fixed_range
        if fixed is not None and (
            normalization.adaptive_range is not None or not -math.inf < fixed.min < fixed.max < math.inf
        ):
            raise ConfigError(
                "endpoint-attribute-scorer: fixedRange stands alone, its ends are finite, and its min is below its max.",
                param="plugins",
                remedy="Correct algorithm.normalization.",
            )
        self._key = parameters.attribute_key
        self._lower = parameters.algorithm.type == "linear_lower_is_better"
        self._fixed = fixed

    def score(self, request: InferenceRequest, candidates: Sequence[Endpoint]) -> Sequence[float]:
        numbers = [number_of(endpoint, self._key) for endpoint in candidates]
        known = [number for number in numbers if number is not None]
        if not known:
            return [0.0] * len(numbers)
        if self._fixed is not None:
            least, most = self._fixed.min, self._fixed.max
        else:
            least, most = min(known), max(known)
        return [0.0 if number is None else self._place(number, least, most) for number in numbers]

    def _place(self, number: float, least: float, most: float) -> float:
        if least == most:
            return 1.0
        place = min(max((number - least) / (most - least), 0.0), 1.0)
        return 1.0 - place if self._lower else place


class Threshold(Parameters, frozen=True):
    operator: Literal["LessThan", "LessThanOrEqual", "GreaterThan", "GreaterThanOrEqual", "Equal", "NotEqual"]
    value: float


class FilterAlgorithm(Parameters, frozen=True):
    type: Literal["threshold"]
    threshold: Threshold


class AttributeFilterParameters(Parameters, frozen=True):
    attribute: str
    algorithm: FilterAlgorithm
    on_missing: Literal["Pass", "Fail"] = "Pass"
    fallback_on_empty: bool = False


class AttributeFilter(Filter):
    """`endpoint-attribute-filter`: those whose number compares as wanted."""

    def __init__(self, parameters: AttributeFilterParameters) -> None:
        threshold = parameters.algorithm.threshold
        self._parameters = parameters
        self._holds, self._value = _OPERATORS[threshold.operator], threshold.value

    def filter(self, request: InferenceRequest, candidates: Sequence[Endpoint]) -> Sequence[Endpoint]:
        left = [endpoint for endpoint in candidates if self._fits(number_of(endpoint, self._parameters.attribute))]
        return candidates if not left and self._parameters.fallback_on_empty else left

    def _fits(self, number: float | None) -> bool:
        return self._parameters.on_missing == "Pass" if number is None else self._holds(number, self._value)


class Condition(Parameters, frozen=True):
    metric: Literal["active-requests", "running-requests", "waiting-queue", "kv-cache-utilization"]
    max_value: float


class UtilizationParameters(Parameters, frozen=True):
    conditions: tuple[Condition, ...]
    fallback_on_empty: bool = False


class UtilizationFilter(Filter):
    """`utilization-filter`: not who is above any of the bounds; who has not reported yet is not."""

    def __init__(self, parameters: UtilizationParameters) -> None:
        if not parameters.conditions:
            raise ConfigError("utilization-filter lacks conditions.", param="plugins", remedy="Give one or more.")
        for condition in parameters.conditions:
            most = 1.0 if condition.metric == "kv-cache-utilization" else float("inf")
            if not 0.0 <= condition.max_value <= most:
                raise ConfigError(
                    f"utilization-filter: maxValue of {condition.metric} is {condition.max_value}.",
                    param="plugins",
                    remedy=f"It is from 0 to {most}.",
                )
        self._parameters = parameters

    def filter(self, request: InferenceRequest, candidates: Sequence[Endpoint]) -> Sequence[Endpoint]:
        left = [endpoint for endpoint in candidates if self._fits(endpoint)]
        return candidates if not left and self._parameters.fallback_on_empty else left

    def _fits(self, endpoint: Endpoint) -> bool:
        numbers = [(MEASURES[one.metric](endpoint), one.max_value) for one in self._parameters.conditions]
        return all(number is None or number <= most for number, most in numbers)
