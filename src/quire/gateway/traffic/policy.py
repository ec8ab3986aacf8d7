"""The documents of a policy file.

InferenceObjective and InferenceModelRewrite are llm-d's (llm-d.ai/v1alpha2, or the names they had before in
inference.networking.x-k8s.io); InferencePool is the Gateway API's (inference.networking.k8s.io/v1); TrafficPolicy is
quire's own. Fields that only mean something to a Kubernetes API server (metadata, status) are let through.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Final, Literal, TypeVar

import msgspec

from quire.core.errors import ConfigError
from quire.gateway.picker_config import KIND as PICKER_KIND
from quire.gateway.picker_config import EndpointPickerConfig, read_picker_config

TRAFFIC_API: Final = "quire.ai/v1alpha1"
_LLM_D: Final = ("llm-d.ai/v1alpha2", "llm-d.ai/v1", "inference.networking.x-k8s.io/v1alpha2")
_API_VERSIONS: Final[Mapping[str, Sequence[str]]] = {
    "InferenceObjective": _LLM_D,
    "InferenceModelRewrite": _LLM_D,
    "InferencePool": ("inference.networking.k8s.io/v1", "inference.networking.x-k8s.io/v1alpha2"),
    "TrafficPolicy": (TRAFFIC_API,),
}

Weight = Annotated[int, msgspec.Meta(ge=0, le=1_000_000)]
S = TypeVar("S", bound=msgspec.Struct)


class _Strict(msgspec.Struct, forbid_unknown_fields=True, frozen=True, rename="camel", kw_only=True):
    pass


class PoolRef(_Strict, frozen=True):
    name: str
    group: str = ""
    kind: str = ""
    namespace: str = ""


class ObjectiveSpec(_Strict, frozen=True):
    priority: int = 0
    pool_ref: PoolRef | None = None


class ModelMatch(_Strict, frozen=True):
    value: str
    type: Literal["Exact"] = "Exact"


class RewriteMatch(_Strict, frozen=True):
    model: ModelMatch | None = None


class RewriteTarget(_Strict, frozen=True):
    model_rewrite: str
    weight: Weight = 1


class RewriteRule(_Strict, frozen=True):
    matches: tuple[RewriteMatch, ...] = ()
    """None: every model."""
    targets: tuple[RewriteTarget, ...] = ()


class RewriteSpec(_Strict, frozen=True):
    rules: tuple[RewriteRule, ...] = ()
    pool_ref: PoolRef | None = None


class PickerRef(_Strict, frozen=True):
    name: str = ""
    group: str = ""
    kind: str = "Service"
    port: Mapping[str, int] | None = None
    failure_mode: Literal["FailOpen", "FailClose"] = "FailClose"


class PoolSpec(_Strict, frozen=True):
    selector: Mapping[str, Any] | None = None
    target_ports: tuple[Mapping[str, int], ...] = ()
    app_protocol: str = ""
    endpoint_picker_ref: PickerRef | None = None


class Target(_Strict, frozen=True):
    """A version: what the endpoint is asked for, and which endpoints may be asked."""

    model: str = ""
    """Empty: as the client asked."""
    selector: Mapping[str, str] = {}
    """Labels that an endpoint must have."""
    weight: Weight = 1


class Match(_Strict, frozen=True):
    """Everything that is given must hold."""

    headers: Mapping[str, str] = {}
    tenants: tuple[str, ...] = ()


class Route(_Strict, frozen=True):
    targets: tuple[Target, ...]
    name: str = ""
    match: Match | None = None
    sticky: str = ""
    """`tenant`, `session` or `header:NAME`: the same caller gets the same target as long as the weights stand."""


class ShadowSpec(_Strict, frozen=True):
    """A second version that gets a copy of some requests, and whose answers nobody sees."""

    target: Target
    percent: Annotated[float, msgspec.Meta(ge=0, le=100)] = 100.0
    compare: bool = True


class TrafficSpec(_Strict, frozen=True):
    model: str
    """As clients ask for it."""
    routes: tuple[Route, ...] = ()
    """The first that matches decides."""
    active: str = ""
    """Blue and green: only routes of this name are looked at."""
    shadow: ShadowSpec | None = None
    fallback: tuple[Target, ...] = ()
    """Tried in order when the chosen target cannot serve the request."""


@dataclass(frozen=True, slots=True)
class Rewrite:
    name: str
    created: str
    spec: RewriteSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    picker: EndpointPickerConfig | None = None
    objectives: Mapping[str, int] = field(default_factory=dict)
    """Name → priority."""
    rewrites: Sequence[Rewrite] = ()
    traffic: Mapping[str, TrafficSpec] = field(default_factory=dict)
    """By the model that clients ask for."""
    pools: Mapping[str, PoolSpec] = field(default_factory=dict)


def read_policy(documents: Sequence[Mapping[str, Any]]) -> Policy:
    """Raises `ConfigError` that names the document and the field."""
    picker: EndpointPickerConfig | None = None
    objectives: dict[str, int] = {}
    rewrites: list[Rewrite] = []
    traffic: dict[str, TrafficSpec] = {}
    pools: dict[str, PoolSpec] = {}
    for document in documents:
        kind = document.get("kind")
        if kind == PICKER_KIND:
            if picker is not None:
                raise ConfigError(f"There are two documents of kind {PICKER_KIND}.", remedy="Keep one.")
            picker = read_picker_config(document)
            continue
        name = _name(document)
        if kind == "InferenceObjective":
            objectives[name] = _spec(document, ObjectiveSpec).priority
        elif kind == "InferenceModelRewrite":
            created = str(document.get("metadata", {}).get("creationTimestamp", ""))
            rewrites.append(Rewrite(name, created, _checked_rewrite(name, _spec(document, RewriteSpec))))
        elif kind == "InferencePool":
            pools[name] = _spec(document, PoolSpec)
        else:
            spec = _checked_traffic(name, _spec(document, TrafficSpec))
            if spec.model in traffic:
                raise ConfigError(f"Two TrafficPolicies are for the model {spec.model!r}.", remedy="Keep one.")
            traffic[spec.model] = spec
    rewrites.sort(key=lambda rewrite: rewrite.created or "9999")  # the oldest first; without a date, as written
    return Policy(picker=picker, objectives=objectives, rewrites=rewrites, traffic=traffic, pools=pools)


def _name(document: Mapping[str, Any]) -> str:
    kind, version = document.get("kind"), document.get("apiVersion")
    known = _API_VERSIONS.get(str(kind))
    if known is None:
        raise ConfigError(
            f"{kind!r} is not a kind that a policy file holds.",
            param="kind",
            remedy=f"Known are {', '.join([PICKER_KIND, *_API_VERSIONS])}.",
        )
    if version not in known:
        raise ConfigError(f"{kind} of apiVersion {version!r} is not known.", remedy=f"Use {' or '.join(known)}.")
    unknown = set(document) - {"apiVersion", "kind", "metadata", "spec", "status"}
    if unknown:
        raise ConfigError(f"{kind} has the unknown field {min(unknown)!r}.", remedy="Remove it.")
    metadata = document.get("metadata")
    name = metadata.get("name") if isinstance(metadata, dict) else None
    if not isinstance(name, str) or not name:
        raise ConfigError(f"A document of kind {kind} has no metadata.name.", remedy="Name it.")
    return name


def _spec(document: Mapping[str, Any], cls: type[S]) -> S:
    try:
        return msgspec.convert(document.get("spec") or {}, cls)
    except msgspec.ValidationError as error:
        where = f"{document['kind']} {document['metadata']['name']!r}"
        raise ConfigError(f"{where}: {error}.", remedy="See docs/gateway.md.") from error


def _checked_rewrite(name: str, spec: RewriteSpec) -> RewriteSpec:
    for rule in spec.rules:
        if not any(target.weight for target in rule.targets):
            raise ConfigError(
                f"InferenceModelRewrite {name!r} has a rule without a target of any weight.", remedy="Give it one."
            )
    return spec


def _checked_traffic(name: str, spec: TrafficSpec) -> TrafficSpec:
    for route in spec.routes:
        if not any(target.weight for target in route.targets):
            raise ConfigError(
                f"TrafficPolicy {name!r}: route {route.name!r} has no target of any weight.", remedy="Give it one."
            )
        if route.sticky and route.sticky not in ("tenant", "session") and not route.sticky.startswith("header:"):
            raise ConfigError(
                f"TrafficPolicy {name!r}: sticky is {route.sticky!r}.", remedy="Use tenant, session or header:NAME."
            )
    if spec.active and spec.active not in {route.name for route in spec.routes}:
        raise ConfigError(
            f"TrafficPolicy {name!r}: no route is called {spec.active!r}, the active one.", remedy="Name one of them."
        )
    return spec
