"""A request on its way through the gateway."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum

from quire.core.errors import QuireError


class Api(Enum):
    """What kind of call it is; `OTHER` is passed on without a look inside."""

    CHAT = "/v1/chat/completions"
    COMPLETIONS = "/v1/completions"
    RESPONSES = "/v1/responses"
    MESSAGES = "/v1/messages"
    EMBEDDINGS = "/v1/embeddings"
    OTHER = "other"


@dataclass(frozen=True, slots=True)
class PrefixMatch:
    """How much of a prompt an endpoint is thought to hold, from its first token on."""

    tokens: int
    """On any tier."""
    weighted_tokens: float
    """Each token times its tier's credit: 1.0 for device memory."""
    tiers: Mapping[str, int] = field(default_factory=dict)
    """Tokens by tier, where the source tells them apart."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """Seconds expected if the request went to one endpoint."""

    ttft: float
    tpot: float


@dataclass(slots=True, kw_only=True)
class InferenceRequest:
    """The first part is written by the parser, the second by what the request passes."""

    id: str
    path: str
    api: Api
    model: str
    """As the client asked."""
    body: bytes
    headers: Mapping[str, str]
    """Names in lower case; of several values the last one."""
    arrived: float
    """By the gateway's clock."""
    stream: bool = False
    prompt: bytes = b""
    """What of the body decides the KV cache, laid out flat in the order of the conversation (not the chat template's
    rendering): equal beginnings mean equal prefixes."""
    prompt_token_ids: Sequence[int] | None = None
    """Where the client sent token ids."""
    cache_salt: str = ""
    max_tokens: int | None = None
    objective: str = ""
    """Name of an InferenceObjective, from the headers."""
    fairness_id: str = ""
    session_id: str = ""
    slo_ttft: float | None = None
    """Seconds."""
    slo_tpot: float | None = None
    subset: frozenset[str] | None = None
    """Addresses (`host:port`) that may be chosen, where an outer gateway said so."""

    tenant: str = ""
    """By the authenticate hook."""
    priority: int = 0
    """By the director, from the objective."""
    target_model: str = ""
    """What the endpoint is asked for; by model rewrite, else `model`."""
    selector: Mapping[str, str] = field(default_factory=dict)
    """Labels that its endpoint must have; by the traffic policy."""
    fallbacks: Sequence[tuple[str, Mapping[str, str]]] = ()
    """Models, and labels of endpoints, to turn to when none can serve the target; by the traffic policy."""
    token_ids: Sequence[int] | None = None
    """By a token producer that tokenises exactly."""
    prompt_tokens: int = 0
    """Counted or estimated; by a token producer, else by the director."""
    prefix: dict[str, Mapping[str, PrefixMatch]] = field(default_factory=dict)
    """By producer's name: endpoint key → match. Endpoints that are not named hold nothing."""
    predictions: dict[str, Prediction] = field(default_factory=dict)
    """By endpoint key; by the latency producer."""
    break_off: Callable[[QuireError], None] | None = None
    """Ends it wherever it is, and tells its caller the error; by the door, where it can and as long as it can."""
    attributes: dict[str, object] = field(default_factory=dict)
    """What out-of-tree plugins tell each other, under the plugin's name."""

    @property
    def size(self) -> int:
        """Bytes held while it waits."""
        return len(self.body) + len(self.prompt)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How an attempt at one endpoint ended."""

    status: int | None
    """The answer's HTTP status; None if there was none."""
    error: str = ""
    """Why it failed: connect, timeout, reset, garbage, cancelled …; empty if it did not."""
    first_byte: float | None = None
    """When, by the gateway's clock."""
    finished: float = 0.0
    output_tokens: int | None = None
    """Where the answer said, or chunks were counted."""
    prompt_tokens: int | None = None
    """As the engine counted them."""
    cached_tokens: int | None = None
    """Prompt tokens that the engine says came from its cache."""

    @property
    def ok(self) -> bool:
        return not self.error and self.status is not None and self.status < 500


def plausible_prompt_tokens(request: InferenceRequest, reported: int) -> float:
    """What an engine says that a prompt had, within what its bytes allow: one token in 64 bytes at least, two for each
    byte and a template's thousand at most. So one engine's wrong number does not spoil an estimate."""
    size = len(request.prompt)
    return min(max(float(reported), size / 64), 2.0 * size + 1024.0)
