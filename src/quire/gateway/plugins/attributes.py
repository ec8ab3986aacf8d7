"""Choosing by one number that is known of each endpoint.

Definitions: llm-d-router, …/scorer/endpointattribute, …/filter/endpointattribute, …/filter/utilization. A number is
what a plugin left in `Endpoint.attributes` under the key, or else `ACTIVE` or one of `MEASURES`.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Final, Literal

from quire.core.errors import ConfigError
from quire.gateway.endpoint import Endpoint, EndpointMetrics
from quire.gateway.plugin import Filter, NoParameters, Parameters, Scorer
from quire.gateway.plugins.reports import Reports, fill
from quire.gateway.request import InferenceRequest

ACTIVE: Final = "active-requests"
"""What this gateway has open there."""
MEASURES: Final[Mapping[str, Callable[[EndpointMetrics], float]]] = {
    "running-requests": lambda metrics: metrics.running,
    "waiting-queue": lambda metrics: metrics.waiting,
    "kv-cache-utilization": lambda metrics: metrics.kv_usage,
}
"""What endpoints report."""
_OPERATORS: Final[Mapping[str, Callable[[float, float], bool]]] = {
    "LessThan": operator.lt,
    "LessThanOrEqual": operator.le,
    "GreaterThan": operator.gt,
    "GreaterThanOrEqual": operator.ge,
    "Equal": operator.eq,
    "NotEqual": operator.ne,
}


def numbers_of(endpoints: Sequence[Endpoint], key: str, reports: Reports) -> Sequence[float | None]:
    """For each endpoint; None where nobody knows, or not of late."""
    numbers = [_attribute(endpoint, key) for endpoint in endpoints]
    if None not in numbers:
        return numbers
    if key == ACTIVE:
        others: Sequence[float | None] = [endpoint.load.requests for endpoint in endpoints]
    elif key in MEASURES:
        of = MEASURES[key]
        others = [None if metrics is None else of(metrics) for metrics in reports.fresh(endpoints)]
    else:
        return numbers
    return [other if number is None else number for number, other in zip(numbers, others, strict=True)]


def numbers_or_mean(endpoints: Sequence[Endpoint], key: str, reports: Reports) -> Sequence[float | None]:
    """Of what endpoints report, the mean of the others in place of what one did not."""
    numbers = numbers_of(endpoints, key, reports)
    return fill(numbers) if key in MEASURES and any(number is not None for number in numbers) else numbers


def _attribute(endpoint: Endpoint, key: str) -> float | None:
    """What a plugin left there, if it is a number that can be compared."""
    found = endpoint.attributes.get(key)
    if not isinstance(found, int | float):
        return None
    try:
        return float(found) if math.isfinite(found) else None
    except OverflowError:
        return None


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

    def __init__(self, parameters: AttributeScorerParameters, reports: Reports) -> None:
        self._reports = reports
        normalization = parameters.algorithm.normalization
        fixed = normalization.fixed_range
        if fixed is not None and (
            normalization.adaptive_range is not None or not -math.inf < fixed.min < fixed.max < math.inf
        ):
            raise ConfigError(
                "endpoint-attribute-scorer: fixedRange stands alone, is finite, and its min is below its max.",
                param="plugins",
                remedy="Correct algorithm.normalization.",
            )
        self._key = parameters.attribute_key
        self._lower = parameters.algorithm.type == "linear_lower_is_better"
        self._fixed = fixed

    def score(self, request: InferenceRequest, candidates: Sequence[Endpoint]) -> Sequence[float]:
        numbers = numbers_or_mean(candidates, self._key, self._reports)
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

    def __init__(self, parameters: AttributeFilterParameters, reports: Reports) -> None:
        self._reports = reports
        threshold = parameters.algorithm.threshold
        self._parameters = parameters
        self._holds, self._value = _OPERATORS[threshold.operator], threshold.value

    def filter(self, request: InferenceRequest, candidates: Sequence[Endpoint]) -> Sequence[Endpoint]:
        numbers = numbers_of(candidates, self._parameters.attribute, self._reports)
        left = [endpoint for endpoint, number in zip(candidates, numbers, strict=True) if self._fits(number)]
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
    """`utilization-filter`: not who is above any of the bounds; where nobody's report is fresh nobody is."""

    def __init__(self, parameters: UtilizationParameters, reports: Reports) -> None:
        self._reports = reports
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
        fits = [True] * len(candidates)
        for one in self._parameters.conditions:
            for index, number in enumerate(numbers_or_mean(candidates, one.metric, self._reports)):
                fits[index] &= number is None or number <= one.max_value
        left = [endpoint for endpoint, fit in zip(candidates, fits, strict=True) if fit]
        return candidates if not left and self._parameters.fallback_on_empty else left
