"""Kubernetes' PodSpec and Container, as far as a manifest may have them. Source: kubernetes/api, core/v1/types.go."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from msgspec import Meta

Body = dict[str, Any]


def _unused(because: str) -> Meta:
    return Meta(extra={"unused": because})


PLACEMENT = _unused("all processes run on this machine")
CONTAINER = _unused("an engine is a process, not a container")
IDENTITY = _unused("processes run as the user who started them")
NETWORK = _unused("processes listen on ports of the loopback that the fleet allots")
STORAGE = _unused("a process sees this machine's files as they are")
PROBES = _unused("the fleet asks engines itself: /ready, /health and /v1/models")


class Struct(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, rename="camel"):
    pass


class SecretKey(Struct, frozen=True, kw_only=True):
    key: str
    name: str | None = None
    optional: bool = False


class EnvVarSource(Struct, frozen=True, kw_only=True):
    """Where a variable's value comes from; here: the environment of the command, if it has it."""

    secret_key_ref: SecretKey | None = None
    config_map_key_ref: SecretKey | None = None
    field_ref: Body | None = None
    resource_field_ref: Body | None = None
    file_key_ref: Body | None = None


class EnvVar(Struct, frozen=True, kw_only=True):
    name: str
    value: str | None = None
    value_from: EnvVarSource | None = None


class Resources(Struct, frozen=True, kw_only=True):
    """Quantities by resource: `cpu` and `memory` limits hold here."""

    limits: dict[str, str | int | float] | None = None
    requests: dict[str, str | int | float] | None = None
    claims: Annotated[list[Body] | None, PLACEMENT] = None


class Container(Struct, frozen=True, kw_only=True):
    name: str
    command: list[str] | None = None
    args: list[str] | None = None
    env: list[EnvVar] | None = None
    resources: Resources | None = None
    image: Annotated[str | None, _unused("the engine is the quire that is installed here")] = None
    image_pull_policy: Annotated[str | None, CONTAINER] = None
    working_dir: Annotated[str | None, CONTAINER] = None
    ports: Annotated[list[Body] | None, NETWORK] = None
    env_from: Annotated[list[Body] | None, _unused("ConfigMaps and Secrets are the cluster's; use env")] = None
    volume_mounts: Annotated[list[Body] | None, STORAGE] = None
    volume_devices: Annotated[list[Body] | None, STORAGE] = None
    resize_policy: Annotated[list[Body] | None, CONTAINER] = None
    restart_policy: Annotated[str | None, CONTAINER] = None
    restart_policy_rules: Annotated[list[Body] | None, CONTAINER] = None
    liveness_probe: Annotated[Body | None, PROBES] = None
    readiness_probe: Annotated[Body | None, PROBES] = None
    startup_probe: Annotated[Body | None, PROBES] = None
    lifecycle: Annotated[Body | None, CONTAINER] = None
    termination_message_path: Annotated[str | None, CONTAINER] = None
    termination_message_policy: Annotated[str | None, CONTAINER] = None
    security_context: Annotated[Body | None, IDENTITY] = None
    stdin: Annotated[bool | None, CONTAINER] = None
    stdin_once: Annotated[bool | None, CONTAINER] = None
    tty: Annotated[bool | None, CONTAINER] = None


class PodSpec(Struct, frozen=True, kw_only=True):
    containers: list[Container] = []
    termination_grace_period_seconds: Annotated[int, Meta(ge=0, le=86_400)] | None = None
    """Seconds that a replica may drain."""
    volumes: Annotated[list[Body] | None, STORAGE] = None
    init_containers: Annotated[list[Body] | None, CONTAINER] = None
    ephemeral_containers: Annotated[list[Body] | None, CONTAINER] = None
    restart_policy: Annotated[str | None, _unused("processes that end are started again")] = None
    active_deadline_seconds: Annotated[int | None, CONTAINER] = None
    dns_policy: Annotated[str | None, NETWORK] = None
    dns_config: Annotated[Body | None, NETWORK] = None
    node_selector: Annotated[dict[str, str] | None, PLACEMENT] = None
    node_name: Annotated[str | None, PLACEMENT] = None
    affinity: Annotated[Body | None, PLACEMENT] = None
    tolerations: Annotated[list[Body] | None, PLACEMENT] = None
    topology_spread_constraints: Annotated[list[Body] | None, PLACEMENT] = None
    scheduler_name: Annotated[str | None, PLACEMENT] = None
    scheduling_gates: Annotated[list[Body] | None, PLACEMENT] = None
    priority_class_name: Annotated[str | None, PLACEMENT] = None
    priority: Annotated[int | None, PLACEMENT] = None
    preemption_policy: Annotated[str | None, PLACEMENT] = None
    runtime_class_name: Annotated[str | None, CONTAINER] = None
    overhead: Annotated[Body | None, PLACEMENT] = None
    resource_claims: Annotated[list[Body] | None, PLACEMENT] = None
    resources: Annotated[Body | None, _unused("resources are the container's")] = None
    service_account_name: Annotated[str | None, IDENTITY] = None
    service_account: Annotated[str | None, IDENTITY] = None
    automount_service_account_token: Annotated[bool | None, IDENTITY] = None
    security_context: Annotated[Body | None, IDENTITY] = None
    image_pull_secrets: Annotated[list[Body] | None, CONTAINER] = None
    host_network: Annotated[bool | None, NETWORK] = None
    host_pid: Annotated[bool | None, msgspec.Meta(extra={"unused": "processes share this machine's"})] = msgspec.field(
        default=None, name="hostPID"
    )
    host_ipc: Annotated[bool | None, msgspec.Meta(extra={"unused": "processes share this machine's"})] = msgspec.field(
        default=None, name="hostIPC"
    )
    host_users: Annotated[bool | None, IDENTITY] = None
    share_process_namespace: Annotated[bool | None, CONTAINER] = None
    hostname: Annotated[str | None, NETWORK] = None
    hostname_override: Annotated[str | None, NETWORK] = None
    subdomain: Annotated[str | None, NETWORK] = None
    set_hostname_as_fqdn: Annotated[bool | None, NETWORK] = msgspec.field(default=None, name="setHostnameAsFQDN")
    host_aliases: Annotated[list[Body] | None, NETWORK] = None
    readiness_gates: Annotated[list[Body] | None, PROBES] = None
    enable_service_links: Annotated[bool | None, NETWORK] = None
    os: Annotated[Body | None, PLACEMENT] = None
