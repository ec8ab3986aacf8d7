"""A workload of a manifest (the spec itself, or its `prefill`) as a `RoleSpec`."""

from __future__ import annotations

import math
import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

from quire.config.engine import BUILTIN_MODEL
from quire.core.errors import ConfigError
from quire.fleet.manifest import pod, types
from quire.fleet.manifest.arguments import EngineArguments, engine_arguments
from quire.fleet.manifest.quantity import quantity
from quire.fleet.spec import DEFAULT_DRAIN_TIMEOUT, DEFAULT_STOP_TIMEOUT, Role, RoleSpec

MAIN = "main"
"""KServe's name for the container with the engine."""
DEFAULT_SHUTDOWN = 30.0
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)
_PERCENT = re.compile(r"\d{1,3}%")


def model_arguments(uri: str, base: Path, pvc_dir: Path | None) -> list[str]:
    """The arguments of `quire serve` that name the model: `hf://org/name[:revision]`, `s3://`, `file://`,
    `pvc://claim/path`, a path (relative to `base`, the manifest's directory), or the built-in model's name."""
    _refuse_what_no_process_takes(uri, "spec.model.uri")
    if uri == BUILTIN_MODEL:
        return [uri]
    scheme, separator, rest = uri.partition("://")
    if not separator:
        return [str(base / Path(uri).expanduser())]
    if scheme == "hf":
        name, _, revision = rest.partition(":")
        if _HUB_NAME.fullmatch(name) is None:
            raise ConfigError(
                f"spec.model.uri is {uri[:200]!r}, which names no model of the Hugging Face Hub.",
                param="spec.model.uri",
                remedy="Write hf://org/name or hf://org/name:revision.",
            )
        return [name, f"--revision={revision}"] if revision else [name]
    if scheme == "s3":
        return [uri]
    if scheme == "file":
        if not rest.startswith("/"):
            raise ConfigError(
                f"spec.model.uri is {uri[:200]!r}, which names another machine.",
                param="spec.model.uri",
                remedy="Write file:///PATH.",
            )
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


def role_spec(role: Role, workload: types.Workload, path: str, *, model: list[str], notes: list[str]) -> RoleSpec:
    """What `workload` asks for; `model` begins the engine's arguments. What has no effect is added to `notes`."""
    container, where = _engine_container(workload.template, f"{path}.template", notes)
    said = EngineArguments() if container is None else engine_arguments(container, where)
    notes += said.warnings
    notes += _parallelism(workload.parallelism, f"{path}.parallelism")
    cpu, memory = _limits(None if container is None else container.resources, f"{where}.resources", notes)
    grace = None if workload.template is None else workload.template.termination_grace_period_seconds
    shutdown = float(str(said.flags.get("shutdown_timeout", DEFAULT_SHUTDOWN)))
    arguments = (*model, *said.as_list())
    labels = workload.labels or {}
    for text in (*arguments, *said.environment, *said.environment.values(), *labels, *labels.values()):
        _refuse_what_no_process_takes(text, where or path)
    surge, unavailable = _rollout(workload.rollout_strategy, f"{path}.rolloutStrategy")
    return RoleSpec(
        role=role,
        replicas=_replicas(workload, path),
        arguments=arguments,
        environment=said.environment,
        cpu=cpu,
        memory=memory,
        labels=labels,
        max_surge=surge,
        max_unavailable=unavailable,
        drain_timeout=DEFAULT_DRAIN_TIMEOUT if grace is None else float(grace),
        stop_timeout=shutdown + DEFAULT_STOP_TIMEOUT - DEFAULT_SHUTDOWN,
    )


def _refuse_what_no_process_takes(text: str, path: str) -> None:
    if "\0" in text or any("\ud800" <= character <= "\udfff" for character in text):
        raise ConfigError(
            f"{path}: {text[:80]!r} cannot be handed to a process.", param=path, remedy="Leave NUL and surrogates out."
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
            f"{path}.requests: not used by provider processes, because this machine reserves nothing; limits hold."
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
