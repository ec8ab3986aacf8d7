"""A manifest file as a `ServiceSpec`, what the gateway is to be told, and warnings for what is not used."""

from __future__ import annotations

import difflib
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import msgspec

from quire.config.documents import parse_documents, read_documents
from quire.config.engine import BUILTIN_MODEL
from quire.core.errors import ConfigError
from quire.fleet.directory import check_name
from quire.fleet.manifest import pod, types
from quire.fleet.manifest.arguments import EngineArguments, engine_arguments
from quire.fleet.manifest.documents import Documents, sort_documents
from quire.fleet.manifest.quantity import quantity
from quire.fleet.manifest.warnings import warnings
from quire.fleet.spec import DEFAULT_DRAIN_TIMEOUT, DEFAULT_STOP_TIMEOUT, Role, RoleSpec, ServiceSpec

MAIN = "main"
"""KServe's name for the container with the engine."""
DEFAULT_SHUTDOWN = 30.0
_PERCENT = re.compile(r"\d{1,3}%")
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
    model = model_arguments(spec.model.uri, path.absolute().parent, pvc_dir)
    first: Role = "both" if spec.prefill is None else "decode"
    roles = [_role(first, spec, "spec", model, model_name, notes)]
    if spec.prefill is not None:
        roles.append(_role("prefill", spec.prefill, "spec.prefill", model, model_name, notes))
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
            f"{file}: spec.model.lora.adapters has {len(spec.model.lora.adapters)} adapters, and the engine loads none.",
            param="spec.model.lora.adapters",
            remedy="Remove them, or serve a checkpoint that has them merged in.",
        )
    if spec.model.confidential is not None and spec.model.confidential.enabled:
        raise ConfigError(
            f"{file}: spec.model.confidential.enabled is true, and the engine reads no encrypted weights.",
            param="spec.model.confidential",
            remedy="Serve it where they can be decrypted.",
        )


def model_arguments(uri: str, base: Path, pvc_dir: Path | None) -> list[str]:
    """The arguments of `quire serve` that name the model: `hf://org/name[:revision]`, `s3://`, `file://`,
    `pvc://claim/path`, a path (relative to `base`, the manifest's directory), or the built-in model's name."""
    if uri == BUILTIN_MODEL:
        return [uri]
    scheme, separator, rest = uri.partition("://")
    if not separator:
        return [str(base / Path(uri).expanduser())]
    if scheme == "hf":
        name, _, revision = rest.partition(":")
        return [name, f"--revision={revision}"] if revision else [name]
    if scheme == "s3":
        return [uri]
    if scheme == "file":
        return [unquote(urlsplit(uri).path)]
    if scheme == "pvc":
        claim, _, path = rest.partition("/")
        if pvc_dir is None:
            raise ConfigError(
                f"spec.model.uri is {uri[:200]!r}, and there are no volume claims on this machine.",
                param="spec.model.uri",
                remedy=f"Give --pvc-dir DIR (or QUIRE_PVC_DIR): the model is looked for in DIR/{claim}/{path}.",
            )
        directory = (pvc_dir / claim / path).resolve()
        if not directory.is_relative_to(pvc_dir.resolve()):
            raise ConfigError(f"spec.model.uri is {uri[:200]!r}.", param="spec.model.uri", remedy="Leave '..' out.")
        return [str(directory)]
    raise ConfigError(
        f"spec.model.uri is {uri[:200]!r}.",
        param="spec.model.uri",
        remedy=f"Use hf://, s3://, file://, pvc://, a path, or {BUILTIN_MODEL}.",
    )


def _role(
    role: Role, workload: types.Workload, path: str, model: list[str], model_name: str, notes: list[str]
) -> RoleSpec:
    container, where = _engine_container(workload.template, f"{path}.template", notes)
    said = EngineArguments() if container is None else engine_arguments(container, where)
    notes += said.warnings
    said.flags.setdefault("served_model_name", model_name)
    notes += _parallelism(workload.parallelism, f"{path}.parallelism")
    cpu, memory = _limits(None if container is None else container.resources, f"{where}.resources", notes)
    grace = None if workload.template is None else workload.template.termination_grace_period_seconds
    shutdown = float(str(said.flags.get("shutdown_timeout", DEFAULT_SHUTDOWN)))
    surge, unavailable = _rollout(workload.rollout_strategy, f"{path}.rolloutStrategy")
    return RoleSpec(
        role=role,
        replicas=_replicas(workload, path),
        arguments=(*model, *said.as_list()),
        environment=said.environment,
        cpu=cpu,
        memory=memory,
        labels=workload.labels or {},
        max_surge=surge,
        max_unavailable=unavailable,
        drain_timeout=DEFAULT_DRAIN_TIMEOUT if grace is None else float(grace),
        stop_timeout=shutdown + DEFAULT_STOP_TIMEOUT - DEFAULT_SHUTDOWN,
    )


def _replicas(workload: types.Workload, path: str) -> int:
    if workload.scaling is None:
        return 1 if workload.replicas is None else workload.replicas
    if workload.replicas is not None:
        raise ConfigError(
            f"{path} has both replicas and scaling.", param=f"{path}.replicas", remedy="Keep one of them."
        )
    least = workload.scaling.min_replicas or 1
    if least > workload.scaling.max_replicas:
        raise ConfigError(
            f"{path}.scaling.minReplicas is {least}, above maxReplicas, {workload.scaling.max_replicas}.",
            param=f"{path}.scaling",
            remedy="Swap them.",
        )
    return least


def _engine_container(template: pod.PodSpec | None, path: str, notes: list[str]) -> tuple[pod.Container | None, str]:
    """The container that is the engine: the one called main, or the only one."""
    containers = [] if template is None else template.containers
    chosen = next((item for item in containers if item.name == MAIN), None)
    if chosen is None and len(containers) == 1:
        chosen = containers[0]
    if chosen is None and containers:
        names = ", ".join(item.name for item in containers)
        raise ConfigError(
            f"{path}.containers has none called {MAIN!r}: {names}.",
            param=f"{path}.containers",
            remedy=f"Call the engine's container {MAIN!r}, as KServe does.",
        )
    where = path
    for index, item in enumerate(containers):
        if item is chosen:
            where = f"{path}.containers[{index}]"
        else:
            notes.append(
                f"{path}.containers[{index}] ({item.name}): not used by provider processes, "
                "because only the engine's container becomes a process."
            )
    return chosen, where


def _parallelism(parallelism: types.Parallelism | None, path: str) -> list[str]:
    if parallelism is None:
        return []
    sizes = {
        "tensor": parallelism.tensor,
        "pipeline": parallelism.pipeline,
        "data": parallelism.data,
        "dataLocal": parallelism.data_local,
    }
    because = types.ONE_DEVICE.extra["unused"]  # type: ignore[index]
    return [
        f"{path}.{name}: {size}: not used by provider processes, because {because}."
        for name, size in sizes.items()
        if size is not None and size > 1
    ]


def _limits(resources: pod.Resources | None, path: str, notes: list[str]) -> tuple[float | None, int | None]:
    """Cores and bytes."""
    if resources is None:
        return None, None
    limits = resources.limits or {}
    cpu = quantity(limits["cpu"], f"{path}.limits.cpu") if "cpu" in limits else None
    memory = quantity(limits["memory"], f"{path}.limits.memory") if "memory" in limits else None
    for name in sorted(set(limits) - {"cpu", "memory"}):
        notes.append(f"{path}.limits.{name}: not used by provider processes, because only cpu and memory are limited.")
    if resources.requests:
        notes.append(
            f"{path}.requests: not used by provider processes, because nothing is reserved on this machine; limits hold."
        )
    return cpu, None if memory is None else math.ceil(memory)


def _rollout(strategy: types.RolloutStrategy | None, path: str) -> tuple[int | str, int | str]:
    """maxSurge and maxUnavailable; a quarter each, as a Deployment's, where nothing is said."""
    chosen: list[int | str] = []
    for name in ("max_surge", "max_unavailable"):
        value = None if strategy is None else getattr(strategy, name)
        if value is None:
            value = "25%"
        right = 0 <= value <= 1000 if isinstance(value, int) else _PERCENT.fullmatch(value) is not None
        if not right:
            field = "maxSurge" if name == "max_surge" else "maxUnavailable"
            raise ConfigError(
                f"{path}.{field} is {str(value)[:40]!r}.",
                param=f"{path}.{field}",
                remedy="Use a number or a percentage.",
            )
        chosen.append(value)
    return chosen[0], chosen[1]


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
