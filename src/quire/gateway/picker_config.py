"""llm-d's `EndpointPickerConfig`, read unchanged.

Source: llm-d-router, apix/config (v1alpha1, and v1 with its renamed fields of `dataLayer`). Every field is known here;
one that is not supported is refused or warned about where it is used (`quire.gateway.build`), never ignored.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import msgspec

from quire.core.errors import ConfigError

API_VERSIONS: Final = ("llm-d.ai/v1", "llm-d.ai/v1alpha1", "inference.networking.x-k8s.io/v1alpha1")
KIND: Final = "EndpointPickerConfig"
_TRUE: Final = frozenset(("1", "t", "true"))
_FALSE: Final = frozenset(("0", "f", "false"))


class _Strict(msgspec.Struct, forbid_unknown_fields=True, frozen=True, rename="camel", kw_only=True):
    pass


class PluginSpec(_Strict, frozen=True):
    type: str
    name: str = ""
    parameters: Mapping[str, Any] | None = None

    @property
    def label(self) -> str:
        return self.name or self.type


class SchedulingPlugin(_Strict, frozen=True):
    plugin_ref: str
    weight: float | None = None


class SchedulingProfile(_Strict, frozen=True):
    name: str
    plugins: tuple[SchedulingPlugin, ...] = ()


class PluginRef(_Strict, frozen=True):
    plugin_ref: str = ""


class DataLayerSource(_Strict, frozen=True):
    plugin_ref: str
    extractors: tuple[PluginRef, ...] = ()


class Discovery(_Strict, frozen=True):
    plugin_ref: str = ""
    """v1alpha1."""
    endpoints: PluginRef | None = None
    """v1."""


class CrossReplica(_Strict, frozen=True):
    syncer_plugin_ref: str = ""
    sync_interval: str | None = None
    publish_timeout: str | None = None


class DataLayer(_Strict, frozen=True):
    inject_defaults: bool = True
    sources: tuple[DataLayerSource, ...] = ()
    discovery: Discovery | None = None
    peer_discovery: PluginRef | None = None
    cross_replica: CrossReplica | None = None
    cross_replica_syncer_plugin_ref: str = ""
    cross_replica_sync_interval: str | None = None
    cross_replica_publish_timeout: str | None = None


class PriorityBand(_Strict, frozen=True):
    priority: int = 0
    max_bytes: str | int | None = None
    max_requests: str | int | None = None
    fairness_policy_ref: str = ""
    ordering_policy_ref: str = ""


class FlowControlConfig(_Strict, frozen=True):
    max_bytes: str | int | None = None
    max_requests: str | int | None = None
    default_request_ttl: str | None = msgspec.field(default=None, name="defaultRequestTTL")
    no_endpoint_request_ttl: str | None = msgspec.field(default=None, name="noEndpointRequestTTL")
    default_priority_band: PriorityBand | None = None
    default_negative_priority_band: PriorityBand | None = None
    priority_bands: tuple[PriorityBand, ...] = ()
    usage_limit_policy_plugin_ref: str = ""
    saturation_detector: PluginRef | None = None
    enable_eviction: bool = False


class RequestHandler(_Strict, frozen=True):
    parsers: tuple[PluginRef, ...] = ()


class EndpointPickerConfig(_Strict, frozen=True):
    api_version: str
    kind: str
    metadata: Mapping[str, Any] | None = None
    feature_gates: tuple[str, ...] = ()
    plugins: tuple[PluginSpec, ...] = ()
    scheduling_profiles: tuple[SchedulingProfile, ...] = ()
    data_layer: DataLayer | None = None
    flow_control: FlowControlConfig | None = None
    request_handler: RequestHandler | None = None
    saturation_detector: PluginRef | None = None
    """Deprecated by llm-d for `flowControl.saturationDetector`."""
    parser: PluginRef | None = None
    """Deprecated by llm-d for `requestHandler.parsers`."""

    def gate(self, name: str) -> bool | None:
        """Whether the feature gate is set, by the last word on it; None where the file does not say."""
        return dict(map(read_gate, self.feature_gates)).get(name)


def read_gate(gate: str) -> tuple[str, bool]:
    """The name and the value of `name` or `name=value`, where the value is one that Go's ParseBool takes, in any case.
    Raises `ConfigError`."""
    name, separator, value = gate.partition("=")
    if not separator:
        return gate.strip(), True
    value = value.strip().lower()
    if value not in _TRUE | _FALSE:
        raise ConfigError(
            f"featureGates: {gate!r} is neither true nor false.",
            param="featureGates",
            remedy=f"Write {name} or {name}=false.",
        )
    return name.strip(), value in _TRUE


def read_picker_config(document: Mapping[str, Any]) -> EndpointPickerConfig:
    """`document` is one parsed YAML document. Raises `ConfigError` that names the field."""
    try:
        config = msgspec.convert(dict(document), EndpointPickerConfig)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{KIND}: {error}.", remedy="See docs/gateway.md for what can be set.") from error
    if config.kind != KIND or config.api_version not in API_VERSIONS:
        raise ConfigError(
            f"{config.api_version} {config.kind} is not an {KIND}.",
            remedy=f"Set kind: {KIND} and one of these apiVersions: {', '.join(API_VERSIONS)}.",
        )
    names = [spec.label for spec in config.plugins]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"{KIND}: two plugins are named {name!r}.", param="plugins", remedy="Name each of them.")
    profiles = [profile.name for profile in config.scheduling_profiles]
    for name in profiles:
        if profiles.count(name) > 1:
            raise ConfigError(
                f"{KIND}: two scheduling profiles are named {name!r}.",
                param="schedulingProfiles",
                remedy="Name each of them.",
            )
    for gate in config.feature_gates:
        read_gate(gate)
    for profile in config.scheduling_profiles:
        for entry in profile.plugins:
            if entry.plugin_ref not in names:
                raise ConfigError(
                    f"{KIND}: profile {profile.name!r} refers to a plugin {entry.plugin_ref!r} that is not there.",
                    param="schedulingProfiles",
                    remedy=f"Known are: {', '.join(names) or 'none'}.",
                )
    return config
