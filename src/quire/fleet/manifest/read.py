"""A manifest file as a `ServiceSpec`, what the gateway is to be told, and warnings for what is not used."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from quire.config.documents import parse_documents, read_documents
from quire.core.errors import ConfigError
from quire.fleet.directory import check_name
from quire.fleet.manifest import pod, types
from quire.fleet.manifest.documents import Documents, sort_documents
from quire.fleet.manifest.warnings import warnings
from quire.fleet.manifest.workload import model_arguments, role_spec
from quire.fleet.spec import Role, ServiceSpec

_UNKNOWN = re.compile(r"unknown field `([^`]*)`")


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """`policy` are the documents that the gateway reads. `warnings` name a field each, and why it is not used."""

    service: ServiceSpec
    policy: tuple[dict[str, Any], ...]
    warnings: tuple[str, ...]


def read_manifest(path: Path, *, pvc_dir: Path | None = None) -> Manifest:
    """Raises `ConfigError` that names the field. `pvc_dir` holds a folder for each persistent volume claim."""
    found = sort_documents(read_documents(path), str(path))
    whole = _convert(found.service, str(path))
    spec = whole.spec
    notes = [*found.warnings, *warnings(whole.metadata, "metadata"), *warnings(spec, "spec")]
    if whole.status:
        notes.append("status: not used by provider processes, because it is what a cluster wrote.")
    if spec.model.criticality is not None and found.service["apiVersion"].endswith("v1alpha2"):
        raise ConfigError(f"{path}: spec.model.criticality is of v1alpha1.", remedy="Use an InferenceObjective.")
    name = check_name(whole.metadata.name)
    model_name = spec.model.name or name
    _refuse_what_changes_answers(spec, str(path))
    model = [*model_arguments(spec.model.uri, path.absolute().parent, pvc_dir), f"--served-model-name={model_name}"]
    first: Role = "both" if spec.prefill is None else "decode"
    roles = [role_spec(first, spec, "spec", model=model, notes=notes)]
    if spec.prefill is not None:
        roles.append(role_spec("prefill", spec.prefill, "spec.prefill", model=model, notes=notes))
        notes.append("spec.prefill: its engines are started and labelled, but none hands a KV cache to another.")
    policy = [*found.policy, *_picker_config(spec, found, str(path))]
    return Manifest(
        service=ServiceSpec(name=name, model_name=model_name, roles=tuple(roles)),
        policy=tuple(policy),
        warnings=tuple(notes),
    )


def _convert(document: dict[str, Any], file: str) -> types.LLMInferenceService:
    try:
        return msgspec.convert(document, types.LLMInferenceService)
    except msgspec.ValidationError as error:
        message = str(error)
        unknown = _UNKNOWN.search(message)
        remedy = "Mend the field; the types are KServe's LLMInferenceService, v1alpha2."
        if unknown is not None:
            close = difflib.get_close_matches(unknown[1], _all_fields(), n=1, cutoff=0.7)
            remedy = (
                f"Did you mean {close[0]}?" if close else "Remove it: KServe's LLMInferenceService has no such field."
            )
        raise ConfigError(f"{file}: {message.replace('`$', '`')}.", param="manifest", remedy=remedy) from error


def _all_fields() -> list[str]:
    structs = [
        value
        for module in (types, pod)
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, msgspec.Struct)
    ]
    return sorted({field.encode_name for struct in structs for field in msgspec.structs.fields(struct)})


def _refuse_what_changes_answers(spec: types.Spec, file: str) -> None:
    """What cannot be left out with a warning, because requests would fail or be answered by another model."""
    if spec.model.lora is not None and spec.model.lora.adapters:
        raise ConfigError(
            f"{file}: spec.model.lora.adapters names adapters, and the engine loads none.",
            param="spec.model.lora.adapters",
            remedy="Remove them, or serve a checkpoint that has them merged in.",
        )
    if spec.model.confidential is not None and spec.model.confidential.enabled:
        raise ConfigError(
            f"{file}: spec.model.confidential.enabled is true, and the engine reads no encrypted weights.",
            param="spec.model.confidential",
            remedy="Serve it where they can be decrypted.",
        )


def _picker_config(spec: types.Spec, found: Documents, file: str) -> list[dict[str, Any]]:
    """The EndpointPickerConfig that the scheduler names, inline or as a key of a ConfigMap in the same file."""
    scheduler = None if spec.router is None else spec.router.scheduler
    config = None if scheduler is None else scheduler.config
    if config is None:
        return []
    if config.inline is not None and config.ref is not None:
        raise ConfigError(f"{file}: spec.router.scheduler.config has both inline and ref.", remedy="Keep one of them.")
    if config.inline is not None:
        return [config.inline]
    if config.ref is None:
        return []
    data = found.config_maps.get(config.ref.name, {}).get("data")
    text = data.get(config.ref.key) if isinstance(data, dict) else None
    if not isinstance(text, str):
        if config.ref.optional:
            return []
        raise ConfigError(
            f"{file}: spec.router.scheduler.config.ref names the key {config.ref.key!r} of the ConfigMap "
            f"{config.ref.name!r}, which is not in the file.",
            param="spec.router.scheduler.config.ref",
            remedy="Put the ConfigMap into the same file, as another document, or use inline.",
        )
    return parse_documents(text.encode(), f"{file}: ConfigMap {config.ref.name}: {config.ref.key}")
