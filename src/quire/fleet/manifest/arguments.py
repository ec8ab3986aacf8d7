"""From a container's command, args and env to the flags of `quire serve`. Understands vLLM's flags as far as they have
a counterpart, or can be left out without changing an answer; anything else is an error.
"""

from __future__ import annotations

import difflib
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, get_type_hints

from quire.config.engine import EngineConfig
from quire.config.resolve import env_name, flag_name, resolve
from quire.config.server import ServerConfig
from quire.core.errors import ConfigError
from quire.fleet.manifest.pod import Container, EnvVar

ADDITIONAL_ARGS = "VLLM_ADDITIONAL_ARGS"
"""KServe's variable for further flags of the engine."""
_COMMANDS = (
    ("vllm", "serve"),
    ("quire", "serve"),
    ("python", "-m", "vllm.entrypoints.openai.api_server"),
    ("python3", "-m", "vllm.entrypoints.openai.api_server"),
    ("python", "-m", "quire", "serve"),
    ("python3", "-m", "quire", "serve"),
)
_RENAMED: Mapping[str, str] = {
    "gpu-memory-utilization": "memory_utilization",
    "num-gpu-blocks-override": "num_kv_blocks",
    "uvicorn-log-level": "log_level",
}
_ALLOTTED = "the fleet allots addresses and ports, on the loopback and without TLS"
_ONE_DEVICE = "an engine runs its model in one process on one device"
_OWN_WAY = "it decides how vLLM computes, and quire does that in its own way"
_LOGS = "quire's logs have their own settings"
_NO_CODE = "quire runs no code out of checkpoints"
_WITHOUT_EFFECT: Mapping[str, str] = {
    **dict.fromkeys(("host", "port", "ssl-certfile", "ssl-keyfile", "ssl-ca-certs", "ssl-cert-reqs"), _ALLOTTED),
    **dict.fromkeys(("enable-ssl-refresh", "uds"), _ALLOTTED),
    **dict.fromkeys(
        ("tensor-parallel-size", "tp", "pipeline-parallel-size", "pp", "data-parallel-size", "dp"), _ONE_DEVICE
    ),
    **dict.fromkeys(("data-parallel-size-local", "dpl", "data-parallel-rpc-port", "dpp"), _ONE_DEVICE),
    **dict.fromkeys(("data-parallel-address", "dpa", "data-parallel-hybrid-lb", "enable-expert-parallel"), _ONE_DEVICE),
    **dict.fromkeys(("distributed-executor-backend", "device", "api-server-count", "nnodes", "node-rank"), _ONE_DEVICE),
    **dict.fromkeys(("enforce-eager", "no-enforce-eager", "compilation-config", "O", "load-format"), _OWN_WAY),
    **dict.fromkeys(("enable-chunked-prefill", "no-enable-chunked-prefill", "async-scheduling"), _OWN_WAY),
    **dict.fromkeys(
        ("prefix-caching-hash-algo", "attention-backend", "cpu-offload-gb", "kv-transfer-config"), _OWN_WAY
    ),
    **dict.fromkeys(("speculative-config", "disable-custom-all-reduce", "max-parallel-loading-workers"), _OWN_WAY),
    **dict.fromkeys(("disable-log-requests", "enable-log-requests", "no-enable-log-requests"), _LOGS),
    **dict.fromkeys(("disable-log-stats", "disable-uvicorn-access-log", "max-log-len"), _LOGS),
    "trust-remote-code": _NO_CODE,
}
_FETCHING = frozenset({"HF_ENDPOINT", "SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"})
_REFERENCE = re.compile(r"\$\(([A-Za-z_][A-Za-z0-9_]*)\)")
_CLASSES: tuple[type[Any], ...] = (EngineConfig, ServerConfig)


@dataclass(slots=True)
class EngineArguments:
    """What a container says about its engine. `flags` are by field; values as text, or bool for switches."""

    flags: dict[str, object] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def as_list(self) -> list[str]:
        arguments = []
        for name, value in self.flags.items():
            flag = flag_name(name)
            if isinstance(value, bool):
                arguments.append(flag if value else "--no-" + flag.removeprefix("--"))
            else:
                arguments.append(f"{flag}={value}")
        return arguments


def engine_arguments(container: Container, path: str) -> EngineArguments:
    """Raises `ConfigError` for a flag or a variable that is unknown, or has a value that the engine refuses."""
    found = EngineArguments()
    env = {item.name: item for item in container.env or []}
    values = {name: item.value for name, item in env.items() if item.value is not None}
    words = [_filled_in(word, values, path) for word in (container.command or []) + (container.args or [])]
    words = _without_command(words, path, found)
    words += _split(values.get(ADDITIONAL_ARGS, ""), path)
    for name, value in _pairs(words, path):
        _take(name, value, f"{path}.args", found)
    for index, item in enumerate(container.env or []):
        _take_variable(item, f"{path}.env[{index}]", found)
    for cls in _CLASSES:
        own = {item.name for item in fields(cls)}
        given = {name: value for name, value in found.flags.items() if name in own}
        try:
            resolve(cls, flags=given, file=None, environ=found.environment)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error.message}", param=error.param, remedy=error.remedy) from error
    return found


def _filled_in(word: str, values: Mapping[str, str], path: str) -> str:
    """Kubernetes' `$(NAME)`."""
    if "{{" in word:
        raise ConfigError(
            f"{path}: {word[:80]!r} has a template, which only KServe fills in.", remedy="Write the value out."
        )
    return _REFERENCE.sub(lambda match: values.get(match[1], match[0]), word)


def _split(text: str, path: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError as error:
        raise ConfigError(
            f"{path}.env: {ADDITIONAL_ARGS} cannot be split: {error}.", remedy="Mend its quotes."
        ) from error


def _without_command(words: list[str], path: str, found: EngineArguments) -> list[str]:
    """The flags after `vllm serve MODEL`. The model is the manifest's."""
    if not words or words[0].startswith("-"):
        return words
    for command in _COMMANDS:
        if tuple(words[: len(command)]) == command:
            words = words[len(command) :]
            break
    else:
        raise ConfigError(
            f"{path}: the command {' '.join(words[:3])[:80]!r} cannot be run as a quire engine.",
            param=f"{path}.command",
            remedy="Leave command out and give flags in args, or use `vllm serve` or `quire serve`.",
        )
    if words and not words[0].startswith("-"):
        found.warnings.append(f"{path}: the model {words[0]!r}: not used, because spec.model.uri names the model.")
        words = words[1:]
    return words


def _pairs(words: Sequence[str], path: str) -> Iterator[tuple[str, str | None]]:
    """(name without dashes, value) of each flag."""
    position = 0
    while position < len(words):
        word = words[position]
        position += 1
        if not word.startswith("-"):
            raise ConfigError(f"{path}.args: {word[:80]!r} is not a flag.", param=f"{path}.args", remedy="Remove it.")
        name, given, value = word.lstrip("-").partition("=")
        if not given and position < len(words) and not _is_flag(words[position]):
            value, given = words[position], "="
            position += 1
        yield name.replace("_", "-"), value if given else None


def _is_flag(word: str) -> bool:
    return word.startswith("-") and not re.fullmatch(r"-\d+(\.\d+)?", word)


def _take(name: str, value: str | None, path: str, found: EngineArguments) -> None:
    hints = {key: hint for cls in _CLASSES for key, hint in get_type_hints(cls).items()}
    if name in _WITHOUT_EFFECT:
        found.warnings.append(f"{path}: --{name}: not used by provider processes, because {_WITHOUT_EFFECT[name]}.")
        return
    setting = _RENAMED.get(name, name.replace("-", "_"))
    positive = setting.removeprefix("no_")
    if setting not in hints and hints.get(positive) is bool:
        found.flags[positive] = False
    elif setting == "model":
        found.warnings.append(f"{path}: --model {value}: not used, because spec.model.uri names the model.")
    elif setting == "served_model_name":
        found.warnings.append(f"{path}: --{name} {value}: not used, because spec.model.name names the model.")
    elif setting not in hints:
        raise _unknown(name, path, hints)
    elif hints[setting] is bool:
        found.flags[setting] = True if value is None else value
    elif value is None:
        raise ConfigError(f"{path}: --{name} has no value.", param=f"--{name}", remedy="Give it one.")
    else:
        found.flags[setting] = value


def _unknown(name: str, path: str, hints: Mapping[str, object]) -> ConfigError:
    known = [*(setting.replace("_", "-") for setting in hints), *_RENAMED]
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.75)
    remedy = f"Did you mean --{close[0]}?" if close else "`quire serve --help` lists the flags; remove it."
    return ConfigError(f"{path}: --{name[:80]} is not a flag of quire's engine.", param=f"--{name}", remedy=remedy)


def _take_variable(item: EnvVar, path: str, found: EngineArguments) -> None:
    if not item.name or "=" in item.name or "\0" in item.name:
        raise ConfigError(
            f"{path}.name is {item.name[:80]!r}, which no variable can be called.",
            param=f"{path}.name",
            remedy="Leave '=' and NUL out of it.",
        )
    if item.value_from is not None:
        found.warnings.append(
            f"{path}.valueFrom: not used by provider processes, because Secrets and ConfigMaps are the cluster's: "
            f"{item.name} is taken from the environment of `quire up` if it is set there."
        )
    elif item.name == ADDITIONAL_ARGS:
        return
    elif item.name.startswith("VLLM_"):
        found.warnings.append(f"{path}: {item.name}: without effect, because it is a setting of vLLM and not of quire.")
    else:
        if item.name in {env_name("host"), env_name("port"), env_name("model")}:
            raise ConfigError(
                f"{path}: {item.name} is the fleet's to say.", param=item.name, remedy="Remove the variable."
            )
        if (reach := _reach(item.name)) is not None:
            found.warnings.append(f"{path}: {item.name} decides {reach}: make sure that you trust who wrote it.")
        found.environment[item.name] = item.value or ""


def _reach(variable: str) -> str | None:
    """What a variable decides that nobody would look for in a manifest."""
    if variable.startswith(("LD_", "PYTHON")) or variable == "PATH":
        return "which code the engine runs"
    if variable in _FETCHING or variable.startswith("AWS_ENDPOINT") or variable.upper().endswith("_PROXY"):
        return "where the engine fetches its model, and who sees the token"
    return None
