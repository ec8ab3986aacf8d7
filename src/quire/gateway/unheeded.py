"""What an `EndpointPickerConfig` says beside its plugins that has no effect here, each with the reason; it has to make
sense all the same."""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from typing import Final

import msgspec

from quire.core.errors import ConfigError
from quire.gateway.picker_config import DataLayer, EndpointPickerConfig, FlowControlConfig, read_gate

FILE_DISCOVERY: Final = "file-discovery"
FLOW_GATE: Final = "flowControl"
_PARSERS: Final = "quire parses OpenAI's and Anthropic's APIs, and passes on everything else"
_ALONE: Final = "gateways share no state"


def check_references(config: EndpointPickerConfig, types: Container[str]) -> None:
    """That what they refer to is there: a plugin, or one of those `types`, of which llm-d makes one by itself. Raises
    `ConfigError`."""
    names = [spec.label for spec in config.plugins]
    for section, ref in _references(config):
        if ref not in names and ref not in types:
            raise ConfigError(
                f"{section} refers to a plugin {ref!r} that is not there.",
                param=section,
                remedy=f"Known are: {', '.join(names) or 'none'}.",
            )


def _references(config: EndpointPickerConfig) -> Iterator[tuple[str, str]]:
    if config.request_handler is not None:
        for parser in config.request_handler.parsers:
            yield "requestHandler.parsers", parser.plugin_ref
    if config.parser is not None:
        yield "parser", config.parser.plugin_ref
    layer = config.data_layer or DataLayer()
    for source in layer.sources:
        yield "dataLayer.sources", source.plugin_ref
        yield from (("dataLayer.sources", extractor.plugin_ref) for extractor in source.extractors)
    yield from (("dataLayer.discovery", ref) for ref in _discovery(layer))


def _discovery(layer: DataLayer) -> Sequence[str]:
    """What it refers to, by the names of either version."""
    if layer.discovery is None:
        return ()
    endpoints = layer.discovery.endpoints
    return [ref for ref in (layer.discovery.plugin_ref, "" if endpoints is None else endpoints.plugin_ref) if ref]


def sections_without_effect(config: EndpointPickerConfig) -> Iterator[str]:
    for gate in config.feature_gates:
        if read_gate(gate)[0] != FLOW_GATE:
            yield f"feature gate {gate} has no effect: quire has no such switch"
    if config.request_handler is not None and config.request_handler.parsers:
        yield f"requestHandler.parsers has no effect: {_PARSERS}"
    if config.parser is not None:
        yield f"parser has no effect: {_PARSERS}"
    if config.data_layer is not None:
        yield from _of_data_layer(config.data_layer, config)
    yield from _of_flow_control(config)


def _of_data_layer(layer: DataLayer, config: EndpointPickerConfig) -> Iterator[str]:
    if not layer.inject_defaults:
        yield "dataLayer.injectDefaults has no effect: quire reads every endpoint's metrics and models anyway"
    if layer.sources:
        yield "dataLayer.sources has no effect: quire reads every endpoint's metrics and models anyway"
    found = {spec.type for spec in config.plugins if spec.label in _discovery(layer)}
    if layer.discovery is not None and FILE_DISCOVERY not in found:
        yield f"dataLayer.discovery has no effect: endpoints come from flags, or from a {FILE_DISCOVERY} plugin"
    shared = {
        "peerDiscovery": layer.peer_discovery,
        "crossReplica": layer.cross_replica,
        "crossReplicaSyncerPluginRef": layer.cross_replica_syncer_plugin_ref or None,
        "crossReplicaSyncInterval": layer.cross_replica_sync_interval,
        "crossReplicaPublishTimeout": layer.cross_replica_publish_timeout,
    }
    for name, value in shared.items():
        if value is not None:
            yield f"dataLayer.{name} has no effect: {_ALONE}"


def _of_flow_control(config: EndpointPickerConfig) -> Iterator[str]:
    gate, section = config.gate(FLOW_GATE), config.flow_control
    if gate is False:
        why = f"the feature gate {FLOW_GATE} is off"
        if section is not None:
            yield f"flowControl has no effect: {why}"
        if config.saturation_detector is not None:
            yield f"saturationDetector has no effect: {why}"
        return
    if section is None:
        return
    if section.saturation_detector is not None and config.saturation_detector is not None:
        yield "saturationDetector has no effect: flowControl.saturationDetector goes before it"
    if gate is None:
        usual = FlowControlConfig()
        for field in msgspec.structs.fields(section):
            if field.name != "saturation_detector" and getattr(section, field.name) != getattr(usual, field.name):
                yield f"flowControl.{field.encode_name} has no effect: {FLOW_GATE} is not among the featureGates"
