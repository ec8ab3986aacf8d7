"""From what is planned to what is executed: command lines and environments of engines and of the gateway."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import msgspec
import yaml

from quire.fleet import kv_events
from quire.fleet.directory import write_file
from quire.fleet.provider import Launch
from quire.fleet.spec import ENGINE_HOST, GATEWAY, RoleSpec
from quire.fleet.state import Replica

QUIRE = (sys.executable, "-m", "quire")
KV_FLAGS = ("--kv-cache-memory", "--num-kv-blocks", "--memory-utilization")
SECRETS = {"--api-key": "QUIRE_API_KEY", "--hf-token": "QUIRE_HF_TOKEN"}
"""Flags that go into the environment: everybody on the machine can read a command line."""
KV_SHARE = 0.5
"""Of the memory that is free, what the KV pools of all engines together take unless they are told otherwise."""


def launch(
    replica: Replica,
    spec: RoleSpec,
    *,
    engines: int,
    endpoints_file: Path,
    environ: Mapping[str, str],
    free_ports: Callable[[], tuple[int, int]],
) -> Launch:
    """How to start `replica`. `engines` share this machine; `environ` is what the processes inherit. `free_ports` are
    asked for if it publishes KV events."""
    arguments, secrets = _without_secrets(spec.arguments)
    environment = {**environ, **spec.environment, **secrets}
    spec = msgspec.structs.replace(spec, arguments=arguments)
    if spec.role == GATEWAY:
        command = gateway_command(replica, spec, endpoints_file)
    else:
        if kv_events.publishes(spec.arguments):
            spec = msgspec.structs.replace(spec, arguments=kv_events.placed(spec.arguments, free_ports()))
        command = engine_command(replica, spec, engines, environment)
    return Launch(replica=replica.name, start=replica.starts, command=command, environment=environment)


def _without_secrets(arguments: Sequence[str]) -> tuple[tuple[str, ...], dict[str, str]]:
    """The arguments that may be seen, and the variables that say the same as the others."""
    seen, secrets = [], {}
    for argument in arguments:
        name, _, value = argument.partition("=")
        if name in SECRETS:
            secrets[SECRETS[name]] = value
        else:
            seen.append(argument)
    return tuple(seen), secrets


def engine_command(replica: Replica, spec: RoleSpec, engines: int, environment: Mapping[str, str]) -> tuple[str, ...]:
    command = [*QUIRE, "serve", *spec.arguments, "--host", ENGINE_HOST, "--port", str(replica.port)]
    if replica.threads is not None:
        command += ["--threads", str(replica.threads)]
    given = {argument.partition("=")[0] for argument in spec.arguments}
    variables = {"QUIRE_" + flag[2:].replace("-", "_").upper() for flag in KV_FLAGS}
    if not given & set(KV_FLAGS) and not variables & set(environment):
        command += ["--memory-utilization", f"{KV_SHARE / engines:.4f}"]
    return tuple(command)


def gateway_command(replica: Replica, spec: RoleSpec, endpoints_file: Path) -> tuple[str, ...]:
    """The gateway in front: one port, the manifest's policy, and the file that names the engines."""
    return (
        *QUIRE,
        "gateway",
        "--policy",
        str(policy_file(endpoints_file)),
        "--endpoints-file",
        str(endpoints_file),
        "--host",
        spec.host,
        "--port",
        str(replica.port),
        *spec.arguments,
    )


def policy_file(endpoints_file: Path) -> Path:
    return endpoints_file.with_name("policy.yaml")


def write_policy(path: Path, spec: RoleSpec) -> None:
    """The manifest's documents that are the gateway's: EndpointPickerConfig, objectives, rewrites, pools."""
    write_file(path, yaml.safe_dump_all(spec.documents, sort_keys=False).encode())


def threads_for(spec: RoleSpec, engines: int, cores: int, environ: Mapping[str, str]) -> int | None:
    """CPU threads of one engine: what the manifest grants it, or its share of the cores; None if that was said."""
    if spec.role == GATEWAY or any(argument.partition("=")[0] == "--threads" for argument in spec.arguments):
        return None
    if "QUIRE_THREADS" in {**environ, **spec.environment}:
        return None
    share = cores // max(engines, 1) if spec.cpu is None else round(spec.cpu)
    return max(1, min(share, cores))


def api_key(spec: RoleSpec, environ: Mapping[str, str]) -> str | None:
    """The key that the engines ask for, which probes have to send."""
    _, secrets = _without_secrets(spec.arguments)
    return {**environ, **spec.environment, **secrets}.get("QUIRE_API_KEY")
