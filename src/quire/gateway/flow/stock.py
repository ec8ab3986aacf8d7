"""Flow control's plugins by their types, with llm-d's parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isfinite
from typing import Any, ClassVar, Final, Literal

import structlog

from quire.core.errors import ConfigError
from quire.gateway.flow.attained import LeastAttainedService
from quire.gateway.flow.limits import ExplicitHoldback, PriorityHoldback, SoftReflectiveCeiling, StaticLimit
from quire.gateway.flow.policies import (
    EarliestDeadlineFirst,
    FirstComeFirstServed,
    GlobalStrict,
    RoundRobin,
    SloDeadline,
)
from quire.gateway.flow.saturation import Concurrency, EngineQueues, Highest, SaturationDetector, Utilization
from quire.gateway.flow.units import parse_duration
from quire.gateway.plugin import Factory, NoParameters, Parameters, Plugin, Services, read_parameters

SHORTEST_STALENESS: Final = 1.0
"""Seconds. The gateway reads metrics five times a second, and less often where that fails: with less, one failed
reading would make an endpoint full."""


class _EngineQueues(Parameters, frozen=True):
    queue_depth_threshold: int = 5
    metrics_staleness_threshold: str = "2s"


class _Utilization(Parameters, frozen=True):
    queue_depth_threshold: int = 5
    kv_cache_util_threshold: float = 0.8
    metrics_staleness_threshold: str = "2s"
    staleness_policy: Literal["saturated", "ignore"] = "saturated"
    headroom: float = 0.0
    in_flight_load_producer_name: str = ""
    """Taken and not needed: what is in flight is always counted."""


class _Concurrency(Parameters, frozen=True):
    concurrency_mode: Literal["requests", "tokens", "hybrid"] = "requests"
    max_concurrency: int = 100
    max_token_concurrency: int = 1_000_000
    headroom: float = 0.0


class _Highest(Parameters, frozen=True):
    detectors: tuple[str, ...] = ()
    stages: Mapping[str, Sequence[str]] = {}


class _Static(Parameters, frozen=True):
    threshold: float = 1.0


class _Holdback(Parameters, frozen=True):
    shape: Literal["linear"] | None = None
    domain: Literal["rank", "value", "explicit"] = "rank"
    min_ceiling: float | None = None
    max_ceiling: float | None = None
    ceilings: Mapping[str | int, float] | None = None


class _ProgramAware(Parameters, frozen=True):
    WITHOUT_EFFECT: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys(("lasWeightService", "lasWeightHeadWait"), "flows are ranked by what they were given alone"),
        **dict.fromkeys(("evictionTtlSeconds", "evictionSweepSeconds"), "accounts go by decay, and by their number"),
    }
    strategy: Literal["las"] = "las"
    las_decay_factor: float = 0.99997
    las_half_life_seconds: float = 60.0


def flow_plugins() -> Mapping[str, Factory]:
    """By type, for the registry of plugins."""
    return {
        "global-strict-fairness-policy": _plain(GlobalStrict, "global-strict-fairness-policy"),
        "round-robin-fairness-policy": _plain(RoundRobin, "round-robin-fairness-policy"),
        "program-aware-fairness": _program_aware,
        "fcfs-ordering-policy": _plain(FirstComeFirstServed, "fcfs-ordering-policy"),
        "edf-ordering-policy": _plain(EarliestDeadlineFirst, "edf-ordering-policy"),
        "slo-deadline-ordering-policy": _plain(SloDeadline, "slo-deadline-ordering-policy"),
        "static-usage-limit-policy": _static,
        "priority-holdback-policy": _holdback,
        "soft-reflective-ceiling-policy": _plain(SoftReflectiveCeiling, "soft-reflective-ceiling-policy"),
        "engine-queue-detector": _engine_queues,
        "utilization-detector": _utilization,
        "concurrency-detector": _concurrency,
        "max-saturation-detector": _highest,
    }


def _plain(kind: type[Plugin], plugin: str) -> Factory:
    def make(parameters: Mapping[str, Any], services: Services) -> Plugin:
        read_parameters(NoParameters, parameters, plugin, services.warn)
        return kind()

    return make


def _check(holds: bool, plugin: str, what: str) -> None:
    if not holds:
        raise ConfigError(f"Plugin {plugin!r}: {what}.", param="plugins", remedy="Change its parameters.")


def _engine_queues(parameters: Mapping[str, Any], services: Services) -> Plugin:
    name = "engine-queue-detector"
    given = read_parameters(_EngineQueues, parameters, name, services.warn)
    _check(given.queue_depth_threshold > 0, name, "queueDepthThreshold must be above 0")
    return EngineQueues(given.queue_depth_threshold, _staleness(given.metrics_staleness_threshold, name))


def _staleness(asked: str, plugin: str) -> float:
    seconds = parse_duration(asked, f"{plugin}.metricsStalenessThreshold")
    _check(seconds > 0, plugin, "metricsStalenessThreshold must be above 0")
    if seconds < SHORTEST_STALENESS:
        structlog.get_logger().warning(
            "staleness_threshold_raised", plugin=plugin, asked_seconds=seconds, used_seconds=SHORTEST_STALENESS
        )
    return max(seconds, SHORTEST_STALENESS)


def _utilization(parameters: Mapping[str, Any], services: Services) -> Plugin:
    name = "utilization-detector"
    given = read_parameters(_Utilization, parameters, name, services.warn)
    staleness = _staleness(given.metrics_staleness_threshold, name)
    _check(given.queue_depth_threshold > 0, name, "queueDepthThreshold must be above 0")
    _check(0.0 < given.kv_cache_util_threshold <= 1.0, name, "kvCacheUtilThreshold must be above 0, up to 1")
    _check(given.headroom >= 0.0 and isfinite(given.headroom), name, "headroom must not be negative")
    return Utilization(
        queue_depth=given.queue_depth_threshold,
        kv_use=given.kv_cache_util_threshold,
        staleness=staleness,
        stale=given.staleness_policy,
        headroom=given.headroom,
        now=services.clock,
    )


def _concurrency(parameters: Mapping[str, Any], services: Services) -> Plugin:
    name = "concurrency-detector"
    given = read_parameters(_Concurrency, parameters, name, services.warn)
    _check(given.max_concurrency > 0, name, "maxConcurrency must be above 0")
    _check(given.max_token_concurrency > 0, name, "maxTokenConcurrency must be above 0")
    _check(given.headroom >= 0.0 and isfinite(given.headroom), name, "headroom must not be negative")
    mode = given.concurrency_mode
    return Concurrency(
        requests=None if mode == "tokens" else given.max_concurrency,
        tokens=None if mode == "requests" else given.max_token_concurrency,
        headroom=given.headroom,
    )


def _highest(parameters: Mapping[str, Any], services: Services) -> Plugin:
    name = "max-saturation-detector"
    given = read_parameters(_Highest, parameters, name, services.warn)
    _check(bool(given.detectors), name, "detectors must name at least one")
    _check(len(set(given.detectors)) == len(given.detectors), name, "detectors names one twice")
    _check(not given.stages, name, "stages are not supported: all of a model's endpoints are judged together")
    detectors = [services.plugin(child) for child in given.detectors]
    for child, detector in zip(given.detectors, detectors, strict=True):
        _check(isinstance(detector, SaturationDetector), name, f"{child!r} is not a saturation detector")
    return Highest([detector for detector in detectors if isinstance(detector, SaturationDetector)])


def _static(parameters: Mapping[str, Any], services: Services) -> Plugin:
    given = read_parameters(_Static, parameters, "static-usage-limit-policy", services.warn)
    _check(given.threshold > 0, "static-usage-limit-policy", "threshold must be above 0")
    return StaticLimit(given.threshold)


def _holdback(parameters: Mapping[str, Any], services: Services) -> Plugin:
    name = "priority-holdback-policy"
    given = read_parameters(_Holdback, parameters, name, services.warn)
    if given.domain == "explicit":
        interpolated = (given.shape, given.min_ceiling, given.max_ceiling)
        _check(interpolated == (None, None, None), name, "domain explicit takes ceilings alone")
        return ExplicitHoldback(_ceilings(given.ceilings or {}, name))
    _check(given.ceilings is None, name, "ceilings need domain: explicit")
    low, high = given.min_ceiling, 1.0 if given.max_ceiling is None else given.max_ceiling
    if low is None:
        raise ConfigError(f"Plugin {name!r}: minCeiling is missing.", param="plugins", remedy="Set it, from 0 to 1.")
    _check(0.0 <= low < 1.0 and 0.0 < high <= 1.0 and low <= high, name, "0 <= minCeiling <= maxCeiling <= 1 must hold")
    return PriorityHoldback(low, high, given.domain)


def _ceilings(given: Mapping[str | int, float], name: str) -> Mapping[int, float]:
    _check(bool(given), name, "domain explicit needs ceilings")
    try:
        ceilings = {int(priority): ceiling for priority, ceiling in given.items()}
    except ValueError as error:
        raise ConfigError(
            f"Plugin {name!r}: ceilings: {error}.", param="plugins", remedy="Its keys are priorities."
        ) from error
    ordered = [ceilings[priority] for priority in sorted(ceilings, reverse=True)]
    _check(all(0.0 <= ceiling <= 1.0 for ceiling in ordered), name, "ceilings must be from 0 to 1")
    _check(ordered == sorted(ordered, reverse=True), name, "a lower priority must not have a higher ceiling")
    return ceilings


def _program_aware(parameters: Mapping[str, Any], services: Services) -> Plugin:
    """Flows are ranked by attained service alone; the age of a flow's first request, which llm-d mixes in by weight,
    would reorder all flows at every moment."""
    name = "program-aware-fairness"
    given = read_parameters(_ProgramAware, parameters, name, services.warn)
    half_life = given.las_half_life_seconds
    _check(0.0 < given.las_decay_factor <= 1.0, name, "lasDecayFactor must be above 0, up to 1")
    _check(half_life >= 0 and isfinite(half_life), name, "lasHalfLifeSeconds must not be negative")
    if half_life:
        return LeastAttainedService(half_life)
    _check(given.las_decay_factor < 1.0, name, "lasDecayFactor must be below 1 where there is no half-life")
    return LeastAttainedService.with_factor(given.las_decay_factor)
