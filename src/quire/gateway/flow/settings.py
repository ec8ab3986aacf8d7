"""From the `flowControl` section of an `EndpointPickerConfig` to frozen settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import inf
from typing import Final, TypeVar

from quire.core.errors import ConfigError
from quire.gateway.flow.limits import StaticLimit, UsageLimitPolicy
from quire.gateway.flow.policies import FairnessPolicy, OrderingPolicy
from quire.gateway.flow.queue import BandSettings, QueueSettings
from quire.gateway.flow.saturation import EngineQueues, SaturationDetector
from quire.gateway.flow.stock import flow_plugins
from quire.gateway.flow.units import LARGEST, parse_duration, parse_quantity
from quire.gateway.picker_config import EndpointPickerConfig, FlowControlConfig, PriorityBand
from quire.gateway.plugin import Plugin, Services
from quire.gateway.unheeded import FLOW_GATE

DEFAULT_DETECTOR: Final = "utilization-detector"
"""llm-d's, where its gate is on and nothing else is named."""
PATIENT_TTL: Final = 600.0
"""Seconds, where nothing is configured: as long as an endpoint may take to its first byte. Many requests sent at once
would wait as long in the engines' own queues, and nobody asked for them to be turned away."""
P = TypeVar("P", bound=Plugin)


@dataclass(frozen=True, slots=True, kw_only=True)
class FlowSettings:
    queue: QueueSettings = field(default_factory=QueueSettings)
    detector: SaturationDetector = field(default_factory=EngineQueues)
    enable_eviction: bool = False
    """Requests in flight of negative priority may be ended for the sake of others."""


def flow_settings(
    config: EndpointPickerConfig | None, plugins: Mapping[str, Plugin], services: Services
) -> FlowSettings | None:
    """`plugins` are the configuration's, by name. None: flow control is off. Raises `ConfigError`.

    With the feature gate `flowControl`, llm-d's meaning and defaults. With `flowControl=false` it is off. Else, and
    without a configuration, quire's default, which costs nothing at low load: requests wait only while every endpoint
    says that requests wait there already (`EngineQueues`), and as long as they would there; one of negative priority is
    then turned away.
    """
    gate = None if config is None else config.gate(FLOW_GATE)
    if gate is False:
        return None
    usual = FlowSettings(queue=QueueSettings(ttl=PATIENT_TTL))
    if config is None:
        return usual
    section = config.flow_control or FlowControlConfig()
    find = _Finder(plugins, services)
    ref = section.saturation_detector or config.saturation_detector
    named = "" if ref is None else ref.plugin_ref
    if gate is None:
        detector = find(named, SaturationDetector) if named else EngineQueues()  # type: ignore[type-abstract]
        return replace(usual, detector=detector)
    return FlowSettings(
        queue=_queue_settings(section, find),
        detector=find(named or DEFAULT_DETECTOR, SaturationDetector),  # type: ignore[type-abstract]
        enable_eviction=section.enable_eviction,
    )


def plugins_in_use(config: EndpointPickerConfig) -> frozenset[str]:
    """Names of the plugins that flow control goes by."""
    gate, section = config.gate(FLOW_GATE), config.flow_control or FlowControlConfig()
    if gate is False:
        return frozenset()
    ref = section.saturation_detector or config.saturation_detector
    if gate is None:
        return frozenset(() if ref is None else (ref.plugin_ref,))
    bands = (section.default_priority_band, section.default_negative_priority_band, *section.priority_bands)
    refs = [one for band in bands if band for one in (band.fairness_policy_ref, band.ordering_policy_ref)]
    detector = "" if ref is None else ref.plugin_ref
    return frozenset((*refs, section.usage_limit_policy_plugin_ref, detector or DEFAULT_DETECTOR))


class _Finder:
    """Plugins by name, or else by the type of a stock one that needs no parameters."""

    def __init__(self, plugins: Mapping[str, Plugin], services: Services) -> None:
        self._plugins, self._services = dict(plugins), services

    def __call__(self, name: str, kind: type[P]) -> P:
        if name not in self._plugins and name in flow_plugins():
            plugin = flow_plugins()[name]({}, self._services)
            plugin.name = name
            self._plugins[name] = plugin
        plugin = self._plugins.get(name)  # type: ignore[assignment]
        if not isinstance(plugin, kind):
            what = "is not there" if plugin is None else f"is no {kind.__name__}"
            raise ConfigError(
                f"flowControl refers to a plugin {name!r}, which {what}.", param="flowControl", remedy="Declare it."
            )
        return plugin


def _queue_settings(section: FlowControlConfig, find: _Finder) -> QueueSettings:
    default = _band(section.default_priority_band or PriorityBand(), BandSettings(), "defaultPriorityBand", find)
    negative = section.default_negative_priority_band
    bands: dict[int, BandSettings] = {}
    for band in section.priority_bands:
        if band.priority in bands:
            raise ConfigError(
                f"flowControl: two bands have the priority {band.priority}.",
                param="flowControl.priorityBands",
                remedy="Leave one.",
            )
        bands[band.priority] = _band(band, BandSettings(), f"priorityBands[{band.priority}]", find)
    limits = section.usage_limit_policy_plugin_ref
    usual = QueueSettings()
    everything = [default, *bands.values()]
    return QueueSettings(
        max_requests=_bound(
            section.max_requests, max(usual.max_requests, sum(band.max_requests for band in everything)), "maxRequests"
        ),
        max_bytes=_bound(
            section.max_bytes, max(usual.max_bytes, sum(band.max_bytes for band in everything)), "maxBytes"
        ),
        ttl=_ttl(section.default_request_ttl, usual.ttl, "defaultRequestTTL"),
        no_endpoint_ttl=_ttl(section.no_endpoint_request_ttl, usual.no_endpoint_ttl, "noEndpointRequestTTL"),
        default_band=default,
        default_negative_band=(
            None if negative is None else _band(negative, BandSettings(), "defaultNegativePriorityBand", find)
        ),
        bands=bands,
        limits=find(limits, UsageLimitPolicy) if limits else StaticLimit(),  # type: ignore[type-abstract]
        shed_negative=False,
    )


def _band(band: PriorityBand, usual: BandSettings, where: str, find: _Finder) -> BandSettings:
    """0 is as good as unset, as in llm-d: a band is always bounded."""
    requests = parse_quantity(band.max_requests or 0, f"flowControl.{where}.maxRequests")
    size = parse_quantity(band.max_bytes or 0, f"flowControl.{where}.maxBytes")
    settings = replace(usual, max_requests=requests or usual.max_requests, max_bytes=size or usual.max_bytes)
    if band.fairness_policy_ref:
        settings = replace(settings, fairness=find(band.fairness_policy_ref, FairnessPolicy))  # type: ignore[type-abstract]
    if band.ordering_policy_ref:
        settings = replace(settings, ordering=find(band.ordering_policy_ref, OrderingPolicy))  # type: ignore[type-abstract]
    return settings


def _bound(value: str | int | None, usual: int, where: str) -> int:
    """Of everything together: 0 is none, and unset one that does not bind before the bands that are configured."""
    return usual if value is None else parse_quantity(value, f"flowControl.{where}") or LARGEST


def _ttl(value: str | None, usual: float, where: str) -> float:
    """0 is for ever, as in llm-d."""
    return usual if value is None else parse_duration(value, f"flowControl.{where}") or inf
