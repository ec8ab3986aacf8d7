"""What a plugin can be, and how one comes to be.

A plugin is an object of one or several of these classes; a scheduling profile names plugins, and each goes where its
classes say. Types are llm-d's names. Those of others come through the entry-point group `quire.gateway_plugins`: an
entry of the type's name that loads a `Factory`.
"""

from __future__ import annotations

import math
import random
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import UnionType
from typing import Any, ClassVar, TypeVar, Union, get_args, get_origin

import msgspec
import structlog

from quire.core.errors import ConfigError
from quire.core.registry import Registry
from quire.gateway.endpoint import Clock, Endpoint, Pool
from quire.gateway.request import InferenceRequest, Outcome


class Plugin(ABC):  # noqa: B024 - what a plugin does is said by the classes below
    """The root. `name` is the configuration's, else the type."""

    name: str = ""


class Producer(Plugin):
    """Finds something out about a request before it is scheduled, and writes it into the request."""

    @abstractmethod
    def produce(self, request: InferenceRequest, endpoints: Sequence[Endpoint]) -> Awaitable[None] | None:
        """Called in the order of the configuration; an awaitable is awaited. A failure is logged and counted, and the
        request goes on without."""


class Admitter(Plugin):
    after_producers: ClassVar[bool] = False
    """It looks at what producers find out: it is asked when the request is about to be scheduled, others before it is
    queued."""

    @abstractmethod
    def admit(self, request: InferenceRequest, endpoints: Sequence[Endpoint]) -> None:
        """Raises `Dropped` to turn the request away."""


class Filter(Plugin):
    @abstractmethod
    def filter(self, request: InferenceRequest, candidates: Sequence[Endpoint]) -> Sequence[Endpoint]:
        """Those that may serve it, in the same order."""


class Scorer(Plugin):
    @abstractmethod
    def score(self, request: InferenceRequest, candidates: Sequence[Endpoint]) -> Sequence[float]:
        """One number in [0, 1] for each candidate; 1 is best."""

    def details(self) -> Sequence[object] | None:
        """What lay behind the scores just given, one JSON-like value for each candidate, for explaining. Asked for with
        each request and kept for a while, looked at rarely: best a sequence that makes its values when they are."""
        return None


class Picker(Plugin):
    @abstractmethod
    def pick(
        self, request: InferenceRequest, candidates: Sequence[Endpoint], totals: Sequence[float]
    ) -> Sequence[Endpoint]:
        """The best first; those behind it are tried when it fails. Never empty for candidates that are not."""


class ProfileHandler(Plugin):
    """Chooses which profiles run for a request, and makes one choice of their results."""

    max_profiles: ClassVar[int | None] = None
    """How many profiles it can work with; None: any number."""

    def required_profiles(self, profiles: Sequence[str]) -> Sequence[str]:
        """Those without which it would serve nobody, or not as it is told to; `profiles` are those there are."""
        return ()

    def used_profiles(self, profiles: Sequence[str]) -> Sequence[str]:
        """Those that it may run."""
        return profiles

    @abstractmethod
    def next_profiles(
        self, request: InferenceRequest, profiles: Sequence[str], results: Mapping[str, Sequence[Endpoint]]
    ) -> Sequence[str]:
        """Names of the profiles to run next, given what has run; none: all is there."""

    @abstractmethod
    def conclude(self, request: InferenceRequest, results: Mapping[str, Sequence[Endpoint]]) -> Conclusion:
        """`results` holds, by profile, what its picker gave; nothing where no endpoint was left."""


class Decider(Plugin):
    """Whether a request's stage (`prefill`, `encode`) runs on an endpoint of its own."""

    @abstractmethod
    def disaggregate(self, request: InferenceRequest, endpoint: Endpoint) -> bool:
        """`endpoint` is the one chosen to decode."""


class Observer(Plugin):
    """Is told what becomes of requests. Anything else a plugin is, it may be this too. A failure is logged, and changes
    nothing else."""

    def sent(self, request: InferenceRequest, endpoint: Endpoint, choice: Conclusion) -> None:
        """Chosen, and about to go out. May add to `choice.headers`."""

    def first_byte(self, request: InferenceRequest, endpoint: Endpoint, ttft: float) -> None:
        """`ttft`: seconds since it was sent."""

    def finished(self, request: InferenceRequest, endpoint: Endpoint, outcome: Outcome) -> None:
        """The attempt at this endpoint is over."""


@dataclass(slots=True)
class Conclusion:
    """Where a request goes: the best first, then those to try when it fails."""

    endpoints: Sequence[Endpoint]
    headers: dict[str, str] = field(default_factory=dict)
    """Added to what is sent to the endpoint: `x-prefiller-host-port` and the like."""
    response_headers: dict[str, str] = field(default_factory=dict)
    """Added to the client's answer: a session's token and the like."""


def log_warning(note: str) -> None:
    structlog.get_logger().warning("picker_config", note=note)


@dataclass(frozen=True, slots=True)
class Services:
    """What plugins get from the gateway. `plugin(name)` is another one of the configuration."""

    pool: Pool
    clock: Clock
    rng: random.Random
    plugin: Callable[[str], Plugin]
    shared: dict[str, Any] = field(default_factory=dict)
    """Things of which there is one per gateway: `kv_index` (KVIndex), `http` (the client session) …"""
    warn: Callable[[str], None] = log_warning
    """Takes a sentence about what the configuration says and has no effect."""


Factory = Callable[[Mapping[str, Any], Services], Plugin]
"""Makes a plugin of its `parameters` (checked: see `read_parameters`)."""


class Parameters(msgspec.Struct, forbid_unknown_fields=True, frozen=True, rename="camel", kw_only=True):
    """The base of plugins' parameters, in llm-d's spelling. A field is something that is heeded."""

    WITHOUT_EFFECT: ClassVar[Mapping[str, str]] = {}
    """What llm-d knows and is not heeded here: accepted, with a warning that says why. `*`: whatever is no field."""


class NoParameters(Parameters, frozen=True):
    pass


P = TypeVar("P", bound=msgspec.Struct)


def read_parameters(
    kind: type[P], parameters: Mapping[str, Any], plugin: str, warn: Callable[[str], None] = log_warning
) -> P:
    """`kind` should forbid unknown fields. Raises `ConfigError` that names the plugin and the field."""
    for name, value in parameters.items():
        if _holds_nan(value):
            raise ConfigError(
                f"Plugin {plugin!r}: {name} is not a number.",
                param="plugins",
                remedy="Write one, not .nan.",
            )
    heeded = _heeded(kind, parameters, "", lambda what: warn(f"plugin {plugin}: {what}"))
    try:
        return msgspec.convert(heeded, kind)
    except msgspec.ValidationError as error:
        raise ConfigError(
            f"Plugin {plugin!r}: {error}.", param="plugins", remedy="See docs/gateway-plugins.md for its parameters."
        ) from error


def _heeded(
    kind: type[msgspec.Struct], given: Mapping[str, Any], path: str, warn: Callable[[str], None]
) -> Mapping[str, Any]:
    """What is left without that which has no effect, which is told."""
    without_effect: Mapping[str, str] = getattr(kind, "WITHOUT_EFFECT", {})
    fields = {field.encode_name: field for field in msgspec.structs.fields(kind)}
    left: dict[str, Any] = {}
    for name, value in given.items():
        field = fields.get(name)
        why = without_effect.get(name, without_effect.get("*")) if field is None else None
        if why is not None:
            warn(f"parameter {path}{name} has no effect: {why}")
            continue
        inner = None if field is None else struct_in(field.type)
        nested = inner is not None and isinstance(value, Mapping)
        left[name] = _heeded(inner, value, f"{path}{name}.", warn) if nested and inner else value
    return left


def struct_in(annotation: Any) -> type[msgspec.Struct] | None:
    """The struct that a field holds, be it optional, or several of them."""
    held = get_args(annotation) if get_origin(annotation) in (Union, UnionType, tuple) else (annotation,)
    for one in held:
        if isinstance(one, type) and issubclass(one, msgspec.Struct):
            return one
    return None


def _holds_nan(value: object) -> bool:
    """It passes every check of a range that is not made with it in mind, and spoils what it is compared with."""
    if isinstance(value, Mapping):
        return any(map(_holds_nan, value.values()))
    if isinstance(value, list):
        return any(map(_holds_nan, value))
    return isinstance(value, float) and math.isnan(value)


def plugin_registry() -> Registry[Factory]:
    """A registry without the stock plugins; `quire.gateway.plugins.stock` adds them."""
    return Registry("gateway plugin", "quire.gateway_plugins")
