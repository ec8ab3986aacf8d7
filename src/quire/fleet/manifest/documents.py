"""A manifest's documents by kind, and configurations merged into the service that refers to them."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from quire.core.errors import ConfigError

Document = Mapping[str, Any]
KSERVE = ("serving.kserve.io/v1alpha2", "serving.kserve.io/v1alpha1")
GATEWAY_KINDS = frozenset(
    {"EndpointPickerConfig", "InferenceObjective", "InferenceModelRewrite", "InferencePool", "TrafficPolicy"}
)
"""Read by the gateway, which checks what is in them."""
SERVICE, CONFIG, CONFIG_MAP = "LLMInferenceService", "LLMInferenceServiceConfig", "ConfigMap"
MAX_BASE_REFS = 32


@dataclass(slots=True)
class Documents:
    """What a file holds. `configs` and `config_maps` are by name."""

    service: dict[str, Any]
    configs: dict[str, Document] = field(default_factory=dict)
    config_maps: dict[str, Document] = field(default_factory=dict)
    policy: list[dict[str, Any]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def sort_documents(documents: Sequence[dict[str, Any]], file: str) -> Documents:
    """Raises `ConfigError` unless exactly one document is an LLMInferenceService."""
    found = Documents(service={})
    services = []
    for number, document in enumerate(documents, 1):
        kind, version = document.get("kind"), document.get("apiVersion")
        if not isinstance(kind, str) or not isinstance(version, str):
            raise ConfigError(
                f"{file}: document {number} has no kind and apiVersion.", remedy=f"Begin it with {KSERVE[0]}."
            )
        if kind in (SERVICE, CONFIG) and version not in KSERVE:
            raise ConfigError(
                f"{file}: document {number} is a {kind} of apiVersion {version[:80]!r}.",
                param="apiVersion",
                remedy=f"Use {' or '.join(KSERVE)}.",
            )
        if kind == SERVICE:
            services.append(document)
        elif kind == CONFIG:
            found.configs[name_of(document, file)] = document
        elif kind == CONFIG_MAP:
            found.config_maps[name_of(document, file)] = document
        elif kind in GATEWAY_KINDS:
            found.policy.append(document)
        else:
            close = difflib.get_close_matches(kind, [SERVICE, CONFIG, *GATEWAY_KINDS], n=1, cutoff=0.8)
            if close:
                raise ConfigError(f"{file}: document {number} is a {kind!r}.", remedy=f"Did you mean {close[0]}?")
            found.warnings.append(
                f"document {number} ({kind[:80]}): not used by provider processes, because it is a cluster's."
            )
    if len(services) != 1:
        raise ConfigError(
            f"{file} has {len(services) or 'no'} documents of kind {SERVICE}.",
            param="kind",
            remedy="A file describes one service; write others into files of their own.",
        )
    found.service = merged(services[0], found, file)
    return found


def name_of(document: Document, file: str) -> str:
    metadata = document.get("metadata")
    name = metadata.get("name") if isinstance(metadata, dict) else None
    if not isinstance(name, str):
        raise ConfigError(
            f"{file}: a {document['kind']} has no metadata.name.", param="metadata.name", remedy="Name it."
        )
    return name


def merged(service: dict[str, Any], found: Documents, file: str) -> dict[str, Any]:
    """The service over the configurations that it refers to; the later of these over the earlier."""
    spec = service.get("spec")
    if not isinstance(spec, dict) or "baseRefs" not in spec:
        return service
    own = dict(spec)
    references = own.pop("baseRefs")
    if not isinstance(references, list) or len(references) > MAX_BASE_REFS:
        raise ConfigError(
            f"{file}: spec.baseRefs is not a list of at most {MAX_BASE_REFS}.", param="spec.baseRefs", remedy="Mend it."
        )
    whole: Any = {}
    for index, reference in enumerate(references):
        name = reference.get("name") if isinstance(reference, dict) and set(reference) == {"name"} else None
        if not isinstance(name, str) or name not in found.configs:
            raise ConfigError(
                f"{file}: spec.baseRefs[{index}] is {str(reference)[:80]}, and no such {CONFIG} is in the file.",
                param="spec.baseRefs",
                remedy=f"Put the {CONFIG} into the same file, as another document.",
            )
        whole = merge(whole, found.configs[name].get("spec") or {})
    return {**service, "spec": merge(whole, own)}


def merge(base: Any, over: Any) -> Any:
    """`over` on top of `base`: mappings field by field, lists of named things by their names, all else replaced."""
    if isinstance(base, dict) and isinstance(over, dict):
        return {**base, **{key: merge(base[key], value) if key in base else value for key, value in over.items()}}
    if _are_named(base) and _are_named(over):
        by_name = {item["name"]: item for item in base}
        for item in over:
            by_name[item["name"]] = merge(by_name.get(item["name"], {}), item)
        return list(by_name.values())
    return over


def _are_named(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, dict) and "name" in item for item in value)
