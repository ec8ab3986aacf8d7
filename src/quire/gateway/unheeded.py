"""What an `EndpointPickerConfig` says beside its plugins that has no effect here, each with the reason."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import msgspec

from quire.gateway.picker_config import DataLayer, EndpointPickerConfig, FlowControlConfig, read_gate

FILE_DISCOVERY: Final = "file-discovery"
FLOW_GATE: Final = "flowControl"
_PARSERS: Final = "quire parses OpenAI's and Anthropic's APIs, and passes on everything else"
_ALONE: Final = "gateways share no state"


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
    if layer.discovery is not None:
        endpoints = layer.discovery.endpoints
        refs = {layer.discovery.plugin_ref, "" if endpoints is None else endpoints.plugin_ref}
        if FILE_DISCOVERY not in {spec.type for spec in config.plugins if spec.label in refs}:
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
