"""KServe's LLMInferenceService, v1alpha2, with every field that its types have.

Source: kserve/kserve, pkg/apis/serving/v1alpha2/llm_inference_service_types.go. A field that processes of one machine
have no use for says why, in `unused`; setting it is a warning that quotes this. A field that is not here is an error.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from quire.fleet.manifest.pod import PodSpec

Body = dict[str, Any]
"""A part that is read by somebody else, or by nobody."""


def unused(because: str) -> Meta:
    return Meta(extra={"unused": because})


CLUSTER = unused("there is no cluster whose objects could be referred to")
NO_ROUTES = unused("the gateway of this service is the only way to it, at the address that `quire up` prints")
GATEWAY_POD = unused("the gateway is a process that the fleet starts itself")
ONE_DEVICE = unused("an engine runs its model in one process on one device")
NO_AUTOSCALER = unused("no autoscaler runs here; minReplicas are started, and `quire scale` changes that")
NO_TIERS = unused("the engine keeps its KV cache in one tier")
Count = Annotated[int, Meta(ge=1)]


class Struct(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, rename="camel"):
    """What all parts of a manifest have in common: camelCase names, none unknown."""


class LocalObjectReference(Struct, frozen=True, kw_only=True):
    name: str


class ObjectMeta(Struct, frozen=True, kw_only=True):
    name: str
    namespace: Annotated[str | None, unused("processes have no namespaces")] = None
    labels: Annotated[dict[str, str] | None, unused("a service has no labels here; spec.labels are the engines'")] = (
        None
    )
    annotations: Annotated[dict[str, str] | None, unused("nothing here reads annotations")] = None
    generate_name: Annotated[str | None, CLUSTER] = None
    finalizers: Annotated[list[str] | None, CLUSTER] = None
    owner_references: Annotated[list[Body] | None, CLUSTER] = None
    uid: Annotated[str | None, CLUSTER] = None
    resource_version: Annotated[str | None, CLUSTER] = None
    generation: Annotated[int | None, CLUSTER] = None
    creation_timestamp: Annotated[str | None, CLUSTER] = None
    managed_fields: Annotated[list[Body] | None, CLUSTER] = None


class LoRA(Struct, frozen=True, kw_only=True):
    """Adapters are refused where there are any: requests for them could not be answered."""

    adapters: list[Body] = []
    max_rank: Annotated[Count | None, unused("no adapters are loaded")] = None
    max_adapters: Annotated[Count | None, unused("no adapters are loaded")] = None
    max_cpu_adapters: Annotated[Count | None, unused("no adapters are loaded")] = None


class Confidential(Struct, frozen=True, kw_only=True):
    """Refused if enabled: encrypted weights could not be read."""

    enabled: bool = False
    resource_id: str | None = None


class Model(Struct, frozen=True, kw_only=True):
    uri: str
    name: str | None = None
    lora: LoRA | None = msgspec.field(default=None, name="lora")
    confidential: Confidential | None = None
    criticality: Annotated[str | None, unused("priorities are the InferenceObjective's")] = None
    """v1alpha1's; v1alpha2 has it no more."""


class StorageInitializer(Struct, frozen=True, kw_only=True):
    enabled: Annotated[bool | None, unused("the engine fetches the model itself, and keeps it")] = None


class RolloutStrategy(Struct, frozen=True, kw_only=True):
    """Numbers, or percentages of the replicas."""

    max_unavailable: int | str | None = None
    max_surge: int | str | None = None


class Parallelism(Struct, frozen=True, kw_only=True):
    tensor: Count | None = None
    pipeline: Count | None = None
    data: Count | None = None
    data_local: Count | None = None
    data_rpc_port: Annotated[int | None, ONE_DEVICE] = msgspec.field(default=None, name="dataRPCPort")
    expert: Annotated[bool, ONE_DEVICE] = False


class WVA(Struct, frozen=True, kw_only=True):
    variant_cost: Annotated[str | None, NO_AUTOSCALER] = None
    hpa: Annotated[Body | None, NO_AUTOSCALER] = None
    keda: Annotated[Body | None, NO_AUTOSCALER] = None


class KEDA(Struct, frozen=True, kw_only=True):
    triggers: Annotated[list[Body] | None, NO_AUTOSCALER] = None
    polling_interval: Annotated[int | None, NO_AUTOSCALER] = None
    cooldown_period: Annotated[int | None, NO_AUTOSCALER] = None
    initial_cooldown_period: Annotated[int | None, NO_AUTOSCALER] = None
    idle_replica_count: Annotated[int | None, NO_AUTOSCALER] = None
    fallback: Annotated[Body | None, NO_AUTOSCALER] = None
    advanced: Annotated[Body | None, NO_AUTOSCALER] = None


class Scaling(Struct, frozen=True, kw_only=True):
    min_replicas: Count | None = None
    max_replicas: Annotated[Count, NO_AUTOSCALER]
    wva: WVA | None = None
    keda: KEDA | None = None


class KVCacheOffloading(Struct, frozen=True, kw_only=True):
    """Both forms that the field has had."""

    cpu: Annotated[Body | int | str | None, NO_TIERS] = None
    eviction_policy: Annotated[Literal["lru", "arc"] | None, NO_TIERS] = None
    secondary: Annotated[list[Body] | None, NO_TIERS] = None
    file_system: Annotated[list[Body] | None, NO_TIERS] = None
    object_store: Annotated[list[Body] | Body | None, NO_TIERS] = None
    cpu_bytes_to_use: Annotated[int | None, NO_TIERS] = None
    secondary_tiers: Annotated[list[Body] | None, NO_TIERS] = None


class Workload(Struct, frozen=True, kw_only=True):
    """One role's processes. The spec has these fields itself, and again under `prefill`."""

    replicas: Annotated[int, Meta(ge=0, le=1000)] | None = None
    scaling: Scaling | None = None
    parallelism: Parallelism | None = None
    labels: dict[str, str] | None = None
    """Of the engines' endpoints, where the gateway's filters see them."""
    annotations: Annotated[dict[str, str] | None, unused("nothing here reads annotations")] = None
    template: PodSpec | None = None
    worker: Annotated[Body | None, ONE_DEVICE] = None
    kv_cache_offloading: KVCacheOffloading | None = msgspec.field(default=None, name="kvCacheOffloading")
    rollout_strategy: RolloutStrategy | None = None


class HTTPRoute(Struct, frozen=True, kw_only=True):
    refs: Annotated[list[Body] | None, NO_ROUTES] = None
    spec: Annotated[Body | None, NO_ROUTES] = None


class Route(Struct, frozen=True, kw_only=True):
    http: HTTPRoute | None = None
    group: Annotated[str | None, unused("services of a group have no common address here")] = None
    weight: Annotated[int | None, unused("services of a group have no common address here")] = None


class GatewayRefs(Struct, frozen=True, kw_only=True):
    refs: Annotated[list[Body] | None, NO_ROUTES] = None


class ConfigMapKey(Struct, frozen=True, kw_only=True):
    name: str
    key: str
    optional: bool = False


class SchedulerConfig(Struct, frozen=True, kw_only=True):
    inline: Body | None = None
    ref: ConfigMapKey | None = None


class Pool(Struct, frozen=True, kw_only=True):
    spec: Annotated[Body | None, unused("the pool is this service's engines")] = None
    ref: Annotated[LocalObjectReference | None, unused("the pool is this service's engines")] = None


class Tokenizer(Struct, frozen=True, kw_only=True):
    template: Annotated[Body | None, GATEWAY_POD] = None


class Scheduler(Struct, frozen=True, kw_only=True):
    pool: Pool | None = None
    template: Annotated[Body | None, GATEWAY_POD] = None
    config: SchedulerConfig | None = None
    replicas: Annotated[int | None, unused("one gateway process has the port")] = None
    tokenizer: Tokenizer | None = None
    labels: Annotated[dict[str, str] | None, GATEWAY_POD] = None
    annotations: Annotated[dict[str, str] | None, GATEWAY_POD] = None


class Router(Struct, frozen=True, kw_only=True):
    route: Route | None = None
    gateway: GatewayRefs | None = None
    ingress: GatewayRefs | None = None
    scheduler: Scheduler | None = None


class Tracing(Struct, frozen=True, kw_only=True):
    exporter_endpoint: Annotated[str | None, unused("traces are not exported")] = None
    sampler: Annotated[str | None, unused("traces are not exported")] = None
    sampler_arg: Annotated[str | None, unused("traces are not exported")] = None
    exporter: Annotated[str | None, unused("traces are not exported")] = None


class Spec(Workload, frozen=True, kw_only=True):
    model: Model
    storage_initializer: StorageInitializer | None = None
    router: Router | None = None
    prefill: Workload | None = None
    tracing: Tracing | None = None


class LLMInferenceService(Struct, frozen=True, kw_only=True):
    api_version: str
    kind: Literal["LLMInferenceService"]
    metadata: ObjectMeta
    spec: Spec
    status: Annotated[Body | None, unused("it is what a cluster wrote")] = None
