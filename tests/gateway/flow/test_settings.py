"""Flow control from llm-d's configuration."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping
from fractions import Fraction
from math import ceil, inf
from pathlib import Path
from typing import Any

import pytest
import structlog
import yaml
from hypothesis import given
from hypothesis import strategies as st

from quire.core.errors import ConfigError
from quire.gateway.endpoint import Pool
from quire.gateway.errors import Evicted, Expired, NoEndpoint, QueueCapacity, Saturated, ShuttingDown
from quire.gateway.flow.attained import LeastAttainedService
from quire.gateway.flow.limits import ExplicitHoldback, PriorityHoldback, StaticLimit
from quire.gateway.flow.policies import (
    EarliestDeadlineFirst,
    FirstComeFirstServed,
    GlobalStrict,
    RoundRobin,
    SloDeadline,
)
from quire.gateway.flow.saturation import Concurrency, EngineQueues, Highest, Utilization
from quire.gateway.flow.settings import FlowSettings, flow_settings
from quire.gateway.flow.stock import flow_plugins
from quire.gateway.flow.units import LARGEST, parse_duration, parse_quantity
from quire.gateway.picker_config import EndpointPickerConfig, read_picker_config
from quire.gateway.plugin import Plugin, Services
from quire.gateway.traffic.policy import read_policy
from quire.gateway.unheeded import sections_without_effect

HEAD = "apiVersion: llm-d.ai/v1alpha1\nkind: EndpointPickerConfig\n"


def read(text: str) -> EndpointPickerConfig:
    return read_picker_config(yaml.safe_load(HEAD + text))


def settings(text: str) -> FlowSettings | None:
    config = read(text)
    made: dict[str, Plugin] = {}
    services = Services(Pool(), lambda: 0.0, random.Random(0), made.__getitem__)
    for spec in config.plugins:
        made[spec.label] = flow_plugins()[spec.type](spec.parameters or {}, services)
    return flow_settings(config, made, services)


def make(kind: str, **parameters: Any) -> Plugin:
    others: Mapping[str, Plugin] = {"queues": EngineQueues(), "strict": GlobalStrict()}
    return flow_plugins()[kind](parameters, Services(Pool(), lambda: 0.0, random.Random(0), others.__getitem__))


def test_without_a_configuration_there_is_flow_control_that_costs_nothing() -> None:
    services = Services(Pool(), lambda: 0.0, random.Random(0), {}.__getitem__)
    given = flow_settings(None, {}, services)
    assert given is not None
    assert isinstance(given.detector, EngineQueues)
    assert given.queue.shed_negative
    assert (given.queue.band(3).max_requests, given.queue.band(3).max_bytes) == (5000, 10**9)
    assert given.queue.ttl == 600.0  # as long as it would wait at an endpoint


def test_the_gate_decides() -> None:
    assert settings("featureGates: [flowControl=false]") is None
    on = settings("featureGates: [flowControl]")
    assert on is not None
    assert isinstance(on.detector, Utilization)
    assert not on.queue.shed_negative
    assert on.queue.ttl == on.queue.no_endpoint_ttl == 60.0
    silent = settings("")
    assert silent is not None
    assert isinstance(silent.detector, EngineQueues)


def test_a_section_without_the_gate_is_said_to_be_ignored() -> None:
    text = (
        "plugins: [{type: concurrency-detector}]\n"
        "flowControl: {maxRequests: 3, saturationDetector: {pluginRef: concurrency-detector}}"
    )
    given, told = settings(text), list(sections_without_effect(read(text)))
    assert told == ["flowControl.maxRequests has no effect: flowControl is not among the featureGates"]
    assert given is not None
    assert given.queue.max_requests > 3
    assert isinstance(given.detector, Concurrency)


@pytest.mark.parametrize("value", ["1", "t", "T", "TRUE", "true", "True", " true"])
def test_gates_are_read_as_go_reads_them(value: str) -> None:
    on = settings(f"featureGates: ['flowControl={value}']")
    assert on is not None
    assert isinstance(on.detector, Utilization)
    off = {"1": "0", "t": "f", "T": "F"}.get(value, value.lower().replace("true", "False"))
    assert settings(f"featureGates: ['flowControl={off}']") is None
    assert settings(f"featureGates: [flowControl, 'flowControl={off}']") is None  # the last word


@pytest.mark.parametrize("value", ["yes", "", "on", "2", "true=1"])
def test_gates_that_are_neither_true_nor_false_are_refused(value: str) -> None:
    with pytest.raises(ConfigError, match="featureGates"):
        read(f"featureGates: ['other={value}']")


def test_a_section_behind_a_gate_that_is_off_is_said_to_be_ignored() -> None:
    text = "featureGates: [flowControl=false]\nflowControl: {}\nsaturationDetector: {pluginRef: x}"
    assert [line.partition(" ")[0] for line in sections_without_effect(read(text))] == [
        "flowControl",
        "saturationDetector",
    ]
    assert not list(sections_without_effect(read("featureGates: [flowControl]\nflowControl: {maxRequests: 3}")))


def test_a_whole_section() -> None:
    given = settings("""
featureGates: [flowControl]
plugins:
- {type: concurrency-detector, name: few, parameters: {maxConcurrency: 8, concurrencyMode: hybrid}}
- {type: utilization-detector, parameters: {queueDepthThreshold: 2, metricsStalenessThreshold: 3s}}
- {type: max-saturation-detector, name: both, parameters: {detectors: [few, utilization-detector]}}
- {type: priority-holdback-policy, name: back, parameters: {minCeiling: 0.4, maxCeiling: 0.9}}
- {type: program-aware-fairness, name: programs, parameters: {strategy: las, lasHalfLifeSeconds: 30}}
flowControl:
  maxBytes: 10Gi
  maxRequests: 12k
  defaultRequestTTL: 1m30s
  noEndpointRequestTTL: 10m
  enableEviction: true
  usageLimitPolicyPluginRef: back
  saturationDetector: {pluginRef: both}
  defaultPriorityBand: {maxRequests: "2k", fairnessPolicyRef: round-robin-fairness-policy}
  defaultNegativePriorityBand: {maxRequests: 10}
  priorityBands:
  - {priority: 100, maxBytes: 500M, fairnessPolicyRef: programs, orderingPolicyRef: edf-ordering-policy}
  - {priority: 0, maxRequests: 0}
""")
    assert given is not None
    queue = given.queue
    assert (queue.max_bytes, queue.max_requests, queue.ttl, queue.no_endpoint_ttl) == (10 * 2**30, 12_000, 90.0, 600.0)
    assert given.enable_eviction
    assert isinstance(queue.limits, PriorityHoldback)
    assert isinstance(given.detector, Highest)
    high, default, negative, zero = (queue.band(priority) for priority in (100, 5, -1, 0))
    assert (high.max_bytes, high.max_requests) == (500_000_000, 5000)
    assert isinstance(high.fairness, LeastAttainedService)
    assert isinstance(high.ordering, EarliestDeadlineFirst)
    assert default.max_requests == 2000
    assert isinstance(default.fairness, RoundRobin)
    assert isinstance(default.ordering, FirstComeFirstServed)
    assert (negative.max_requests, zero.max_requests) == (10, 5000)  # 0 is as good as unset, as in llm-d


def test_what_is_not_said_is_bounded_and_what_is_zero_is_not() -> None:
    unset = settings("featureGates: [flowControl]\nflowControl: {priorityBands: [{priority: 1, maxRequests: 50k}]}")
    assert unset is not None
    assert unset.queue.max_requests == 55_000  # never before the bands that are configured
    zero = settings("featureGates: [flowControl]\nflowControl: {maxRequests: 0, defaultRequestTTL: 0s}")
    assert zero is not None
    assert zero.queue.max_requests == LARGEST
    assert (zero.queue.ttl, zero.queue.no_endpoint_ttl) == (inf, 60.0)


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ("maxRequests: 500m", "maxRequests"),
        ("maxBytes: -1", "maxBytes"),
        ("maxBytes: 1GiB", "maxBytes"),
        ("maxBytes: 100E", "out of range"),
        ("defaultRequestTTL: '60'", "defaultRequestTTL"),
        ("noEndpointRequestTTL: -3s", "noEndpointRequestTTL"),
        ("priorityBands: [{priority: 1}, {priority: 1}]", "priority 1"),
        ("priorityBands: [{priority: 1, maxBytes: x}]", r"priorityBands\[1\].maxBytes"),
        ("defaultPriorityBand: {fairnessPolicyRef: nobody}", "nobody"),
        ("defaultPriorityBand: {fairnessPolicyRef: edf-ordering-policy}", "no FairnessPolicy"),
        ("saturationDetector: {pluginRef: static-usage-limit-policy}", "no SaturationDetector"),
        ("usageLimitPolicyPluginRef: priority-holdback-policy", "minCeiling"),
    ],
)
def test_mistakes_are_named(section: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        settings(f"featureGates: [flowControl]\nflowControl:\n  {section}\n")
    assert caught.value.remedy


@pytest.mark.parametrize(
    ("kind", "parameters", "said"),
    [
        ("engine-queue-detector", {"queueDepthThreshold": 0}, "queueDepthThreshold"),
        ("engine-queue-detector", {"metricsStalenessThreshold": "soon"}, "soon"),
        ("utilization-detector", {"queueDepthThreshold": 0}, "queueDepthThreshold"),
        ("utilization-detector", {"kvCacheUtilThreshold": 1.5}, "kvCacheUtilThreshold"),
        ("utilization-detector", {"metricsStalenessThreshold": "0s"}, "metricsStalenessThreshold"),
        ("utilization-detector", {"headroom": -1}, "headroom"),
        ("utilization-detector", {"queueDepth": 1}, "queueDepth"),
        ("concurrency-detector", {"maxConcurrency": 0}, "maxConcurrency"),
        ("concurrency-detector", {"maxTokenConcurrency": -1}, "maxTokenConcurrency"),
        ("concurrency-detector", {"concurrencyMode": "both"}, "both"),
        ("max-saturation-detector", {}, "at least one"),
        ("max-saturation-detector", {"detectors": ["queues", "queues"]}, "twice"),
        ("max-saturation-detector", {"detectors": ["strict"]}, "not a saturation detector"),
        ("max-saturation-detector", {"detectors": ["queues"], "stages": {"queues": ["prefill"]}}, "stages"),
        ("static-usage-limit-policy", {"threshold": 0}, "threshold"),
        ("priority-holdback-policy", {"minCeiling": 0.9, "maxCeiling": 0.5}, "minCeiling"),
        ("priority-holdback-policy", {"minCeiling": 0.5, "ceilings": {1: 0.5}}, "explicit"),
        ("priority-holdback-policy", {"domain": "explicit", "minCeiling": 0.5, "ceilings": {1: 1}}, "alone"),
        ("priority-holdback-policy", {"domain": "explicit", "ceilings": {1: 0.5, 0: 0.6}}, "lower priority"),
        ("priority-holdback-policy", {"domain": "explicit", "ceilings": {"high": 0.5}}, "high"),
        ("soft-reflective-ceiling-policy", {"period": 1}, "period"),
        ("program-aware-fairness", {"lasHalfLifeSeconds": -1}, "lasHalfLifeSeconds"),
        ("program-aware-fairness", {"lasHalfLifeSeconds": 0, "lasDecayFactor": 1.0}, "lasDecayFactor"),
        ("round-robin-fairness-policy", {"quantum": 1}, "quantum"),
    ],
)
def test_mistakes_in_parameters_are_named(kind: str, parameters: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        make(kind, **parameters)


def test_parameters_that_are_right() -> None:
    assert isinstance(
        make("priority-holdback-policy", domain="explicit", ceilings={"100": 0.9, "0": 0.3}), ExplicitHoldback
    )
    assert isinstance(make("priority-holdback-policy", minCeiling=0.4, domain="value"), PriorityHoldback)
    assert isinstance(make("engine-queue-detector", queueDepthThreshold=8), EngineQueues)
    assert isinstance(make("static-usage-limit-policy"), StaticLimit)
    assert isinstance(make("program-aware-fairness", lasHalfLifeSeconds=0), LeastAttainedService)


def test_a_threshold_below_what_the_gateway_reads_is_raised_and_said() -> None:
    with structlog.testing.capture_logs() as logs:
        make("utilization-detector", metricsStalenessThreshold="200ms")
    assert logs[0]["used_seconds"] == 1.0


# --- units ----------------------------------------------------------------------------------------------------

SUFFIXES = {"": 1, **{suffix: 1000 ** (power + 1) for power, suffix in enumerate(("k", "M", "G", "T", "P", "E"))}}
SUFFIXES |= {suffix: 1024 ** (power + 1) for power, suffix in enumerate(("Ki", "Mi", "Gi", "Ti", "Pi", "Ei"))}
UNITS = {"ns": 1, "us": 10**3, "µs": 10**3, "ms": 10**6, "s": 10**9, "m": 60 * 10**9, "h": 3600 * 10**9}


@given(st.integers(0, 10**6), st.none() | st.integers(0, 999), st.sampled_from(sorted(SUFFIXES)))
def test_quantities(whole: int, part: int | None, suffix: str) -> None:
    text = f"{whole}{suffix}" if part is None else f"{whole}.{part:03}{suffix}"
    exact = ceil((whole + Fraction(part or 0, 1000)) * SUFFIXES[suffix])
    if exact > LARGEST:
        with pytest.raises(ConfigError):
            parse_quantity(text, "x")
    else:
        assert parse_quantity(text, "x") == exact


@given(st.integers(0, 99), st.integers(-3, 15))
def test_quantities_with_an_exponent(number: int, exponent: int) -> None:
    assert parse_quantity(f"{number}e{exponent}", "x") == ceil(number * Fraction(10) ** exponent)
    assert parse_quantity(number, "x") == number


@given(st.lists(st.tuples(st.integers(0, 10**5), st.sampled_from(sorted(UNITS))), min_size=1, max_size=6))
def test_durations(parts: list[tuple[int, str]]) -> None:
    text = "".join(f"{number}{unit}" for number, unit in parts)
    exact = sum(number * UNITS[unit] for number, unit in parts) / 10**9
    assert parse_duration(text, "x") == pytest.approx(exact)
    assert parse_duration("1.5" + parts[0][1], "x") == pytest.approx(1.5 * UNITS[parts[0][1]] / 10**9)


@pytest.mark.parametrize(
    "text", ["", "1", "-1s", "1 s", "s", "1d", "1s ", "1m30", "1e3s", "0x1s", "9" * 400 + "h", "∞s"]
)
def test_what_is_no_duration(text: str) -> None:
    with pytest.raises(ConfigError, match="x: "):
        parse_duration(text, "x")


@pytest.mark.parametrize(
    "text", ["", "Gi", "1gi", "1 Gi", "-1", "1e999999", "1e99", "5m", "1u", "0x10", "1,000", "٣", "9" * 300]
)
def test_what_is_no_quantity(text: str) -> None:
    with pytest.raises(ConfigError, match="x: "):
        parse_quantity(text, "x")


def test_the_example_in_the_documentation_is_right() -> None:
    page = (Path(__file__).parents[3] / "docs" / "flow-control.md").read_text()
    example = page.partition("```yaml\n")[2].partition("```")[0]
    policy = read_policy(list(yaml.safe_load_all(example)))
    assert policy.objectives == {"interactive": 100, "batch": -10}
    given = settings(example.partition("---\n")[0].partition("kind: EndpointPickerConfig\n")[2])
    assert given is not None
    assert isinstance(given.queue.band(100).ordering, SloDeadline)
    assert isinstance(given.queue.band(0).fairness, RoundRobin)
    assert (given.queue.ttl, given.queue.band(-10).max_requests, given.queue.max_bytes) == (90.0, 100, 4 * 2**30)
    named = set(re.findall(r"`([a-z-]+-(?:policy|detector|fairness))`", page))
    assert named == set(flow_plugins())


def test_every_reason_to_turn_away_is_in_the_documentation() -> None:
    page = (Path(__file__).parents[3] / "docs" / "flow-control.md").read_text()
    told = {(reason, int(status)) for reason, status in re.findall(r"\| `([a-z-]+)` \| (\d+) \|", page)}
    kinds = (Saturated, QueueCapacity, Evicted, Expired, NoEndpoint, ShuttingDown)
    assert told == {(kind.reason, kind.status) for kind in kinds}
